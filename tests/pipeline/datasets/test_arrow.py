"""Arrow files as Hugging Face datasets saves them, with pictures inside; damaged anywhere."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.arrow import read_arrow
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError
from qf.pipeline.images import UnreadableImage

PICTURES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, batch=3, new=pa.ipc.new_stream, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, batch)
    return path


def pictures(*numbers, path="{}.jpg"):
    return pa.array([{"bytes": b"picture %d" % n, "path": path and path.format(n)} for n in numbers], PICTURES)


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_pictures_inside_stay_there(tmp_path, new):
    columns = {"image": pictures(*range(8)), "caption": [[f"{n} a", f"{n} b"] for n in range(8)]}
    dataset = read(write(tmp_path / "data-00000-of-00001.arrow", columns, new=new))
    assert (dataset.kind, "pictures inside (image.bytes)" in dataset.found) == ("arrow", True)
    assert [(r.key, r.captions) for r in dataset.records] == [(f"{n}.jpg", (f"{n} a", f"{n} b")) for n in range(8)]
    assert [load(r.source) for r in dataset.records] == [b"picture %d" % n for n in range(8)]


def test_pictures_without_names_missing_pictures_and_paths(tmp_path):
    (tmp_path / "there.jpg").write_bytes(b"file")
    image = [{"bytes": b"inside", "path": None}, {"bytes": None, "path": "there.jpg"}, None]
    columns = {"image": pa.array(image, PICTURES), "text": list("abc")}
    inside, beside, neither = read(write(tmp_path / "d.arrow", columns)).records
    assert (inside.key, load(inside.source)) == ("d.arrow:0", b"inside")
    assert (beside.key, load(beside.source)) == ("there.jpg", tmp_path / "there.jpg")
    assert neither.problem == "row 3 of d.arrow names no image"


def test_several_files_tell_their_splits(tmp_path):
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        columns = {"jpg": pa.array([b"picture %d" % n for n in numbers]), "text": [f"{n}" for n in numbers]}
        write(tmp_path / split / "data-00000-of-00001.arrow", columns, batch=2)
    paths = [tmp_path / split / "data-00000-of-00001.arrow" for split in ("train", "test")]
    found, records = read_arrow(paths, ReadOptions())
    assert [(r.split, load(r.source)) for r in records] == [
        *(("train", b"picture %d" % n) for n in range(4)),
        *(("test", b"picture %d" % n) for n in range(4, 6)),
    ]
    assert "2 files whose names tell the split" in found


def test_pictures_of_one_name_are_told_apart(tmp_path):
    columns = {"image": pictures(1, 1, 2, path="image.jpg"), "caption": list("abc")}
    first, second = read(write(tmp_path / "d.arrow", columns)).records
    assert (first.captions, load(first.source)) == (("a", "b"), b"picture 1")
    assert (second.captions, load(second.source), second.key[:10]) == (("c",), b"picture 2", "image.jpg#")


def test_what_cannot_be_read_is_one_line(tmp_path):
    columns = {"image": pictures(0, 1), "caption": ["a", "b"]}
    with pytest.raises(DatasetError, match="is compressed; .* to_parquet"):
        read(write(tmp_path / "z.arrow", columns, compression="zstd"))
    with pytest.raises(DatasetError, match="was written by qf"):
        read(write(tmp_path / "shard.arrow", {"key": ["a"], "captions": [["b"]], "tokens": [[1]]}))
    (tmp_path / "no.arrow").write_bytes(b"ARROW1 nothing")
    with pytest.raises(DatasetError, match="cannot be read as Arrow: it is damaged"):
        read(tmp_path / "no.arrow")


@given(st.data())
def test_damage_is_a_reject_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("arrow") / "d.arrow"
    new = data.draw(st.sampled_from([pa.ipc.new_stream, pa.ipc.new_file]))
    columns = {"image": pictures(*range(5)), "caption": [["a"], ["b", "c"], [], ["d"], ["e"]]}
    content = bytearray(write(path, columns, new=new).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        for record in read(path).records:
            if not record.problem:
                load(record.source)
    except (DatasetError, UnreadableImage):
        return
