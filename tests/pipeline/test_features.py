"""The Arrow contract, read with plain pyarrow, and the memory-mapped reader."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.pipeline.artifacts import sha256_file, write_manifest
from qf.pipeline.codecs import CODECS, encode
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features import Features, Row, schema, write_shard


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
    st.tuples(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3), st.binary(max_size=5)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(rows, st.integers(1, 5), st.sampled_from(CODECS), st.booleans(), st.randoms())
def test_what_is_written_is_read(tmp_path_factory, rows, batch, codec, pooled, random):
    folder = tmp_path_factory.mktemp("features")
    draw = np.random.default_rng(random.randrange(2**32))
    unit = draw.normal(size=2).astype(np.float32) if pooled else None
    embeds = torch.from_numpy(draw.normal(size=(len(rows), 3, 5)).astype(np.float32))
    encoded = encode(codec, embeds, [key for key, *_ in rows])
    made = [
        Row(f"{n}{key}", "val", key, captions, {c: a[n].numpy() for c, a in encoded.items()}, unit, thumbnail, n, 7)
        for n, (key, captions, thumbnail) in enumerate(rows)
    ]
    columns = schema(3, 5, 2 if pooled else None, codec)
    shards = []
    for number, start in enumerate(range(0, len(made), 5)):
        name = f"shard-{number:05d}.arrow"
        part = made[start : start + 5]
        count = write_shard(folder / name, columns, (part[i : i + batch] for i in range(0, len(part), batch)))
        shards.append({"file": name, "records": count, "bytes": (folder / name).stat().st_size, "sha256": ""})
    write_manifest(folder, "features", {"encoder": {"tokens": 3, "width": 5}, "codec": codec, "shards": shards})
    features = Features(folder)
    assert features.keys == [row.key for row in made]
    assert features.captions == [list(row.captions) for row in made]
    order = draw.permutation(len(made))
    read = features.encoded(order)
    assert list(read) == list(encoded)
    for name, values in read.items():
        assert values.dtype == encoded[name].dtype
        assert torch.equal(values, encoded[name][torch.from_numpy(order)])
    assert len(features.rows("val")) == len(made)
    assert len(features.rows("train")) == 0
    if pooled:
        assert np.array_equal(features.pooled, np.stack([row.pooled for row in made]))
    else:
        assert features.pooled is None


def test_a_missing_or_cut_shard_is_named(features, tmp_path):
    import shutil

    copy = shutil.copytree(features.folder, tmp_path / "features")
    shard = copy / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"shard-00001\.arrow is missing or damaged"):
        Features(copy)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.arrow is missing or damaged"):
        Features(copy)
