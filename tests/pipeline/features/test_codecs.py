"""Codecs against oracles in numpy: what each may err, outliers, odd sizes, bytes; and features of each on disk."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from qf.pipeline.errors import ArtifactError, EncoderError
from qf.pipeline.features.codecs import CODECS, GROUP, LEVELS, LIMITS, check, columns, decode, encode, largest

from conftest import run_extract  # isort: skip

INTEGERS = ("int8", "int4")


def numpy_decode(encoded):
    """The formulas of the docstring, value by value in float64."""
    e = {name: a.numpy() for name, a in encoded.items()}
    if len(e) == 1:
        return e["tokens"].astype(np.float64)
    batch, tokens = e["tokens"].shape[:2]
    out = np.empty((batch, tokens, e["channel_scale"].shape[1]))
    for b, t, w in np.ndindex(*out.shape):
        scale = float(e["channel_scale"][b, w])
        if e["tokens"].dtype == np.int8:
            out[b, t, w] = int(e["tokens"][b, t, w]) * float(e["token_scale"][b, t]) * scale
        else:
            code = int(e["tokens"][b, t, w // 2]) >> 4 * (w % 2) & 15
            out[b, t, w] = LEVELS[code].item() * float(e["token_scale"][b, t, w // GROUP]) * scale
            out[b, t, w] += float(e["channel_offset"][b, w])
    return out


def steps(encoded, width):
    """(B, T, W): what one unit of a token is worth."""
    token_scale = encoded["token_scale"].double()
    if encoded["tokens"].dtype == torch.int8:
        token_scale = token_scale.unsqueeze(2)  # (B, T, 1): one group is all channels
    token_scale = token_scale.repeat_interleave(width if token_scale.shape[2] == 1 else GROUP, 2)[..., :width]
    return (token_scale * encoded["channel_scale"].double().unsqueeze(1)).numpy()


def check_codec(codec, values):
    """Columns, bytes, decoding and the error of every single element."""
    embeds = torch.from_numpy(values)
    batch, tokens, width = values.shape
    encoded = encode(codec, embeds)
    assert {n: (a.dtype, tuple(a.shape[1:])) for n, a in encoded.items()} == columns(codec, tokens, width)
    decoded = decode(encoded)
    assert decoded.dtype == torch.float32
    slow = numpy_decode(encoded)
    np.testing.assert_allclose(decoded.numpy(), slow, rtol=1e-5, atol=1e-30 + 1e-6 * np.abs(slow).max())
    error = np.abs(slow - values)
    if codec == "float32":
        assert not error.any()
    elif codec == "float16":
        assert (error <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()
    else:
        # the widest gap between levels is 38.6 of 127 units, halved, and half a unit for rounding before the nearest is taken
        bound = 0.5 if codec == "int8" else 38.6 / 2 + 0.5
        assert (error <= bound * steps(encoded, width) * 1.001 + 1e-6 * np.abs(values).max()).all()
    alone = [encode(codec, embeds[n : n + 1]) for n in range(batch)]
    for name, column in encoded.items():
        assert torch.equal(column, torch.cat([one[name] for one in alone])), "a record depends on its neighbours"
    return decoded


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 7, 63, 64, 65, 131]))
anything = shapes.flatmap(
    lambda shape: arrays.arrays(
        np.float32, shape, elements=st.floats(-32768, 32768, width=32), fill=st.floats(-2, 2, width=32)
    )
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CODECS), anything)
def test_no_element_errs_more_than_half_a_step(codec, values):
    check_codec(codec, values)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(CODECS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-42, 1e-6, 1.0, 30.0]),
    st.lists(
        st.sampled_from(["channel", "token", "spike", "zero token", "zero image", "constant", "far mean"]), max_size=3
    ),
)
def test_outliers_zeros_constants_and_subnormals(codec, seed, size, planted):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(2, 6, 70)).astype(np.float32)
    for what in planted:
        b, t, w = draw.integers(2), draw.integers(6), draw.integers(70)
        match what:
            case "channel":
                values[:, :, w] *= 1000
            case "token":
                values[:, t] *= 1000
            case "spike":
                values[b, t, w] = -1000
            case "zero token":
                values[b, t] = 0
            case "zero image":
                values[b] = 0
            case "constant":
                values[b] = 3.25
            case "far mean":
                values += draw.normal(size=70).astype(np.float32) * 5
    values = np.clip(values * np.float32(size), -60000, 60000)
    decoded = check_codec(codec, values)
    if not values.any():
        assert not decoded.any()


def vision_transformer(images=2, tokens=65, width=256):
    """Features with two channels large everywhere and enormous in three tokens."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(images, tokens, width))
    values[:, :, 5] -= 40
    values[:, :, 9] += 20
    values[:, :3, 5] = -1000
    values[:, :3, 9] = 500
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize(("codec", "least"), [("float16", 0.999999), ("int8", 0.9997), ("int4", 0.97)])
def test_ordinary_values_survive_beside_massive_ones(codec, least):
    """Cosine of every token without the two channels, which one scale a tensor brings to about 0."""
    values = vision_transformer()
    scale = values.abs().max() / 127
    rest = [w for w in range(values.shape[2]) if w not in (5, 9)]

    def cosine(other):
        return torch.nn.functional.cosine_similarity(values[:, 3:, rest], other[:, 3:, rest], dim=-1)

    assert cosine((values / scale).round() * scale).max() < 0.5
    assert cosine(decode(encode(codec, values))).min() > least


