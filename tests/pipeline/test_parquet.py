"""Parquet tables with pictures inside, as Hugging Face datasets lie on disk."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from qf.pipeline.datasets import read
from qf.pipeline.errors import DatasetError
from qf.pipeline.records import ReadOptions
from qf.pipeline.sources import ParquetCell, load


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
