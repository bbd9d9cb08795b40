"""Picking the reader, brace patterns, and random bytes as every kind of dataset."""

import contextlib
import io
import json
import tarfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.patterns import braces
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.records import splits_in_names
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError
from qf.pipeline.images import UnreadableImage


def tar_of(**members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def arrow_of(columns):
    file = io.BytesIO()
    pl.DataFrame(columns).write_ipc_stream(file, compat_level=pl.CompatLevel.oldest())
    return file.getvalue()


def parquet_of(columns):
    file = io.BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    return file.getvalue()


COCO = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "x"}]}
KARPATHY = {"images": [{"filename": "a", "split": "val", "sentences": [{"raw": "x"}]}]}
WHOLE = {
    "d.csv": b'image,caption,split\na,"x ""y""\nz",train\nb,x,val\n',
    "d.tsv": b"image\tcaption\na\tx\n",
    "d.txt": b"a.jpg#0\tx\nb.jpg#1\ty\n",
    "d.jsonl": b'{"image": "a", "caption": ["x", "y"]}\n{"image": "b", "caption": "z"}\n',
    "coco.json": json.dumps(COCO).encode(),
    "karpathy.json": json.dumps(KARPATHY).encode(),
    "d.tar": tar_of(a_jpg=b"A", a_txt=b"x", b_png=b"B", b_json=b'{"caption": "x"}'),
    "d.parquet": parquet_of(
        {"image": [{"bytes": b"x", "path": "a"}, {"bytes": b"y", "path": None}], "caption": ["x", "y"]}
    ),
    "d.arrow": arrow_of({"image": [b"x", b"y"], "caption": ["x", "y"], "key": ["a", "b"]}),
    "raw.tsv": b'a b\timages/0.jpg\n"c ""d"""\timages/1.jpg\n',
    "lists.csv": b"sep=;\nimage;caption\na;\"['x', 'y']\"\nb;['z']\n",
    "utf-16.csv": 'image,caption\na,"x\ny"\nb,z\n'.encode("utf-16"),
    "base64.jsonl": json.dumps(["/9j/" + "A" * 100, "x y"]).encode()
    + b'\n["data:image/png;base64,AAAA", ["x", "y"]]\n',
    "names.json": b'{"0.jpg": ["x", "y"], "1.jpg": {"caption": "x", "split": "val"}}',
    "columns.json": b'{"image": {"0": "a", "1": "b"}, "caption": {"0": "x", "1": "y"}}',
    "dots.tar": tar_of(v1_0_jpg=b"A", v1_0_txt=b"x", v1_1_jpg=b"B", v1_1_captions_json=b'["x"]'),
    "d": b"image,caption\na,x\n",
}


def nothing_but_rejects_or_an_error(path):
    with contextlib.suppress(DatasetError):
        dataset = read(path)
        for record in dataset.records:
            if not record.problem:
                assert bool(record.captions) == (dataset.kind != "pictures")
                with contextlib.suppress(UnreadableImage):
                    load(record.source)


@given(st.sampled_from([*WHOLE, "a.txt", "a.jpg"]), st.binary(max_size=600))
def test_random_bytes(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(data)
    nothing_but_rejects_or_an_error(folder / name)
    nothing_but_rejects_or_an_error(folder)


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_datasets(tmp_path_factory, name, data):
    """Some bytes of a good one replaced, or its end cut off."""
    content = bytearray(WHOLE[name])
    at = data.draw(st.integers(0, len(content)))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        value = data.draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\xff", b'"', b"\n", b"{", b"\\ud800"])
        )
        content[at : at + len(value)] = value
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    nothing_but_rejects_or_an_error(path)


NAMES = "images annotations id image_id file_name caption filename filepath sentences raw split image key bytes path"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.jpg", "train", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES.split()), inner, max_size=5),
)


