"""Folders of images with texts beside them, and with metadata."""

import json
import os
import shutil
from pathlib import Path

import pytest
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def fill(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def test_sidecars(tmp_path):
    fill(
        tmp_path,
        {
            "train/b.JPG": "B", "train/b.txt": "one\n\n two \n", "val/a.png": "A", "val/a.json": '{"caption": "x\\ny"}',
            "val/a.txt": "other", "val/notes.md": "", "c.webp": "C", ".hidden.jpg": "", "d.jpg": "D", "d.txt": b"\xff",
            "e.jpg": "E", "e.json": '["p", "q"]', "f.jpg": "F", "f.json": "{", "g.jpg": "G", "g.json": "{}", "g.txt": "g",
        },
    )  # fmt: skip
    dataset = read(tmp_path, ReadOptions(val_fraction=0))
    assert (dataset.kind, dataset.found) == ("sidecars", "images with a .txt or .json beside each")
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
    fill(
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


def test_links_in_a_folder_lead_nowhere(tmp_path):
    fill(
        tmp_path,
        {
            "out/secret.txt": "s",
            "out/s.jpg": "S",
            "in/ok.jpg": "",
            "in/ok.txt": "ok",
            "in/text.jpg": "",
            "in/s.txt": "x",
        },
    )
    folder = tmp_path / "in"
    (folder / "text.txt").symlink_to("../out/secret.txt")
    (folder / "s.jpg").symlink_to("../out/s.jpg")
    (folder / "more").symlink_to("../out")
    os.mkfifo(folder / "pipe.txt")
    fill(folder, {"pipe.jpg": ""})
    records = {r.key: r for r in read(folder).records}
    assert list(records) == ["more", "ok.jpg", "pipe.jpg", "s.jpg", "text.jpg"]
    assert records["text.jpg"].problem.startswith("the text beside it cannot be read")
    assert records["pipe.jpg"].problem == "no caption"


def test_a_linked_folder_of_images_is_named_not_followed(tmp_path):
    fill(tmp_path, {"a.jpg": "", "a.txt": "a"})
    (tmp_path / "loop.jpg").symlink_to(".")
    records = list(read(tmp_path).records)
    assert [(r.key, r.problem) for r in records] == [
        ("a.jpg", ""),
        ("loop.jpg", "a link to a folder, which is not followed"),
    ]


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path, {"a.jpg": "", "a.txt": "a", os.fsdecode(b"\xe9.jpg"): "", os.fsdecode(b"\xe9.txt"): "x"})
    first, second = read(tmp_path).records
    assert (first.problem, second.key, second.problem) == ("", r"\xe9.jpg", "its name is not UTF-8")


def test_folders_that_hold_no_captions(tmp_path):
    with pytest.raises(DatasetError, match="holds no captions"):
        read(tmp_path)
    fill(tmp_path, {"a.jpg": "", "b.jpg": ""})
    with pytest.raises(DatasetError, match="none of 2 records can be used; a.jpg: no caption"):
        read(tmp_path)
    fill(tmp_path / "hf", {"data-00000-of-00001.arrow": ""})
    with pytest.raises(DatasetError, match=r"save_to_disk .* to_parquet"):
        read(tmp_path / "hf")


def test_a_lone_train_folder_is_split_by_hash(tmp_path):
    fill(tmp_path, {"train/metadata.jsonl": json.dumps({"file_name": "a.jpg", "text": "x"})})
    assert read(tmp_path, ReadOptions(val_fraction=0, test_fraction=1)).records.splits["test"] == 1


def test_metadata_that_is_a_link_out_of_the_folder(tmp_path):
    fill(tmp_path, {"secret.csv": "image,caption\na.jpg,b\n"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "metadata.csv").symlink_to("../secret.csv")
    with pytest.raises(DatasetError, match=r"metadata\.csv is a link out of .*; name the file itself"):
        read(tmp_path / "in")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared photographs")
def test_photographs_by_metadata_and_by_sidecars(tmp_path):
    dataset = read(SHARED / "photos")
    assert (dataset.kind, len(dataset.records), sum(dataset.records.captions.values())) == ("imagefolder", 160, 800)
    for record in dataset.records[:3]:
        shutil.copy(load(record.source), tmp_path)
        (tmp_path / record.image).with_suffix(".txt").write_text("\n".join(record.captions))
    assert [r.captions for r in read(tmp_path).records] == [r.captions for r in dataset.records[:3]]
