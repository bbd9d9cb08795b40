"""Where bytes are: nothing outside what was named is read, and what fails is a reason."""

import os
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from qf.pipeline import sources
from qf.pipeline.datasets import read
from qf.pipeline.images import MAX_BYTES, UnreadableImage
from qf.pipeline.records import ReadOptions
from qf.pipeline.sources import ImageFile, ParquetCell, TarSlice, load


@pytest.fixture
def folder(tmp_path):
    """A dataset's folder with a secret beside it, and every way out that a dataset could try."""
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "named-too").mkdir()
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "a.jpg").write_bytes(b"a")
    (tmp_path / "named" / "inside.jpg").symlink_to("a.jpg")
    (tmp_path / "named" / "link.jpg").symlink_to("../secret.jpg")
    (tmp_path / "named" / "way").symlink_to("..")
    (tmp_path / "named" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "named-too" / "b.jpg").write_bytes(b"b")
    os.mkfifo(tmp_path / "named" / "pipe.jpg")
    return tmp_path / "named"


def test_links_inside_are_followed(folder):
    for name in ("a.jpg", "inside.jpg", "way/named/a.jpg", "./a.jpg", str(folder / "a.jpg")):
        assert load(ImageFile(str(folder), name)) == folder / "a.jpg"


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "link.jpg", "way/secret.jpg", "/etc/passwd", "../named-too/b.jpg", ".."]
)
def test_nothing_outside_the_folder_is_read(folder, name):
    with pytest.raises(UnreadableImage, match=r"lies outside .*named, in .*; give --images DIR that holds it"):
        load(ImageFile(str(folder), name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jpg", "no such file"), ("", "no regular file"), (".", "no regular file"), ("pipe.jpg", "no regular file"),
        ("loop.jpg", "cannot be read: Too many levels"), ("a\0b.jpg", "null"), ("n" * 300, "too long"),
        ("a.jpg/b", "cannot be read: Not a directory"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_a_reason(folder, name, reason):
    with pytest.raises(UnreadableImage, match=reason):
        load(ImageFile(str(folder), name))


def test_a_table_may_name_absolute_paths_in_the_folder_that_images_names(folder, tmp_path):
    table = tmp_path / "elsewhere" / "d.csv"
    table.parent.mkdir()
    table.write_text(f"image,caption\n{folder / 'a.jpg'},x\n")
    with pytest.raises(UnreadableImage, match="give --images DIR"):
        load(read(table).records[0].source)
    assert load(read(table, ReadOptions(images=folder)).records[0].source) == folder / "a.jpg"


def test_slices(tmp_path):
    (tmp_path / "t").write_bytes(b"0123456789")
    assert load(TarSlice(str(tmp_path / "t"), 3, 4)) == b"3456"
    for source, reason in [
        (TarSlice(str(tmp_path / "t"), 8, 4), "cut short or changed"),
        (TarSlice(str(tmp_path / "t"), 0, MAX_BYTES + 1), "the limit is"),
        (TarSlice(str(tmp_path / "u"), 0, 1), "no such file"),
        (None, "no image"),
    ]:
        with pytest.raises(UnreadableImage, match=reason):
            load(source)


@pytest.fixture
def parquet(tmp_path):
    """Three row groups of 500 pictures; some are missing."""
    rows = [{"bytes": None if n % 7 == 3 else b"picture %d" % n, "path": f"{n}.jpg"} for n in range(1500)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "d.parquet", row_group_size=500)
    return tmp_path / "d.parquet", [row["bytes"] or b"" for row in rows]


@pytest.mark.parametrize("threads", [1, 4])
def test_cells_in_order_and_backwards(parquet, threads):
    file, expected = parquet
    cells = [ParquetCell(str(file), "image.bytes", n // 500, n % 500) for n in range(1500)]
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(load, cells)) == expected
        assert list(pool.map(load, cells[499:1300:100][::-1])) == expected[499:1300:100][::-1]
    assert len(sources._CELLS._groups) <= sources.OPEN_GROUPS


def test_cells_that_are_not_there(parquet):
    file, _ = parquet
    with pytest.raises(UnreadableImage, match="has changed"):
        load(ParquetCell(str(file), "image.bytes", 0, 500))
    for cell in (ParquetCell(str(file), "image.bytes", 9, 0), ParquetCell(str(file), "other", 0, 0)):
        with pytest.raises(UnreadableImage):
            load(cell)
    data = bytearray(file.read_bytes())
    data[100:4000] = bytes(3900)
    file.with_name("e.parquet").write_bytes(data)
    with pytest.raises(UnreadableImage):
        load(ParquetCell(str(file.with_name("e.parquet")), "image.bytes", 0, 0))
    with pytest.raises(UnreadableImage, match="no such file"):
        load(ParquetCell(str(file.with_name("f.parquet")), "image.bytes", 0, 0))


def test_a_large_row_group_takes_little_memory(tmp_path):
    """200 MB of pictures in one row group, as careless writers make them."""
    pictures = [os.urandom(200_000) for _ in range(100)] * 10
    pl.DataFrame({"jpg": pictures}).write_parquet(
        tmp_path / "d.parquet", row_group_size=10_000, compression="uncompressed", data_page_size=2**20
    )
    before = pa.total_allocated_bytes()
    peak = 0
    for row in range(0, 1000, 10):
        assert load(ParquetCell(str(tmp_path / "d.parquet"), "jpg", 0, row)) == pictures[row]
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 100 * 2**20
    sources._CELLS._groups.clear()
