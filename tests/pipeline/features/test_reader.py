"""The Arrow contract, read with plain pyarrow, and the memory-mapped reader."""

import shutil
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.pipeline.artifacts import described, read_manifest, write_manifest
from qf.pipeline.encoders.views import View
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.arrow_shards import VIEW, ArrowShard, schema, write_arrow_shard
from qf.pipeline.features.codecs import CODECS, columns, encode
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.features.reader import Features
from qf.pipeline.files import sha256_file

from conftest import features_manifest, reseal  # isort: skip


def test_a_shard_is_what_the_contract_says(features):
    shard = features.manifest["shards"][0]
    path = features.folder / shard["file"]
    assert (shard["sha256"], shard["bytes"]) == (sha256_file(path), path.stat().st_size)
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    types = {field.name: str(field.type) for field in table.schema}
    assert types["key"] == types["split"] == types["image"] == "string"
    assert types["captions"].startswith("list<")
    assert types["tokens"] == "extension<arrow.fixed_shape_tensor[value_type=halffloat, shape=[17,32]]>"
    assert types["pooled"] == "extension<arrow.fixed_shape_tensor[value_type=float, shape=[24]]>"
    assert (types["thumbnail"], types["width"], types["height"]) == ("binary", "int32", "int32")
    row = table.slice(1, 1).to_pylist()[0]
    assert (row["key"], row["width"], row["height"]) == ("red-square-1.png", 72, 48)
    assert row["thumbnail"][:2] == b"\xff\xd8"
    assert features.manifest["kind"] == "features"
    assert features.manifest["splits"] == {"train": 12, "val": 12, "test": 0}


rows = st.lists(
    st.tuples(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3), st.binary(max_size=5), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(rows, st.integers(1, 5), st.sampled_from(CODECS), st.booleans(), st.randoms())
def test_what_is_written_is_read(tmp_path_factory, rows, batch, codec, pooled, random):
    """In shards of five rows, in blocks of `batch`: every row, its views, in any order."""
    folder = tmp_path_factory.mktemp("features")
    draw = np.random.default_rng(random.randrange(2**32))
    units = draw.normal(size=(len(rows), 2)).astype(np.float32)
    owners = [n for n, (*_, views) in enumerate(rows) for _ in range(views)]
    encoded, seen = (
        encode(codec, torch.from_numpy(draw.normal(size=(n, 3, 5)).astype(np.float32)))
        for n in (len(rows), len(owners))
    )
    layout, shards = columns(codec, 3, 5), []

    def block(part):
        of_part = [n for n, owner in enumerate(owners) if owner in part]
        return {
            "key": [f"{n}{rows[n][0]}" for n in part],
            "split": ["val"] * len(part),
            "image": ["it"] * len(part),
            "captions": [rows[n][1] for n in part],
            "thumbnail": [rows[n][2] for n in part],
            "width": list(part),
            "height": [7] * len(part),
            "pooled": units[list(part)],
            "views": [[asdict(View(n, v, 8, 9, v == 1)) for v in range(rows[n][3])] for n in part],
            **{name: values[list(part)].numpy() for name, values in encoded.items()},
            **{VIEW + name: values[of_part].numpy() for name, values in seen.items()},
        }

    for number, start in enumerate(range(0, len(rows), 5)):
        path = folder / f"shard-{number:05d}.arrow"
        stop = min(start + 5, len(rows))
        parts = [range(i, min(i + batch, stop)) for i in range(start, stop, batch)]
        with open(path, "wb") as file:
            count = write_arrow_shard(file, schema(layout, 2 if pooled else None, True), map(block, parts))
        shards.append({**described(path), "records": count})
    encoder = {"tokens": 3, "width": 5, "joint": 2 if pooled else None}
    write_manifest(folder, FEATURES, features_manifest(encoder, shards, codec=codec, views=2, records=len(rows)))
    features = Features(folder)
    assert features.keys == [f"{n}{key}" for n, (key, *_) in enumerate(rows)]
    assert features.captions == [captions for _, captions, *_ in rows]
    assert [len(views) for views in features.table.column("views").to_pylist()] == [views for *_, views in rows]
    assert (features.pooled is not None) == pooled
    order = draw.permutation(len(rows))
    views = np.array([draw.integers(0, rows[n][3] + 1) for n in order])
    firsts = np.cumsum([0, *(views for *_, views in rows)])
    read = features.read(order, views)
    assert list(read) == list(encoded)
    for name, values in read.items():
        assert values.dtype == encoded[name].dtype
        for value, n, view in zip(values, order, views, strict=True):
            assert torch.equal(value, seen[name][firsts[n] + view - 1] if view else encoded[name][n])
    for name, values in features.read(np.arange(len(rows))).items():  # neighbours are copied together
        assert torch.equal(values, encoded[name])
    assert len(features.rows("val")) == len(rows)
    assert len(features.rows("train")) == 0
    if pooled:
        assert np.array_equal(features.pooled, units)


def test_a_missing_or_cut_shard_is_named(features, tmp_path):
    copy = shutil.copytree(features.folder, tmp_path / "features")
    shard = copy / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"shard-00001\.arrow has \d+ bytes, not \d+; extract again"):
        Features(copy)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.arrow is missing"):
        Features(copy)


def test_a_compressed_shard_is_refused(features, tmp_path):
    """Nothing of it could be memory-mapped."""
    table = pa.ipc.open_file((features.folder / "shard-00000.arrow").read_bytes()).read_all()
    path = tmp_path / "shard-00000.arrow"
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow is compressed and cannot be memory-mapped"):
        ArrowShard(path, features.columns)


def test_no_changed_bit_of_a_shard_passes_as_features(features, tmp_path):
    """Offsets among them: Arrow itself would follow these out of the file. Every 37th byte, to be quick."""
    path = shutil.copytree(features.folder, tmp_path / "features") / "shard-00000.arrow"
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"shard-00000\.arrow has changed: its SHA-256 is not the manifest's"):
            Features(path.parent)


def test_offsets_that_lead_out_of_a_shard_are_found_even_with_the_right_checksum(features, tmp_path):
    folder = shutil.copytree(features.folder, tmp_path / "features")
    path = folder / "shard-00000.arrow"
    whole = path.read_bytes()
    keys = pa.ipc.open_file(whole).get_batch(0)["key"]
    offsets = whole.index(keys.buffers()[1].to_pybytes()[: 4 * len(keys)])
    path.write_bytes(whole[: offsets + 7] + b"\x7f" + whole[offsets + 8 :])  # the end of the first key
    shards = read_manifest(folder)["shards"]
    reseal(folder / "manifest.json", shards=[shards[0] | described(path), *shards[1:]])
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow is damaged"):
        Features(folder)


@pytest.mark.parametrize("change", [{"tokens": 16}, {"width": 31}, {"joint": None}, {"joint": 23}], ids=str)
def test_shards_of_other_sizes_than_the_manifest_says_are_refused(features, tmp_path, change):
    folder = shutil.copytree(features.folder, tmp_path / "features")
    reseal(folder / "manifest.json", encoder=features.encoder | change)
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow is .*the manifest says"):
        Features(folder)
