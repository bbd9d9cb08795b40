"""Parquet tables with pictures inside, as Hugging Face datasets lie on disk."""

import contextlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import ParquetCell, load
from qf.pipeline.errors import DatasetError

from conftest import counted_parquet  # isort: skip


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def pictures(*numbers, path="{}.jpg"):
    return [{"bytes": b"picture %d" % n, "path": path and path.format(n)} for n in numbers]


def test_shards_of_a_hugging_face_dataset(tmp_path):
    for name, numbers in {
        "train-00000-of-00002": [0, 1, 2],
        "train-00001-of-00002": [3, 4],
        "validation-00000-of-00001": [5],
    }.items():
        columns = {"image": pictures(*numbers), "caption": [[f"{n} a", f"{n} b"] for n in numbers]}
        write(tmp_path / "data" / f"{name}.parquet", columns, row_group_size=2)
    (tmp_path / "README.md").write_text("---\n---\n")
    for source in (tmp_path, tmp_path / "data"):
        dataset = read(source)
        assert [r.key for r in dataset.records] == [f"{n}.jpg" for n in range(6)]
        assert dataset.records.splits == {"train": 5, "val": 1, "test": 0}
        assert [load(r.source) for r in dataset.records] == [b"picture %d" % n for n in range(6)]
        assert dataset.records[2].captions == ("2 a", "2 b")
    assert (dataset.kind, dataset.found) == (
        "parquet",
        "image column 'image', caption column 'caption', no split column, pictures inside (image.bytes), "
        "3 files whose names tell the split",
    )
    lone = read(tmp_path / "data" / "train-{00000..00001}-of-00002.parquet", ReadOptions(val_fraction=1))
    assert lone.records.splits == {"train": 0, "val": 5, "test": 0}


def test_rows_of_one_picture_and_pictures_of_one_name(tmp_path):
    """A repeated name is one image where the bytes are equal, else its key tells them apart."""
    columns = {"image": pictures(1, 1, 2) + pictures(3, 4, path="image.jpg"), "caption": list("abcde")}
    first, second, third, fourth = read(write(tmp_path / "d.parquet", columns, row_group_size=2)).records
    assert (first.key, first.captions, second.key) == ("1.jpg", ("a", "b"), "2.jpg")
    assert (third.image, third.key[:10], load(third.source)) == ("image.jpg", "image.jpg#", b"picture 3")
    assert (load(fourth.source), fourth.key != third.key) == (b"picture 4", True)


def test_pictures_without_names_missing_pictures_and_paths(tmp_path):
    (tmp_path / "there.jpg").write_bytes(b"file")
    image = [*pictures(0, path=None), {"bytes": None, "path": "there.jpg"}, None, {"bytes": b"", "path": None}]
    records = list(read(write(tmp_path / "d.parquet", {"image": image, "text": list("abcd")})).records)
    assert [r.key for r in records] == ["d.parquet:0", "there.jpg", "row 3", "row 4"]
    assert (load(records[0].source), load(records[1].source)) == (b"picture 0", tmp_path / "there.jpg")
    assert records[2].problem == "row 3 of d.parquet names no image"


def test_other_columns(tmp_path):
    """img2dataset's Parquet output; numbered captions; objects as captions; texts of other Arrow types."""
    columns = {"jpg": [b"x", b"y"], "caption": ["p", "q"], "key": ["k1", "k2"], "url": ["https://a", "https://b"]}
    dataset = read(write(tmp_path / "a.parquet", columns))
    assert [(r.key, load(r.source)) for r in dataset.records] == [("k1", b"x"), ("k2", b"y")]
    columns = {"image": ["a.jpg"], "caption_0": ["p"], "caption_1": ["q"], "caption_2": [None]}
    dataset = read(write(tmp_path / "b.parquet", columns))
    assert (dataset.records[0].captions, "caption columns 'caption_0', 'caption_1'" in dataset.found) == (
        ("p", "q"),
        True,
    )
    columns = {"image": ["a.jpg"], "sentences": [[{"raw": "p", "sentid": 1}, {"raw": "q", "sentid": 2}]]}
    assert read(write(tmp_path / "c.parquet", columns)).records[0].captions == ("p", "q")
    columns = {"image": pa.array(["a", "a"]).dictionary_encode(), "text": pa.array(["p", "q"], pa.large_string())}
    assert read(write(tmp_path / "d.parquet", columns)).records[0].captions == ("p", "q")


def test_files_of_two_tables(tmp_path):
    write(tmp_path / "a.parquet", {"image": ["a"], "text": ["b"]})
    write(tmp_path / "b.parquet", {"image": ["a"], "label": ["b"]})
    with pytest.raises(DatasetError, match=r"b\.parquet has no column 'text', which the files beside it have"):
        read(tmp_path)


def test_only_texts_are_read(tmp_path):
    """60 MB of pictures: listing them takes none of it."""
    image = [{"bytes": bytes([n]) * 1_000_000, "path": f"{n}.jpg"} for n in range(60)]
    path = write(tmp_path / "d.parquet", {"image": image, "text": ["x"] * 60}, row_group_size=10, compression="none")
    del image
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        dataset = read(path)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 5_000_000
    assert dataset.records[59].source == ParquetCell(str(path), "image.bytes", 5, 9)


