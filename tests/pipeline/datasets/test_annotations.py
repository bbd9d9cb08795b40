"""COCO captions, Karpathy splits, arrays of objects, Flickr tokens."""

import json
from pathlib import Path

import pytest
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import ImageFile, load
from qf.pipeline.errors import DatasetError
from qf.pipeline.images import load_image

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def coco(*names, ids=None):
    """Two captions an image."""
    ids = ids or range(len(names))
    return {
        "info": {},
        "images": [{"id": n, "file_name": name, "height": 1, "width": 1} for n, name in zip(ids, names, strict=True)],
        "annotations": [{"id": i, "image_id": n, "caption": f" {n} {i}\n"} for i in (1, 2) for n in ids],
    }


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared photographs")
def test_coco_mini():
    dataset = read(SHARED / "coco-mini" / "annotations.json", ReadOptions(images=SHARED / "coco-mini" / "images"))
    assert dataset.kind == "coco"
    assert dataset.found.startswith("COCO captions: 76 images, 380 captions; images in ")
    assert all(len(r.captions) == 5 and load_image(load(r.source)).width for r in dataset.records[:5])
    assert list(read(SHARED / "coco-mini" / "annotations.json").records) == list(dataset.records)  # finds images/


def test_coco(tmp_path):
    source = write(tmp_path / "d.json", coco("a.jpg", "b.jpg", ids=[7, 3]))
    dataset = read(source, ReadOptions(images=tmp_path))
    first, second = dataset.records
    assert (first.key, first.captions, second.captions) == ("a.jpg", ("7 1", "7 2"), ("3 1", "3 2"))
    assert first.source == ImageFile(str(tmp_path), "a.jpg")
    assert dataset.found == f"COCO captions: 2 images, 4 captions; images in {tmp_path}"


def test_coco_as_it_is_unpacked(tmp_path):
    """annotations/captions_val2017.json beside val2017/; together with train2017 their names tell the split."""
    for split in ("train", "val"):
        touch(tmp_path / f"{split}2017" / f"{split}.jpg")
        write(tmp_path / "annotations" / f"captions_{split}2017.json", coco(f"{split}.jpg"))
    for source in (tmp_path / "annotations", tmp_path / "annotations" / "captions_{train,val}2017.json"):
        for options in (ReadOptions(), ReadOptions(images=tmp_path)):
            train, val = read(source, options).records
            assert (train.split, val.split) == ("train", "val")
            assert load(train.source) == tmp_path / "train2017" / "train.jpg"
            assert load(val.source) == tmp_path / "val2017" / "val.jpg"
    (lone,) = read(tmp_path / "annotations" / "captions_val2017.json").records
    assert lone.split == "val"
    (lone,) = read(tmp_path / "annotations" / "captions_train2017.json", ReadOptions(val_fraction=1)).records
    assert lone.split == "val"  # nothing else to validate on: drawn


def test_coco_that_is_not_whole(tmp_path):
    document = coco("a.jpg", "b.jpg")
    document["images"] += [{"id": 9, "file_name": "c.jpg"}, {"id": 10}]
    document["annotations"] += [{"image_id": 77, "caption": "whose?"}, {"image_id": 0}]
    dataset = read(write(tmp_path / "d.json", document))
    assert "1 captions of images that it does not list are left out" in dataset.found
    assert [r.problem for r in dataset.records] == ["", "", "no caption", "image 3 has no file name"]
    document["annotations"] = [{"image_id": 0, "bbox": []}]
    with pytest.raises(DatasetError, match=r"holds no captions; name COCO's captions_\*\.json"):
        read(write(tmp_path / "instances.json", document))


def test_karpathy(tmp_path):
    def image(name, split, **more):
        return {
            "filename": name,
            "split": split,
            "sentences": [{"raw": f"{name} {n}", "tokens": []} for n in (1, 2)],
            **more,
        }

    images = [image(f"{n}.jpg", split) for n, split in enumerate(["train", "restval", "val", "test"])]
    dataset = read(write(tmp_path / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"}))
    assert [r.split for r in dataset.records] == ["train", "train", "val", "test"]
    assert dataset.records[1].captions == ("1.jpg 1", "1.jpg 2")
    assert (dataset.kind, dataset.found) == ("karpathy", f"Karpathy split: 4 images, 8 captions; images in {tmp_path}")

    touch(tmp_path / "images" / "val2014" / "a.jpg")
    (record,) = read(write(tmp_path / "coco.json", {"images": [image("a.jpg", "val", filepath="val2014")]})).records
    assert (record.key, load(record.source)) == ("val2014/a.jpg", tmp_path / "images" / "val2014" / "a.jpg")


def test_an_array_of_objects_is_a_table(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["x", "y"], "image_id": 1}, {"image": "b.jpg", "caption": "z"}]
    dataset = read(write(tmp_path / "coco_karpathy_val.json", rows))
    assert (dataset.kind, dataset.found) == ("json", "image column 'image', caption column 'caption', no split column")
    assert [r.captions for r in dataset.records] == [("x", "y"), ("z",)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "no caption JSON that qf knows"),
        ({"images": [3]}, "no caption JSON that qf knows"),
        ({"images": [{"id": 1}], "annotations": 3}, "holds no captions"),
        ([1, 2], "no image column"),
        ([{"image": "a", "caption": "b"}, 3], "expected rows with named values, found '3'"),
        ([], "holds no records"),
        ("text", "none of the datasets|no caption JSON"),
        ({"images": [], "annotations": [{"caption": "x"}]}, "holds no records"),
    ],
)
def test_other_json(tmp_path, value, message):
    with pytest.raises(DatasetError, match=message):
        read(write(tmp_path / "d.json", value))


def test_json_that_is_none(tmp_path):
    for data in (b"{", b"[" * 100_000, b'{"a": "\xff"}', b""):
        (tmp_path / "d.json").write_bytes(data)
        with pytest.raises(DatasetError, match=r"cannot be read as JSON|is not UTF-8"):
            read(tmp_path / "d.json")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared photographs")
def test_flickr8k_tokens_and_table_agree():
    tokens, table = read(SHARED / "flickr8k"), read(SHARED / "flickr8k" / "captions.csv")
    assert (tokens.kind, table.kind, len(tokens.records)) == ("flickr tokens", "csv", 7000)
    assert tokens.records.sha256 == table.records.sha256
    assert tokens.records[::500] == table.records[::500]
