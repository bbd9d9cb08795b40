"""Tars against the Arrow twin, the real webdataset library, plain tarfile and NumPy; and tars that are not ours."""

import io
import json
import tarfile
import warnings
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qf.pipeline.artifacts import described, write_manifest
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.arrow_shards import schema, write_arrow_shard
from qf.pipeline.features.codecs import CODECS, columns, encode
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.features.reader import Features
from qf.pipeline.features.tar_shards import MAX_NAME, TarShard, key_problem, member_name, write_tar_shard

from conftest import features_manifest  # isort: skip

TOKENS, WIDTH, JOINT = 3, 5, 2


class Stream(io.RawIOBase):
    """Takes bytes one after the other and nothing else, as a file does that is hashed while it is written."""

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115

    def writable(self):
        return True

    def write(self, data):
        return self.file.write(data)

    def close(self):
        self.file.close()
        super().close()


def make_block(rows, codec, pooled, seed):
    """Rows of (key, captions, thumbnail, views) as one block, all with random features."""
    draw = np.random.default_rng(seed)
    keys = [key for key, *_ in rows]
    views = [
        [{"left": n, "top": 0, "right": 9 + n, "bottom": 7, "flip": bool(n % 2)} for n in range(k)] for *_, k in rows
    ]

    def encoded(count):
        embeds = torch.from_numpy(draw.normal(size=(count, TOKENS, WIDTH)).astype(np.float32))
        if count == 0:
            return {n: np.empty((0, *shape), str(d)[6:]) for n, (d, shape) in columns(codec, TOKENS, WIDTH).items()}
        return {name: column.numpy() for name, column in encode(codec, embeds).items()}

    block = {
        "key": keys,
        "split": ["val"] * len(rows),
        "image": [f"{key}.png" for key in keys],
        "captions": [captions for _, captions, *_ in rows],
        **encoded(len(rows)),
        "thumbnail": [thumbnail for _, _, thumbnail, _ in rows],
        "width": list(range(len(rows))),
        "height": np.full(len(rows), 7, np.int32),
        "views": views,
        **{f"view_{name}": column for name, column in encoded(sum(map(len, views))).items()},
    }
    if pooled:
        block["pooled"] = draw.normal(size=(len(rows), JOINT)).astype(np.float32)
    return block


def cut(block, sizes):
    """The same rows as several blocks."""
    first = view = 0
    for size in sizes:
        last = first + size
        views = sum(map(len, block["views"][first:last]))
        yield {
            name: values[view : view + views] if name.startswith("view_") else values[first:last]
            for name, values in block.items()
        }
        first, view = last, view + views


def open_features(folder, shards, records, codec, pooled, views=3):
    encoder = {"tokens": TOKENS, "width": WIDTH, "joint": JOINT if pooled else None}
    shards = [{**described(shard), "records": count} for shard, count in zip(shards, records, strict=True)]
    write_manifest(folder, FEATURES, features_manifest(encoder, shards, codec=codec, format="webdataset", views=views))
    return Features(folder)


def write_tar(path, blocks):
    with Stream(path) as file:
        return write_tar_shard(file, blocks)


def webdataset_samples(shards):
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves its files open
        return list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode())


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
keys = st.one_of(st.text("a._/% é-\n", max_size=6), texts, st.text("ab/", min_size=90, max_size=120))
rows = st.lists(
    st.tuples(keys, st.lists(texts, max_size=3), st.binary(max_size=600), st.integers(0, 3)),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)
odd = ["", ".", "..", "/", "//", "a//b", "/a/../b.c/", "%", "%2E", "__a__", "__a__/b", "a b\n", "ü/雪.jpg", "x" * 300]
ODD = [(key, ["one\ntwo"], b"\xff\xd8", n % 4) for n, key in enumerate(odd)]


