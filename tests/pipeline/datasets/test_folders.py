"""Folders of images with texts beside them, and with metadata."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError
from qf.pipeline.images import UnreadableImage

from conftest import write_files  # isort: skip

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_sidecars(tmp_path):
    write_files(
        tmp_path,
        {
            "train/b.JPG": "B", "train/b.txt": "one\n\n two \n", "val/a.png": "A", "val/a.json": '{"caption": "x\\ny"}',
            "val/a.txt": "other", "val/notes.md": "", "c.webp": "C", ".hidden.jpg": "", "d.jpg": "D", "d.txt": b"\xff",
            "e.jpg": "E", "e.json": '["p", "q"]', "f.jpg": "F", "f.json": "{", "g.jpg": "G", "g.json": "{}", "g.txt": "g",
        },
    )  # fmt: skip
    dataset = read(tmp_path, ReadOptions(val_fraction=0))
    found = "images with a .txt or .json beside each; not read: 1 hidden file (.hidden.jpg)"
    assert (dataset.kind, dataset.found) == ("sidecars", found)
    records = {r.key: r for r in dataset.records}
    assert list(records) == ["c.webp", "d.jpg", "e.jpg", "f.jpg", "g.jpg", "train/b.JPG", "val/a.png"]
    assert records["train/b.JPG"].captions == ("one", "two")
    assert records["val/a.png"].captions == ("x\ny",)
    assert (records["e.jpg"].captions, records["g.jpg"].captions) == (("p", "q"), ("g",))
    assert (records["val/a.png"].split, records["e.jpg"].split) == ("val", "train")
    assert load(records["train/b.JPG"].source) == tmp_path / "train" / "b.JPG"
    assert records["c.webp"].problem == "no caption"
    assert all("the text beside it cannot be read" in records[key].problem for key in ("d.jpg", "f.jpg"))


def test_a_sidecar_may_name_the_split(tmp_path):
    write_files(
        tmp_path,
        {
            "a.jpg": "A", "a.json": '{"caption": "x", "alt": "y", "split": "Test", "part": "val"}',
            "train/b.jpg": "B", "train/b.json": '{"caption": "x", "alt": ["y", "z"], "split": "val"}',
            "val/c.jpg": "C", "val/c.json": '{"caption": "x", "alt": "y", "split": 3}',
        },
    )  # fmt: skip
    records = list(read(tmp_path, ReadOptions(val_fraction=0)).records)
    assert [record.split for record in records] == ["test", "val", "val"]
    options = ReadOptions(val_fraction=0, caption_column="alt", split_column="part")
    records = list(read(tmp_path, options).records)
    assert [record.split for record in records] == ["val", "train", "val"]
    assert [record.captions for record in records] == [("y",), ("y", "z"), ("y",)]
    (tmp_path / "a.json").write_text('{"caption": "x", "split": "minival"}')
    with pytest.raises(DatasetError, match="split 'minival' of a.jpg is not train, val or test; choose another"):
        list(read(tmp_path).records)


@pytest.fixture
def linked(tmp_path):
    """A folder with links that lead out of it: to a text, a picture and a folder; and a pipe."""
    out = {"out/secret.txt": "s", "out/s.jpg": "S", "out/s.txt": "out"}
    write_files(
        tmp_path, {**out, "in/ok.jpg": "", "in/ok.txt": "ok", "in/text.jpg": "", "in/s.txt": "x", "in/pipe.jpg": ""}
    )
    (tmp_path / "in" / "text.txt").symlink_to("../out/secret.txt")
    (tmp_path / "in" / "s.jpg").symlink_to("../out/s.jpg")
    (tmp_path / "in" / "more").symlink_to("../out")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    return tmp_path / "in"


def test_links_out_of_a_folder_are_followed_and_a_picture_is_one_record(linked):
    dataset = read(linked)
    records = {r.key: r for r in dataset.records}
    assert list(records) == ["more/s.jpg", "ok.jpg", "pipe.jpg", "text.jpg"]
    assert records["more/s.jpg"].captions == ("out", "x")
    assert load(records["more/s.jpg"].source).read_text() == "S"
    assert records["text.jpg"].captions == ("s",)
    assert records["pipe.jpg"].problem == "no caption"
    assert "1 links name a picture again" in dataset.found
    assert "1 image outside the folder of the dataset" in dataset.found


def test_confined_links_of_a_folder_lead_nowhere(linked):
    records = {r.key: r for r in read(linked, ReadOptions(confine=True)).records}
    assert list(records) == ["more", "ok.jpg", "pipe.jpg", "s.jpg", "text.jpg"]
    assert records["text.jpg"].problem.startswith("the text beside it cannot be read")
    assert records["more"].problem == "a link to a folder outside, which --confine refuses"
    with pytest.raises(UnreadableImage, match="lies outside"):
        load(records["s.jpg"].source)


def test_a_picture_and_the_links_to_it_are_one_record_of_its_own_name(tmp_path):
    write_files(tmp_path, {"b.jpg": "", "b.txt": "own", "a.txt": "linked", "deep/c.jpg": "", "deep/c.txt": "c"})
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "again").symlink_to("deep")
    dataset = read(tmp_path)
    assert [(r.key, r.captions) for r in dataset.records] == [("b.jpg", ("own", "linked")), ("deep/c.jpg", ("c",))]
    assert "1 link to a folder that is read already (again)" in dataset.found


def test_loops_of_links_end(tmp_path):
    write_files(tmp_path, {"in/a.jpg": "", "in/a.txt": "a", "in/b.csv": "image,caption\na.jpg,a\n"})
    for name, target in (("loop", "."), ("up", ".."), ("self", "self"), ("self.jpg", "self.jpg")):
        (tmp_path / "in" / name).symlink_to(target)
    dataset = read(tmp_path / "in")
    assert [(r.key, r.problem) for r in dataset.records] == [("a.jpg", ""), ("self.jpg", "no caption")]
    assert "2 links to a folder that holds it (loop)" in dataset.found
    assert len(read(tmp_path / "**" / "*.csv").records) == 1


def test_names_that_are_not_utf8(tmp_path):
    write_files(tmp_path, {"a.jpg": "", "a.txt": "a", os.fsdecode(b"\xe9.jpg"): "", os.fsdecode(b"\xe9.txt"): "x"})
    first, second = read(tmp_path).records
    assert (first.problem, second.key, second.problem) == ("", r"\xe9.jpg", "its name is not UTF-8")


def test_a_folder_of_pictures_without_captions_is_a_dataset(tmp_path):
    with pytest.raises(DatasetError, match="holds no pictures and no captions"):
        read(tmp_path)
    write_files(
        tmp_path, {"b.jpg": "B", "2024/Rome/a.PNG": "A", "2024/c": "\xff", "train/d.webp": "", "test/e.gif": ""}
    )
    (tmp_path / "again.jpg").symlink_to("b.jpg")
    dataset = read(tmp_path, ReadOptions(val_fraction=0.5))
    assert dataset.kind == "pictures"
    assert dataset.found == (
        "4 pictures without captions; 1 links name a picture again; not read: 1 file without suffix (2024/c)"
    )
    assert [(r.key, r.split, r.captions, r.problem) for r in dataset.records] == [
        ("2024/Rome/a.PNG", "train", (), ""),
        ("b.jpg", "train", (), ""),
        ("test/e.gif", "test", (), ""),
        ("train/d.webp", "train", (), ""),
    ]
    assert load(dataset.records[1].source) == tmp_path / "b.jpg"


def test_splits_of_pictures_without_captions_are_drawn_only_on_request(tmp_path):
    write_files(tmp_path, {f"{n}.jpg": "" for n in range(40)})
    assert read(tmp_path, ReadOptions(val_fraction=0.5)).records.splits == {"train": 40, "val": 0, "test": 0}
    assert 5 < read(tmp_path, ReadOptions(val_fraction=0.5, redraw_splits=True)).records.splits["val"] < 35


TAKEOUT = json.dumps({"title": "a.jpg", "description": "", "url": "https://x/y", "people": [{"name": "Ann"}]})
BESIDE_PHOTOGRAPHS = {
    ".DS_Store": "x", "Thumbs.db": "x", "desktop.ini": "[.ShellClassInfo]", "README.txt": "My pictures, with captions.\n",
    "a.jpg.json": TAKEOUT, "a.jpg.supplemental-metadata.json": TAKEOUT, "metadata.json": '{"title": "Rome"}',
    "a.MOV": "x", "b.mov": "x", "a.AAE": "<plist/>", "raw/a.CR2": b"II*\0", "raw/a.xmp": "<x/>", "list.txt": "see a.jpg",
    "expenses.csv": "date,amount\n2024-01-01,3\n", "notes.tsv": b"\xff\xfe1", "backup.zip": b"PK\3\4", "index.html": "a.jpg",
    ".thumbnails/a.jpg": "", ".hidden.jpg": "", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg": "", "$RECYCLE.BIN/b.jpg": "",
    "Library.photoslibrary/resources/derivatives/a.jpg": "", "site.json": '{"icons": ["one.png"]}', "b.txt": "",
}  # fmt: skip


@given(st.sets(st.sampled_from(sorted(BESIDE_PHOTOGRAPHS))))
def test_other_files_beside_photographs_do_not_hinder(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("photographs")
    write_files(folder, {"a.jpg": "", "album/b.jpg": "", "b.jpg": "", **{n: BESIDE_PHOTOGRAPHS[n] for n in names}})
    dataset = read(folder)
    assert (dataset.kind, [r.key for r in dataset.records]) == ("pictures", ["a.jpg", "album/b.jpg", "b.jpg"])
    assert dataset.found.startswith("3 pictures without captions")
    folded = dataset.found.endswith(" more")  # the kinds beyond the eighth
    for name, kind in (("raw/a.CR2", ".cr2 file"), ("raw/a.xmp", ".xmp file"), ("expenses.csv", ".csv file")):
        assert (kind in dataset.found) == (name in names) or (name in names and folded)


def test_the_originals_of_an_apple_photos_library_are_read(tmp_path):
    write_files(tmp_path / "P.photoslibrary", {"originals/0/A.jpg": "", "resources/derivatives/A_1.jpg": ""})
    for top, key in (
        (tmp_path, "P.photoslibrary/originals/0/A.jpg"),
        (tmp_path / "P.photoslibrary", "originals/0/A.jpg"),
    ):
        assert [r.key for r in read(top).records] == [key]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("labels.csv", "image,label\na.jpg,1\n"),
        ("captions.csv", b"image,caption\na.jpg,caf\xe9\n"),
        ("texts.json", '[{"photo": "a.jpg", "words": "x"}, {"photo": "b.jpg", "words": "y"}]'),
        ("notes.json", '{"captions": {"a": 3}}'),
        ("captions.txt", "a.jpg a dog\nb.jpg a cat\n"),
        ("elsewhere.csv", "image,text\nc.jpg,x\nd.jpg,y\n"),
    ],
)
def test_a_file_that_seems_to_hold_the_captions_is_an_error_unless_they_are_not_wanted(tmp_path, name, data):
    write_files(tmp_path, {"a.jpg": "", "b.jpg": "", name: data})
    with pytest.raises(DatasetError, match=rf"{name}.*--allow-uncaptioned"):
        read(tmp_path)
    dataset = read(tmp_path, ReadOptions(allow_uncaptioned=True))
    assert (dataset.kind, len(dataset.records)) == ("pictures", 2)
    assert f"({name})" in dataset.found


def test_a_field_of_the_json_beside_each_picture_is_a_caption_only_when_it_is_named(tmp_path):
    write_files(tmp_path, {f"{n}.{end}": '{"alt": "a dog"}' for n in range(3) for end in ("jpg", "json")})
    dataset = read(tmp_path)
    assert dataset.kind == "pictures"
    assert "--caption-column NAME takes a field of a JSON" in dataset.found
    assert [r.captions for r in read(tmp_path, ReadOptions(caption_column="alt")).records] == [("a dog",)] * 3
    with pytest.raises(
        DatasetError, match=r"its JSON has the fields alt; .*3 have no caption: --allow-uncaptioned keeps"
    ):
        read(tmp_path, ReadOptions(caption_column="words"))


def test_texts_beside_pictures_that_cannot_be_read_are_no_lack_of_captions(tmp_path):
    write_files(tmp_path, {"a.jpg": "", "b.jpg": "", "b.txt": b"caf\xe9"})
    with pytest.raises(
        DatasetError, match="none of 2 records can be used; a.jpg: no caption .*1 have no caption: --allow"
    ):
        read(tmp_path)
    assert [bool(r.problem) for r in read(tmp_path, ReadOptions(allow_uncaptioned=True)).records] == [False, True]


def test_a_lone_train_folder_is_split_by_hash(tmp_path):
    write_files(tmp_path, {"train/metadata.jsonl": json.dumps({"file_name": "a.jpg", "text": "x"})})
    assert read(tmp_path, ReadOptions(val_fraction=0, test_fraction=1)).records.splits["test"] == 1


def test_metadata_that_is_a_link_out_of_the_folder_is_read_unless_confined(tmp_path):
    write_files(tmp_path, {"blobs/1": "file_name,text\na.jpg,b\n", "blobs/2": "A"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "metadata.csv").symlink_to("../blobs/1")
    (tmp_path / "in" / "a.jpg").symlink_to("../blobs/2")
    (record,) = read(tmp_path / "in").records
    assert load(record.source).read_text() == "A"
    with pytest.raises(DatasetError, match=r"metadata\.csv is a link out of .*; leave out --confine"):
        read(tmp_path / "in", ReadOptions(confine=True))


def test_names_in_the_metadata_of_a_folder_never_leave_it(tmp_path):
    write_files(
        tmp_path,
        {
            "secret.jpg": "s",
            "in/a.jpg": "A",
            "in/metadata.csv": f"file_name,text\na.jpg,x\n../secret.jpg,y\n{tmp_path}/secret.jpg,z\n",
        },
    )
    first, *others = read(tmp_path / "in").records
    assert load(first.source).read_text() == "A"
    for record in others:
        with pytest.raises(UnreadableImage, match="leads out of"):
            load(record.source)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared photographs")
def test_photographs_by_metadata_and_by_sidecars(tmp_path):
    dataset = read(SHARED / "photos")
    assert (dataset.kind, len(dataset.records), sum(dataset.records.captions.values())) == ("imagefolder", 160, 800)
    for record in dataset.records[:3]:
        shutil.copy(load(record.source), tmp_path)
        (tmp_path / record.image).with_suffix(".txt").write_text("\n".join(record.captions))
    assert [r.captions for r in read(tmp_path).records] == [r.captions for r in dataset.records[:3]]