@given(st.sampled_from(["d.json", "d.jsonl"]), st.lists(JSON, min_size=1, max_size=3))
def test_json_of_any_shape(tmp_path_factory, name, values):
    path = tmp_path_factory.mktemp("json") / name
    path.write_text("\n".join(map(json.dumps, values)) if name == "d.jsonl" else json.dumps(values[0]))
    nothing_but_rejects_or_an_error(path)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_the_whole_ones_are_read(tmp_path, name):
    if name != "d":
        (tmp_path / name).write_bytes(WHOLE[name])
        assert len(read(tmp_path / name).records) == (1 if name in ("d.tsv", "coco.json", "karpathy.json") else 2)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/{00..02}.tar", ["a/00.tar", "a/01.tar", "a/02.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}.x", ["a-0.x", "a-1.x", "b-0.x", "b-1.x"]),
        ("plain", ["plain"]),
        ("odd{x}", ["odd{x}"]),
        ("{000..1}", ["000", "001"]),
    ],
)
def test_braces(tmp_path, pattern, names):
    assert [str(path) for path in braces(tmp_path / pattern)] == [str(tmp_path / name) for name in names]


def test_a_glob_names_files(tmp_path):
    for number in (0, 1):
        (tmp_path / f"{number}.tar").write_bytes(WHOLE["d.tar"])
    assert read(tmp_path / "*.tar").records.splits == read(tmp_path / "{0..1}.tar").records.splits
    (tmp_path / "w [v1]" / "below").mkdir(parents=True)
    (tmp_path / "w [v1]" / "below" / "0.tar").write_bytes(WHOLE["d.tar"])
    assert len(read(tmp_path / "w [v1]" / "**" / "*.tar").records) == len(read(tmp_path / "0.tar").records)
    assert len(read(tmp_path / "{0*,*.tar}").records) == len(read(tmp_path / "*.tar").records)
    with pytest.raises(DatasetError, match="are 1.4 together"):
        read(tmp_path / "*.tar", ReadOptions(val_fraction=0.7, test_fraction=0.7))


def test_too_many_braces():
    for pattern in ("{0..99999999}", "{0..99}" * 20):
        with pytest.raises(DatasetError, match="names more than 1,000,000 files"):
            braces(Path(pattern))


def test_patterns_of_what_is_not_there_or_not_alike(tmp_path):
    (tmp_path / "0.tar").write_bytes(WHOLE["d.tar"])
    with pytest.raises(DatasetError, match=r"1\.tar does not exist; give a CSV"):
        read(tmp_path / "{0..1}.tar")
    (tmp_path / "1.csv").write_bytes(WHOLE["d.csv"])
    (tmp_path / "2.csv").write_bytes(WHOLE["d.csv"])
    with pytest.raises(DatasetError, match=r"0\.tar is webdataset but .*1\.csv is csv; name files of one kind"):
        read(tmp_path / "{0.tar,1.csv}")
    (tmp_path / "{odd}.csv").write_bytes(WHOLE["d.csv"])
    assert len(read(tmp_path / "{odd}.csv").records) == 2


def test_compressed_files_and_no_folder_of_images(tmp_path):
    (tmp_path / "d.csv.gz").write_bytes(b"\x1f\x8b123")
    with pytest.raises(DatasetError, match="is compressed; unpack it first, as with gzip -d"):
        read(tmp_path / "d.csv.gz")
    (tmp_path / "d.csv").write_bytes(WHOLE["d.csv"])
    with pytest.raises(DatasetError, match="--images .*nowhere is no folder"):
        read(tmp_path / "d.csv", ReadOptions(images=tmp_path / "nowhere"))


