"""Images without a caption: rejects, or records without captions, in every layout alike."""

import io
import json
import tarfile

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError

from conftest import write_files  # isort: skip

ALLOWED = ReadOptions(allow_uncaptioned=True)
SOME = {"a.jpg": ["x", "y"], "b.jpg": [], "c.jpg": ["z"], "d.jpg": []}


def tar_of(captions):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, texts in captions.items():
            members = {name: b"picture", **({name[:-3] + "txt": "\n".join(texts).encode()} if texts else {})}
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def columnar(captions, write):
    file = io.BytesIO()
    images = [{"bytes": name.encode(), "path": name} for name in captions]
    write(
        pl.DataFrame(
            {"image": images, "caption": list(captions.values())}, schema_overrides={"caption": pl.List(pl.String)}
        ),
        file,
    )
    return file.getvalue()


def csv_of(captions):
    rows = [(name, text) for name, texts in captions.items() for text in texts or [""]]
    return "file_name,caption\n" + "".join(f"{name},{text}\n" for name, text in rows)


def coco_of(captions):
    images = [{"id": n, "file_name": name} for n, name in enumerate(captions)]
    notes = [{"image_id": n, "caption": text} for n, texts in enumerate(captions.values()) for text in texts]
    return json.dumps({"images": images, "annotations": notes})


def karpathy_of(captions):
    images = [{"filename": name, "sentences": [{"raw": text} for text in texts]} for name, texts in captions.items()]
    return json.dumps({"images": images})


def tokens_of(captions):
    return "".join(f"{name}#{n}\t{text}\n" for name, texts in captions.items() for n, text in enumerate(texts or [""]))


def lines_of(captions):
    return "".join(json.dumps({"image": name, "caption": texts}) + "\n" for name, texts in captions.items())


def sidecars_of(captions):
    return {f"{name[:-3]}txt": "\n".join(texts) for name, texts in captions.items() if texts}


FILES = {  # layout: the files beside the pictures
    "csv": lambda some: {"d.csv": csv_of(some)},
    "imagefolder": lambda some: {"metadata.csv": csv_of(some)},
    "jsonl": lambda some: {"d.jsonl": lines_of(some)},
    "json": lambda some: {"all.json": json.dumps(some)},
    "coco": lambda some: {"captions_all.json": coco_of(some)},
    "karpathy": lambda some: {"dataset.json": karpathy_of(some)},
    "flickr tokens": lambda some: {"d.token.txt": tokens_of(some)},
    "webdataset": lambda some: {"d.tar": tar_of(some)},
    "parquet": lambda some: {"d.parquet": columnar(some, pl.DataFrame.write_parquet)},
    "arrow": lambda some: {
        "d.arrow": columnar(some, lambda frame, to: frame.write_ipc_stream(to, compat_level=pl.CompatLevel.oldest()))
    },
    "sidecars": sidecars_of,
}


def lay(folder, layout, captions):
    return write_files(folder, {**dict.fromkeys(captions, ""), **FILES[layout](captions)})


@pytest.mark.parametrize("layout", FILES)
def test_an_image_without_a_caption_is_a_reject_unless_it_is_allowed(tmp_path, layout):
    lay(tmp_path, layout, SOME)
    dataset = read(tmp_path)
    assert dataset.kind == layout
    assert [bool(r.problem) for r in dataset.records] == [False, True, False, True]
    assert all(r.problem.startswith("no caption") for r in dataset.records if r.problem)
    assert dataset.cure == "; 2 have no caption: --allow-uncaptioned keeps them"
    kept = read(tmp_path, ALLOWED)
    assert "; 2 images without a caption" in kept.found
    assert [r.captions for r in kept.records] == [("x", "y"), (), ("z",), ()]
    assert (sum(kept.records.splits.values()), sum(kept.records.captions.values()), kept.cure) == (4, 3, "")
    assert all(r.source and not r.problem for r in kept.records)
    assert kept.records.sha256 != dataset.records.sha256  # features of one are not those of the other


@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.lists(st.sampled_from(["x", "y z"]), max_size=2, unique=True), min_size=1, max_size=7),
)
def test_records_and_rejects_are_all_pictures(tmp_path_factory, layout, captions):
    """Any mix of captioned and uncaptioned pictures, or an error that says what keeps them."""
    some = {f"{n}.jpg": texts for n, texts in enumerate(captions)}
    folder = lay(tmp_path_factory.mktemp("mix"), layout, some)
    captioned = sum(map(bool, captions))
    if captioned or layout == "sidecars":
        dataset = read(folder)
        used = sum(dataset.records.splits.values())
        assert used == (captioned or len(some))
        assert used + sum(bool(r.problem) for r in dataset.records) == len(some) == len(dataset.records)
    elif layout != "coco":  # without annotations it says nothing of captions
        with pytest.raises(DatasetError, match="--allow-uncaptioned"):
            read(folder)
    kept = read(folder, ALLOWED).records
    assert sum(kept.splits.values()) == len(kept) == len(some)
    assert sum(kept.captions.values()) == sum(map(len, captions))


def test_a_table_needs_no_caption_column_where_none_is_needed(tmp_path):
    write_files(
        tmp_path,
        {"a.jpg": "", "b.jpg": "", "d.csv": "image,split\na.jpg,train\nb.jpg,val\n", "e.csv": "a.jpg,1,2\nb.jpg,3,4\n"},
    )
    with pytest.raises(DatasetError, match="has no caption column.*--allow-uncaptioned"):
        read(tmp_path / "d.csv")
    dataset = read(tmp_path / "d.csv", ALLOWED)
    assert "image column 'image', no caption column, split column 'split'" in dataset.found
    assert [(r.key, r.split, r.captions) for r in dataset.records] == [("a.jpg", "train", ()), ("b.jpg", "val", ())]
    assert len(read(tmp_path / "e.csv", ALLOWED).records) == 2


def test_a_folder_of_shards_needs_no_caption_column_where_none_is_needed(tmp_path):
    pl.DataFrame({"image": [{"bytes": b"x", "path": "a"}], "label": [3]}).write_parquet(tmp_path / "0.parquet")
    with pytest.raises(DatasetError, match="has no caption column.*--allow-uncaptioned"):
        read(tmp_path)
    assert [r.captions for r in read(tmp_path, ALLOWED).records] == [()]


def test_a_caption_that_cannot_be_used_is_no_lack_of_one(tmp_path):
    rows = [
        ("a.jpg", '["x", "y"]'),
        ("b.jpg", '["z"]'),
        ("f.jpg", "['z']"),
        ("c.jpg", '["cut o'),
        ("d.jpg", "x" * 70_000),
        ("e.jpg", ""),
    ]
    pl.DataFrame(rows, schema=["image", "caption"], orient="row").write_csv(tmp_path / "d.csv")
    problems = [r.problem for r in read(tmp_path / "d.csv", ALLOWED).records]
    assert problems[:4] == ["", "", "", "its list of captions cannot be read"]
    assert problems[4:] == ["a caption of 70,000 characters, the limit is 65,536", ""]
