"""Where bytes are: nothing outside what was named is read, and what fails is a reason."""

import os
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import FileSlice, ImageFile, ParquetCell, fetch, leads_out, load
from qf.pipeline.images import MAX_BYTES, UnreadableImage

from conftest import counted_parquet  # isort: skip


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
def test_a_confined_name_or_link_reads_nothing_outside_the_folder(folder, name):
    with pytest.raises(
        UnreadableImage, match=r"lies outside .*named, in .*; leave out --confine, or give --images DIR"
    ):
        load(ImageFile(str(folder), name, "links"))


@pytest.mark.parametrize(
    ("name", "data"), [("../secret.jpg", b"secret"), ("link.jpg", b"secret"), ("../named-too/b.jpg", b"b")]
)
def test_names_and_links_lead_out_of_the_folder_unless_confined(folder, name, data):
    for path in (name, str(folder / name)):
        source = ImageFile(str(folder), path)
        assert load(source).read_bytes() == data
        assert leads_out(source)
    for path in ("a.jpg", "inside.jpg", "./a.jpg", str(folder / "a.jpg"), "none.jpg", "a\0b"):
        assert not leads_out(ImageFile(str(folder), path))


def test_bound_names_may_follow_links_and_nothing_else_out_of_the_folder(folder):
    assert load(ImageFile(str(folder), "link.jpg", "names")).read_bytes() == b"secret"
    assert load(ImageFile(str(folder), str(folder / "a.jpg"), "names")) == folder / "a.jpg"
    for name in ("../secret.jpg", "/etc/passwd", "../named-too/b.jpg", "way/../../secret.jpg", ".."):
        with pytest.raises(UnreadableImage, match="its name leads out of|no such file"):
            load(ImageFile(str(folder), name, "names"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jpg", "no such file"), ("", "not a regular file"), (".", "not a regular file"), ("pipe.jpg", "not a regular file"),
        ("loop.jpg", "cannot be read: Too many levels"), ("a\0b.jpg", "no file"), ("n" * 300, "too long"),
        ("a.jpg/b", "cannot be read: Not a directory"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_a_reason(folder, name, reason):
    with pytest.raises(UnreadableImage, match=reason):
        load(ImageFile(str(folder), name))


def test_a_table_may_name_paths_anywhere_and_how_many_lead_out_is_said(folder, tmp_path):
    table = tmp_path / "elsewhere" / "d.csv"
    table.parent.mkdir()
    table.write_text(f"image,caption\n{folder / 'a.jpg'},x\n../named/a.jpg,y\nb.jpg,z\n")
    dataset = read(table)
    assert [load(record.source) for record in dataset.records[:2]] == [folder / "a.jpg", folder / "a.jpg"]
    assert "2 images outside the folder of the dataset" in dataset.found
    confined = read(table, ReadOptions(confine=True))
    assert "outside" not in confined.found
    with pytest.raises(UnreadableImage, match="lies outside"):
        load(confined.records[0].source)
    inside = read(table, ReadOptions(images=folder, confine=True))
    assert load(inside.records[0].source) == folder / "a.jpg"


def test_slices(tmp_path):
    (tmp_path / "t").write_bytes(b"0123456789")
    assert load(FileSlice(str(tmp_path / "t"), 3, 4)) == b"3456"
    for source, reason in [
        (FileSlice(str(tmp_path / "t"), 8, 4), "is truncated or has changed"),
        (FileSlice(str(tmp_path / "t"), 0, MAX_BYTES + 1), "the limit is"),
        (FileSlice(str(tmp_path / "u"), 0, 1), "no such file"),
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


@given(
    st.lists(st.lists(st.none() | st.binary(max_size=9), min_size=1, max_size=200), min_size=1, max_size=9),
    st.randoms(),
)
def test_cells_in_any_order_and_each_row_once_in_theirs(tmp_path_factory, groups, random):
    """Whatever the row groups: in the order of rows a file is opened once, and a row group read once from its start."""
    file = tmp_path_factory.mktemp("cells") / "d.parquet"
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    with pq.ParquetWriter(file, schema) as writer:
        for group in groups:
            rows = [{"bytes": data, "path": None} for data in group]
            writer.write_table(pa.table({"image": rows}, schema=schema))
    cells = {
        ParquetCell(str(file), "image.bytes", number, row): data or b""
        for number, group in enumerate(groups)
        for row, data in enumerate(group)
    }
    some = [cell for cell in cells if random.random() < 0.7]
    with pytest.MonkeyPatch.context() as patch:
        opened, begun = counted_parquet(patch)
        assert [load(fetch(cell)) for cell in some] == [cells[cell] for cell in some]
        assert len(opened) <= 1
        assert begun == sorted({cell.group for cell in some})
    random.shuffle(some)
    assert [load(cell) for cell in some] == [cells[cell] for cell in some]


def test_a_damaged_row_group_is_read_once(parquet, monkeypatch):
    """What lies before the damage is there; what follows it is lost for one reason, and the next row group is whole."""
    file, expected = parquet
    part = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[part.data_page_offset : part.data_page_offset + 40] = bytes(40)
    file.write_bytes(data)
    _, begun = counted_parquet(monkeypatch)
    reasons = set()
    for n in range(1500):
        cell = fetch(ParquetCell(str(file), "image.bytes", n // 500, n % 500))
        if 500 <= n < 1000:
            with pytest.raises(UnreadableImage) as error:
                load(cell)
            reasons.add(str(error.value))
        else:
            assert load(cell) == expected[n]
    assert begun == [0, 1, 2]
    assert len(reasons) == 1
    assert reasons.pop().startswith("cannot be read: ")


def test_a_file_written_anew_is_read_anew(tmp_path):
    for data in (b"old", b"new"):
        pq.write_table(pa.table({"jpg": [data] * 5}), tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "d.parquet")
        assert load(ParquetCell(str(tmp_path / "d.parquet"), "jpg", 0, 2)) == data


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
    assert peak < 50 * 2**20