def test_splits_in_folders_and_in_the_name_of_a_lone_file(tmp_path):
    """Hugging Face's converted Parquet; where the pictures have no names, the files' paths tell them apart."""
    for number, split in enumerate(("train", "validation", "test")):
        columns = {"image": pictures(2 * number, 2 * number + 1, path=None), "caption": ["a", "b"]}
        write(tmp_path / "pq" / split / "0000.parquet", columns)
    with pytest.MonkeyPatch.context() as patch:
        _, begun = counted_parquet(patch)
        dataset = read(tmp_path / "pq" / "{train,validation,test}" / "0000.parquet")
        assert begun == []  # no picture is read
    assert dataset.records.splits == {"train": 2, "val": 2, "test": 2}
    assert dataset.found.endswith("3 files whose names tell the split")
    keys = [f"{split}/0000.parquet:{row}" for split in ("train", "validation", "test") for row in (0, 1)]
    assert [r.key for r in dataset.records] == keys
    assert [load(r.source) for r in dataset.records] == [b"picture %d" % n for n in range(6)]
    folder = read(tmp_path / "pq")
    assert {r.key: r.split for r in folder.records} == {r.key: r.split for r in dataset.records}
    columns = {"image": pictures(1), "caption": ["a"]}
    alone = read(write(tmp_path / "train" / "test-00000-of-00001.parquet", columns))
    assert alone.records.splits == {"train": 0, "val": 0, "test": 1}
    assert alone.found.endswith(", the file's name tells the split")
    assert read(write(tmp_path / "test" / "d.parquet", columns)).records.splits["test"] == 0
    told = read(write(tmp_path / "test.parquet", columns | {"split": ["train"]}), ReadOptions(val_fraction=0))
    assert told.records.splits == {"train": 1, "val": 0, "test": 0}


@given(st.sets(st.sampled_from([f"{a}{b}/{c}" for a in "xy" for b in ("", "/z", "/z/x") for c in "01"]), min_size=1))
def test_pictures_without_names_have_the_paths_of_their_files(tmp_path_factory, names):
    top = tmp_path_factory.mktemp("many")
    for name in names:
        write(top / f"{name}.parquet", {"image": [b"same", b"same"], "caption": ["a", "b"]})
    paths = sorted(names)
    pattern = f"{{{','.join(paths)}}}" if len(paths) > 1 else paths[0]
    with pytest.MonkeyPatch.context() as patch:
        _, begun = counted_parquet(patch)
        keys = [r.key for r in read(top / f"{pattern}.parquet").records]
        assert begun == []
    assert len(set(keys)) == 2 * len(names)
    start = {
        path.removesuffix(key)
        for path, key in zip([f"{p}.parquet:{n}" for p in paths for n in (0, 1)], keys, strict=True)
    }
    assert len(start) == 1  # keys are the paths from one folder on


BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(9), pa.dictionary(pa.int32(), pa.binary())]


@pytest.mark.parametrize("kind", BYTES, ids=str)
@pytest.mark.parametrize("statistics", [True, False])
def test_pictures_in_every_kind_of_bytes(tmp_path, kind, statistics):
    values = [b"picture 0", None, b"picture 2", b"picture 2"]
    cells = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    names = pa.array(["a", "b", "c", "c"])
    for number, (column, expected) in enumerate(
        [
            (cells, {"0.parquet:0": b"picture 0", "0.parquet:2": b"picture 2", "0.parquet:3": b"picture 2"}),
            (pa.StructArray.from_arrays([cells, names], ["bytes", "path"]), {"a": b"picture 0", "c": b"picture 2"}),
            (pa.StructArray.from_arrays([names, cells], ["path", "bytes"]), {"a": b"picture 0", "c": b"picture 2"}),
        ]
    ):
        columns = {"image": column, "caption": list("pqrs")}
        sizes = {} if pa.types.is_binary_view(kind) else {"row_group_size": 3}  # Arrow cannot slice views to write them
        path = write(tmp_path / f"{number}.parquet", columns, write_statistics=statistics, **sizes)
        found = {r.key: load(r.source) for r in read(path).records if isinstance(r.source, ParquetCell)}
        assert found == expected


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(pa.uint8()), [1, 2]), (pa.large_list(pa.int8()), [1, 2]), (pa.list_(pa.string()), ["a.jpg"]),
        (pa.struct({"bytes": pa.list_(pa.uint8()), "path": pa.string()}), {"bytes": [1], "path": "a"}),
        (pa.struct({"width": pa.int32()}), {"width": 1}), (pa.map_(pa.string(), pa.binary()), [("a", b"b")]),
    ],
    ids=str,
)  # fmt: skip
def test_columns_that_hold_neither_pictures_nor_paths(tmp_path, kind, value):
    path = write(tmp_path / "d.parquet", {"picture": pa.array([value, None], kind), "caption": ["a", "b"]})
    with pytest.raises(
        DatasetError, match=r"d\.parquet: column 'picture' is (list|large_list|struct|map)<.*; qf reads"
    ):
        read(path)


def test_pictures_in_one_file_and_paths_in_the_other(tmp_path):
    write(tmp_path / "a.parquet", {"image": pictures(1), "text": ["b"]})
    write(tmp_path / "b.parquet", {"image": ["a.jpg"], "text": ["b"]})
    with pytest.raises(DatasetError, match=r"b\.parquet: column 'image' is string, unlike that of the files beside it"):
        read(tmp_path)
    write(tmp_path / "b.parquet", {"image": [{"bytes": None, "path": "b.jpg"}], "text": ["b"]})  # bytes: null
    assert [r.key for r in read(tmp_path).records] == ["1.jpg", "b.jpg"]


def test_damaged_metadata_is_an_error_that_ends_no_process(tmp_path):
    """Arrow aborts on some metadata where no Python code can catch it."""
    draw = random.Random(0)
    whole = write(tmp_path / "d.parquet", {"image": pictures(0, 1), "caption": ["a", "b"]}).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(footer, len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / "d.parquet").write_bytes(content)
        with contextlib.suppress(DatasetError):
            read(tmp_path / "d.parquet")