def test_four_bits_take_the_mean_out_where_that_errs_less():
    draw = np.random.default_rng(0)
    far = draw.normal(size=(1, 20, 64)) + 8 * draw.normal(size=64)
    empty = np.maximum(draw.normal(size=(1, 20, 64)) - 1.5, 0) * (np.arange(20) < 4)[None, :, None]
    values = torch.from_numpy(np.concatenate([far, empty]).astype(np.float32))
    offset = encode("int4", values)["channel_offset"]
    assert torch.equal(offset[0], values[0].mean(0).half())
    assert not offset[1].any()


@pytest.mark.parametrize(
    ("codec", "tokens", "width", "size"),
    [
        ("float32", 37, 192, 4 * 37 * 192),
        ("float16", 37, 192, 2 * 37 * 192),
        ("int8", 37, 192, 37 * 192 + 2 * 37 + 2 * 192),
        ("int4", 37, 192, 37 * 96 + 2 * 37 * 3 + 4 * 192),
        ("int4", 5, 67, 5 * 34 + 2 * 5 * 2 + 4 * 67),
    ],
)
def test_bytes_of_an_image(codec, tokens, width, size):
    encoded = encode(codec, torch.zeros(1, tokens, width))
    assert sum(column.numel() * column.element_size() for column in encoded.values()) == size


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_codec_cannot_hold_is_named(codec):
    values = torch.ones(3, 2, 4)
    values[1, 1, 2] = -LIMITS[codec]
    check(codec, largest(values), "abc")
    assert torch.isfinite(decode(encode(codec, values))).all()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        values[1, 1, 2] = wrong
        with pytest.raises(EncoderError, match="features that are not finite for b; try --precision float32"):
            check(codec, largest(values), "abc")
    if codec != "float32":
        values[1, 1, 2] = LIMITS[codec] * 1.01
        wider = "int8 or float32" if codec == "float16" else "float32"
        with pytest.raises(EncoderError, match=rf"b has a feature of .*--codec {codec} holds; use --codec {wider}$"):
            check(codec, largest(values), "abc")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", CODECS)
def test_the_device_decodes_as_the_processor_does(codec):
    encoded = encode(codec, vision_transformer())
    there = decode({name: column.cuda() for name, column in encoded.items()})
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), decode(encoded), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", INTEGERS)
def test_features_on_disk(pictures, clip_folder, features, tmp_path, codec):
    """Extraction writes the columns, plain pyarrow and one expression read int8, and another codec is never mixed in."""
    small = run_extract(pictures, clip_folder, tmp_path / "features", codec=codec, shard_size=7, batch_size=4)
    rows = small.rows()
    decoded, exact = decode(small.read(rows)), decode(features.read(rows))
    assert torch.nn.functional.cosine_similarity(decoded, exact, dim=-1).min() > {"int8": 0.9998, "int4": 0.98}[codec]
    with pa.memory_map(str(small.folder / "shard-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    types = {field.name: str(field.type) for field in table.schema}
    assert types["token_scale"].startswith("extension<arrow.fixed_shape_tensor[value_type=halffloat, shape=[17")
    assert types["channel_scale"] == "extension<arrow.fixed_shape_tensor[value_type=halffloat, shape=[32]]>"
    if codec == "int8":
        assert types["tokens"] == "extension<arrow.fixed_shape_tensor[value_type=int8, shape=[17,32]]>"
        q, t, c = (
            table[name].combine_chunks().to_numpy_ndarray().astype("f4")
            for name in ("tokens", "token_scale", "channel_scale")
        )
        assert np.array_equal(q * t[:, :, None] * c[:, None, :], decoded[:7].numpy())
    with pytest.raises(ArtifactError, match=f"codec was '{codec}' and is now 'float16'; choose another --workspace"):
        run_extract(pictures, clip_folder, small.folder, shard_size=7)