@settings(deadline=None, max_examples=40)
@given(rows, st.sampled_from(CODECS), st.booleans(), st.integers(0, 2**32 - 1))
@example(ODD, "float16", True, 0)
def test_both_formats_hold_the_same_and_webdataset_reads_it(tmp_path_factory, rows, codec, pooled, seed):
    block = make_block(rows, codec, pooled, seed)
    folders = [tmp_path_factory.mktemp(name) for name in ("arrow", "tar")]
    half = len(rows) // 2
    halves = list(cut(block, [half, len(rows) - half])) if half else [block]
    arrow_schema = schema(columns(codec, TOKENS, WIDTH), JOINT if pooled else None, views=True)
    shards = [[], []]
    for number, part in enumerate(halves):
        shards[0].append(folders[0] / f"shard-{number:05d}.arrow")
        with open(shards[0][-1], "wb") as file:
            write_arrow_shard(file, arrow_schema, [part])
        shards[1].append(folders[1] / f"shard-{number:05d}.tar")
        assert write_tar(shards[1][-1], [part]) == len(part["key"])
    records = [len(part["key"]) for part in halves]
    arrow, tar = (open_features(f, s, records, codec, pooled) for f, s in zip(folders, shards, strict=True))

    assert tar.table.schema == arrow.table.schema
    assert tar.table.to_pylist() == arrow.table.to_pylist()
    assert tar.keys == [key for key, *_ in rows]
    assert (tar.pooled is None) == (not pooled)
    if pooled:
        assert np.array_equal(tar.pooled, arrow.pooled)
    order = np.random.default_rng(seed).permutation(len(rows))
    picked = np.array([seed % (rows[row][3] + 1) for row in order])
    for views in (None, picked):
        read, expected = tar.read(order, views), arrow.read(order, views)
        assert list(read) == list(expected)
        for name, values in read.items():
            assert values.dtype == expected[name].dtype
            assert torch.equal(values, expected[name])

    first_view = 0
    samples = webdataset_samples(shards[1])
    assert len(samples) == len(rows)
    for row, sample in enumerate(samples):
        key, captions, thumbnail, views = rows[row]
        assert unquote(sample["__key__"]) in (key, "%")
        about = {"key": key, "split": "val", "image": f"{key}.png", "captions": captions, "width": row, "height": 7}
        assert sample["json"] == (about | {"views": block["views"][row]} if views else about)
        assert sample["jpg"] == thumbnail
        arrays = {name.removesuffix(".npy"): value for name, value in sample.items() if name.endswith(".npy")}
        expected = {name: block[name][row] for name in [*columns(codec, TOKENS, WIDTH), *["pooled"] * pooled]}
        if views:
            last_view = first_view + views
            expected |= {n: values[first_view:last_view] for n, values in block.items() if n.startswith("view_")}
            first_view = last_view
        assert arrays.keys() == expected.keys()
        for name, value in arrays.items():
            assert value.dtype == expected[name].dtype
            assert np.array_equal(value, expected[name])


@given(st.sets(keys, max_size=20))
@example(set(odd))
def test_names_of_members_are_paths_and_lead_back(keys):
    names = {member_name(key): key for key in keys}
    assert len(names) == len(keys)
    for name, key in names.items():
        assert unquote(name) == (key or "%")
        assert "." not in name
        assert all(name.split("/"))
        assert name.isascii()
        assert name.isprintable()


def test_a_key_that_no_header_takes_has_a_problem(tmp_path):
    assert not key_problem("a" * MAX_NAME)
    assert key_problem("é" * (MAX_NAME // 6 + 1)).startswith("its key takes 1,047,55")
    with Stream(tmp_path / "s.tar") as file:
        write_tar_shard(file, [make_block([("a" * MAX_NAME, ["x"], b"y", 0)], "int8", True, 0)])
    assert len(TarShard(tmp_path / "s.tar", columns("int8", TOKENS, WIDTH)).table) == 1


def test_bytes_depend_on_the_rows_alone(tmp_path):
    block = make_block(ODD, "int8", True, 1)
    write_tar(tmp_path / "a.tar", [block])
    write_tar(tmp_path / "b.tar", cut(block, [1, 4, 0, len(ODD) - 5]))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name.partition(".")[2] for m in members[:6]] == [
        *("json", "jpg", "pooled.npy", "tokens.npy", "token_scale.npy", "channel_scale.npy")
    ]
    assert [m.name.partition(".")[2] for m in members[12:15]] == [
        f"view_{m}" for m in [*("tokens.npy", "token_scale.npy", "channel_scale.npy")]
    ]


def test_a_cut_tar_is_damaged_wherever_it_was_cut(tmp_path):
    path = tmp_path / "shard-00000.tar"
    write_tar(path, [make_block(ODD[:2], "float16", True, 1)])
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1024, 256):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"shard-00000\.tar is damaged \(.*; extract again with --overwrite$"):
            TarShard(path, columns("float16", TOKENS, WIDTH))
    with pytest.raises(ArtifactError, match=r"shard-00000\.tar is damaged \(.*; extract again with --overwrite$"):
        TarShard(tmp_path / "shard-00000.tar", columns("int8", TOKENS, WIDTH))


ABOUT = {"key": "a", "split": "val", "image": "a", "captions": [], "width": 1, "height": 1}
FOREIGN = {
    "no tar": b"no tar at all" * 100,
    "img2dataset's": [("a.jpg", b"x"), ("a.txt", b"y"), ("a.json", b"{}")],
    "a folder": [("a/b.png", b"x")],
    "no object": [("a.json", b"[]"), ("a.jpg", b"x")],
    "no JSON": [("a.json", b"{"), ("a.jpg", b"x")],
    "another member": [("a.json", json.dumps(ABOUT).encode()), ("a.jpg", b"x"), ("a.tokens.npy", b""), ("a.txt", b"")],
    "no array": [("a.json", json.dumps(ABOUT).encode()), ("a.jpg", b"x"), ("a.tokens.npy", bytes(128 + 30))],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_tar_is_damaged(tmp_path, what):
    path = tmp_path / "shard-00000.tar"
    if isinstance(FOREIGN[what], bytes):
        path.write_bytes(FOREIGN[what])
    else:
        with tarfile.open(path, "w") as tar:
            for name, data in FOREIGN[what]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ArtifactError, match=r"shard-00000\.tar is damaged \(.*; extract again with --overwrite$"):
        TarShard(path, columns("float16", TOKENS, WIDTH))