def test_several_sources_are_read_as_a_pattern_that_names_them(tmp_path):
    """As the shell expands a pattern that stands without quotes."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(WHOLE["d.tar"])
    assert list(read([tmp_path / "0.tar", tmp_path / "1.tar"]).records) == list(read(tmp_path / "{0,1}.tar").records)
    assert list(read([tmp_path / "0.tar"]).records) == list(read(tmp_path / "0.tar").records)
    with pytest.raises(DatasetError, match="is a folder; give one folder alone, or files of one kind"):
        read([tmp_path, tmp_path / "0.tar"])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_table_a_split_is_one_dataset(tmp_path, suffix):
    for number, split in enumerate(("train", "val", "test")):
        images = [f"{number}-{n}.jpg" for n in range(3)]
        objects = [{"image": name, "caption": f"{name} {n}"} for name in images for n in range(2)]
        whole = {
            "csv": "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in objects),
            "jsonl": "\n".join(map(json.dumps, objects)),
            "json": json.dumps(objects),
        }
        (tmp_path / f"captions_{split}.{suffix}").write_text(whole[suffix])
    dataset = read(tmp_path / f"captions_{{train,val,test}}.{suffix}")
    assert dataset.records.splits == {"train": 3, "val": 3, "test": 3}
    assert dataset.records.captions == {"train": 6, "val": 6, "test": 6}
    assert "3 files whose names tell the split" in dataset.found


def test_the_rows_of_an_image_may_stand_in_several_tables(tmp_path):
    (tmp_path / "1.csv").write_text("image,caption\na.jpg,x\nb.jpg,y\n")
    (tmp_path / "2.csv").write_text("file_name,text,split\na.jpg,z,val\n")
    a, b = read(tmp_path / "*.csv").records
    assert (a.captions, a.split, b.captions) == (("x", "z"), "val", ("y",))
    (tmp_path / "train.csv").write_text("image,caption\na.jpg,x\n")
    (tmp_path / "val.csv").write_text("image,caption\na.jpg,y\nb.jpg,y\n")
    a, b = read(tmp_path / "{train,val}.csv").records
    assert (a.problem, b.problem) == ("its rows are in several splits: train, val", "")


def test_tables_in_several_folders_have_their_folder_in_their_names(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "captions.csv").write_text("image,caption\na.jpg,x\n")
    records = list(read(tmp_path / "*" / "captions.csv").records)
    assert [(r.key, r.split, r.source.folder) for r in records] == [
        ("train/a.jpg", "train", str(tmp_path / "train")),
        ("val/a.jpg", "val", str(tmp_path / "val")),
    ]


def rows(*splits):
    return "image,caption,split\n" + "".join(f"{n}.jpg,a,{split}\n" for n, split in enumerate(splits))


def test_where_all_is_train_the_other_splits_are_drawn(tmp_path):
    """Whatever it is that says train; and the draw is that of a dataset that names no splits."""
    (tmp_path / "data.csv").write_text(rows(*["train"] * 40))
    (tmp_path / "plain.csv").write_text(rows(*[""] * 40).replace(",split", "").replace(",a,", ",a"))
    options = ReadOptions(val_fraction=0.3, test_fraction=0.1)
    named, unnamed = read(tmp_path / "data.csv", options).records, read(tmp_path / "plain.csv", options).records
    assert [r.split for r in named] == [r.split for r in unnamed]
    assert all(named.splits.values())
    assert (named.splits, named.captions, named.sha256) == (unnamed.splits, unnamed.captions, unnamed.sha256)
    assert read(tmp_path / "data.csv", ReadOptions(val_fraction=0)).records.splits["train"] == 40


def test_folders_of_image_paths_are_splits_where_no_column_names_any(tmp_path):
    folders = [f"{folder}/{n}.jpg" for n in range(20) for folder in ("train", "./val", "test")]
    for header, blank in (("image,caption", ""), ("image,caption,split", ",")):
        (tmp_path / "data.csv").write_text(header + "\n" + "".join(f"{name},a{blank}\n" for name in folders))
        assert read(tmp_path / "data.csv").records.splits == {"train": 20, "val": 20, "test": 20}
    (tmp_path / "data.csv").write_text(rows("val") + "0.jpg,b,\n0.jpg,c,Validation\n1.jpg,a,val\n1.jpg,b,train\n")
    first, second = read(tmp_path / "data.csv").records
    assert (first.split, len(first.captions), first.problem) == ("val", 3, "")
    assert second.problem == "its rows are in several splits: train, val"
    assert not any(r.problem for r in read(tmp_path / "data.csv", ReadOptions(redraw_splits=True)).records)


def test_splits_are_drawn_anew_where_that_is_asked(tmp_path):
    (tmp_path / "data.csv").write_text(rows(*["val"] * 40))
    assert read(tmp_path / "data.csv").records.splits == {"train": 0, "val": 40, "test": 0}
    splits = read(tmp_path / "data.csv", ReadOptions(redraw_splits=True, val_fraction=0.3)).records.splits
    assert min(splits["train"], splits["val"]) > 5
    assert not splits["test"]


def test_splits_in_names():
    assert splits_in_names(["captions_train2017.json", "captions_val2017.json"]) == ["train", "val"]
    assert splits_in_names(["train-00000-of-00002", "train-00001-of-00002"]) == ["train", "train"]
    assert splits_in_names(["validation-0", "test/a"]) == ["val", "test"]
    assert splits_in_names(["train-val-0", "test-0"]) == [None, None]
    assert splits_in_names(["retrained", "contest"]) == [None, None]
