"""Folders as people have them: what lies beside the data is not taken for the data, and is said."""

import io
import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from qf.pipeline.artifacts import sealed
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import check_apart, read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError
from qf.pipeline.lfs import POINTER

from conftest import write_files  # isort: skip


def jpeg(number=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, 90, 30)).save(file, "JPEG")
    return file.getvalue()


def rows(*names):
    return "image,caption\n" + "".join(f"{name},picture {name}\n" for name in names)


def tar_of(*names):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            for suffix, data in (("jpg", jpeg()), ("txt", f"picture {name}".encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def table_of(*names, **more):
    return pa.Table.from_pylist(
        [{"image": {"bytes": jpeg(), "path": name}, "caption": f"picture {name}", **more} for name in names]
    )


def parquet_of(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def arrow_of(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def urls():
    return parquet_of(pa.table({"url": ["http://x/a.jpg"], "caption": ["a"], "key": ["1"], "status": ["success"]}))


NAMES = ("a.jpg", "b.jpg", "c.jpg")
COCO = {
    "images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES)],
    "annotations": [{"image_id": n, "caption": f"picture {name}"} for n, name in enumerate(NAMES)],
}
BOXES = {"images": COCO["images"], "annotations": [{"image_id": 0, "bbox": [0, 0, 1, 1]}], "categories": []}
PICTURES = {f"Images/{name}": jpeg() for name in NAMES}
FEATURES = {
    "qf-out/features/manifest.json": sealed({"kind": "features"}),
    "qf-out/features/shard-00000.tar": tar_of("own"),
    "qf-out/features/shard-00000.arrow": "x",
    "qf-out/runs/stage1/manifest.json": sealed({"kind": "run"}),
    "qf-out/runs/stage1/loss.png": jpeg(),
    "qf-out/runs/stage2/config.json": sealed({"train": {}}),
    "qf-out/runs/stage2/metrics.jsonl": json.dumps({"image": "a.jpg", "caption": "not one"}),
    "qf-out/hits.png": jpeg(),
}
LAYOUTS = {  # name: files
    "sidecars": {**{name: jpeg() for name in NAMES}, **{name[0] + ".txt": f"picture {name}" for name in NAMES}},
    "metadata": {**{name: jpeg() for name in NAMES}, "metadata.csv": rows(*NAMES).replace("image", "file_name")},
    "metadata below": {**PICTURES, "Images/metadata.csv": rows(*NAMES).replace("image", "file_name")},
    "a table beside its images": {**PICTURES, "captions.txt": rows(*NAMES)},
    "json lines": {**PICTURES, "data.jsonl": "\n".join(json.dumps({"image": n, "caption": f"picture {n}"}) for n in NAMES)},
    "bars": {**PICTURES, "results.csv": rows(*NAMES).replace(",", "| ")},
    "coco": {**PICTURES, "annotations/captions_all.json": json.dumps(COCO), "annotations/instances_all.json": json.dumps(BOXES)},
    "a file a split": {**PICTURES, "train.csv": rows("a.jpg"), "val.csv": rows("b.jpg"), "test.csv": rows("c.jpg")},
    "a folder of tables": {**PICTURES, "captions/train.csv": rows(*NAMES[:2]), "captions/test.csv": rows("c.jpg")},
    "tars": {"00000.tar": tar_of("a", "b"), "00001.tar": tar_of("c")},
    "parquet": {"data/train-00000-of-00001.parquet": parquet_of(table_of(*NAMES))},
    "saved": {
        "data-00000-of-00001.arrow": arrow_of(table_of(*NAMES)),
        "cache-1234.arrow": arrow_of(table_of("other.jpg")),
        "state.json": json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}),
    },
    "saved splits": {
        "train/data-00000-of-00001.arrow": arrow_of(table_of(*NAMES[:2])),
        "test/data-00000-of-00001.arrow": arrow_of(table_of("c.jpg")),
        "dataset_dict.json": json.dumps({"splits": ["train", "test"]}),
    },
}  # fmt: skip
JUNK = {
    "dataset_info.json": json.dumps({"features": {"image": {"_type": "Image"}}, "splits": {"train": {"name": "train"}}}),
    "dataset_infos.json": json.dumps({"default": {"features": {}, "splits": {}}}),
    "README.md": "---\n---\n", "README.txt": "A dataset of pictures, with captions.\n", "LICENSE": "MIT",
    "package.json": json.dumps({"name": "x", "scripts": {"a": "b"}}), ".gitattributes": "*.jpg filter=lfs", ".DS_Store": "x",
    "._a.jpg": b"\0\5\x16\7", ".hidden.jpg": jpeg(), ".git/config": "x", "Thumbs.db": "x", "__pycache__/x.pyc": "x",
    "00000.parquet": urls(), "00000_stats.json": json.dumps({"count": 5, "status": {"success": 4}}),
    ".00000.parquet.crc": "crc", "scores.csv": "name,score\nx,1\n", "1.tar.gz": b"\x1f\x8b123", "notes.jsonl": '{"a": 1}\n',
}  # fmt: skip


def keys(dataset):
    """The captions of a dataset, and whether its pictures can be had."""
    for record in dataset.records:
        assert load(record.source)
    return sorted(caption for record in dataset.records for caption in record.captions)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.sets(st.sampled_from(sorted(JUNK))), st.booleans())
def test_junk_and_a_workspace_beside_the_data_change_no_record(tmp_path_factory, layout, junk, workspace):
    folder = write_files(tmp_path_factory.mktemp("layout"), LAYOUTS[layout])
    if "parquet" in layout or "saved" in layout:
        junk = junk - {"00000.parquet"}
    write_files(
        folder, {name: JUNK[name] for name in junk if not (folder / name).exists()} | (FEATURES if workspace else {})
    )
    assert keys(read(folder)) == [
        f"picture {name.split('.')[0]}" if layout == "tars" else f"picture {name}" for name in NAMES
    ]


@pytest.mark.parametrize("layout", ["a file a split", "a folder of tables", "saved splits"])
def test_the_names_of_the_files_tell_the_splits(tmp_path, layout):
    splits = read(write_files(tmp_path, LAYOUTS[layout])).records.splits
    assert (splits["test"], sum(splits.values())) == (1, 3)


def test_the_files_that_were_not_read_are_said(tmp_path):
    write_files(
        tmp_path,
        {
            **LAYOUTS["tars"],
            **FEATURES,
            "1.tar.gz": b"\x1f\x8b1",
            "00000.parquet": urls(),
            ".x.jpg": "",
            "a.jpg": jpeg(),
        },
    )
    found = read(tmp_path).found
    for part in (
        "1 compressed file (1.tar.gz)", "1 Parquet file (00000.parquet)", "1 hidden file (.x.jpg)",
        "1 folder that qf wrote (qf-out)", "1 picture beside them (a.jpg)",
    ):  # fmt: skip
        assert part in found


def test_several_tables_that_could_each_be_the_dataset_are_named(tmp_path):
    write_files(
        tmp_path, {**PICTURES, "english.csv": rows(*NAMES), "german.csv": rows(*NAMES).replace("picture", "Bild")}
    )
    with pytest.raises(DatasetError, match=r"holds english\.csv and german\.csv; name the one to read"):
        read(tmp_path)
    shutil.copy(tmp_path / "english.csv", tmp_path / "german.csv")  # a copy is no other table
    assert len(read(tmp_path).records) == 3
    write_files(tmp_path, {"german.csv": "a,b\n1,2\n"})
    assert len(read(tmp_path).records) == 3


def test_a_folder_without_pictures_and_captions_says_what_was_seen(tmp_path):
    write_files(tmp_path, {"a.mov": "", "b.mov": "", "notes.md": ""})
    with pytest.raises(
        DatasetError, match=r"holds no pictures and no captions \(.*seen: 2 \.mov files, 1 \.md file\); name a caption"
    ):
        read(tmp_path)
    write_files(tmp_path, {**PICTURES, "labels.csv": "image,label\na.jpg,1\n"})
    with pytest.raises(DatasetError, match=r"labels\.csv has no caption column .*--caption-column"):
        read(tmp_path)


def test_a_folder_of_other_json_says_what_is_needed(tmp_path):
    write_files(tmp_path, {"package.json": JUNK["package.json"], "x/config.json": "{}"})
    with pytest.raises(DatasetError, match=r"holds no pictures and no captions \(.*seen: 2 \.json files"):
        read(tmp_path)
    write_files(tmp_path, {f"annotations/instances_{split}.json": json.dumps(BOXES) for split in ("train", "val")})
    with pytest.raises(DatasetError, match=r"name COCO's captions_"):
        read(tmp_path)


def test_pictures_are_known_by_their_first_bytes_where_the_suffix_says_nothing(tmp_path):
    write_files(
        tmp_path,
        {
            "a.jpe": jpeg(),
            "a.txt": "x",
            "b": jpeg(),
            "b.txt": "y",
            "c.jpg_large": jpeg(),
            "c.txt": "z",
            "d": "no picture",
        },
    )
    assert [(r.key, r.captions) for r in read(tmp_path).records] == [
        ("a.jpe", ("x",)),
        ("b", ("y",)),
        ("c.jpg_large", ("z",)),
    ]


def test_a_folder_that_qf_wrote_is_no_source(tmp_path):
    write_files(tmp_path, FEATURES)
    for source in ("qf-out/features", "qf-out/features/shard-00000.tar", "qf-out/runs/stage2"):
        with pytest.raises(DatasetError, match="was written by qf; give the dataset"):
            read(tmp_path / source)
    with pytest.raises(DatasetError, match="holds no pictures and no captions"):
        read(write_files(tmp_path, {"qf-out/note.txt": ""}) / "qf-out" / "runs")


def test_a_source_in_the_folder_that_is_written_is_refused(tmp_path):
    write_files(tmp_path, {"out/features/a.csv": rows("a.jpg"), "b.csv": rows("a.jpg")})
    folder = tmp_path / "out" / "features"
    for source in (folder, folder / "a.csv", folder / "*.csv", folder / ".." / "features" / "a.csv"):
        with pytest.raises(DatasetError, match="lies in .*which qf extract writes; choose another --workspace"):
            check_apart([source], folder)
    check_apart([tmp_path, tmp_path / "b.csv"], folder)


@pytest.mark.parametrize(
    "name", ["d.csv", "d.jsonl", "d.json", "d.tar", "d.parquet", "metadata.csv", "captions_val.json"]
)
def test_a_git_lfs_pointer_is_called_that(tmp_path, name):
    write_files(tmp_path, {name: POINTER + b"\noid sha256:0\nsize 3\n", "a.jpg": jpeg()})
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DatasetError, match="is a Git LFS pointer.*git lfs pull"):
            read(source)


def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    write_files(tmp_path, LAYOUTS["sidecars"])
    for name in ("pipe.csv", "pipe", "metadata.csv", "pipe.tar", "0.parquet"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "x.json"))
        assert len(read(tmp_path).records) == 3
    for source in (tmp_path / "pipe.csv", tmp_path / "x.json", Path("/dev/null")):
        with pytest.raises(DatasetError, match="no regular file but a pipe, socket or device"):
            read(source)


def test_zips_and_pictures_as_a_source_say_what_to_give(tmp_path):
    write_files(tmp_path, {"a.zip": b"PK\x03\x04xx", "a.jpg": jpeg()})
    with pytest.raises(DatasetError, match="is a zip archive; unzip it"):
        read(tmp_path / "a.zip")
    with pytest.raises(DatasetError, match="is a picture; give the folder"):
        read(tmp_path / "a.jpg")


def test_a_name_that_is_nearly_that_of_the_source_is_said(tmp_path):
    write_files(tmp_path, {"Photos.csv": rows("a.jpg")})
    with pytest.raises(DatasetError, match=r"photos\.CSV does not exist; .*Photos\.csv does"):
        read(tmp_path / "photos.CSV")


def test_images_may_lie_deeper_than_the_option_says_if_the_place_is_certain(tmp_path):
    write_files(tmp_path, {"d.csv": rows(*NAMES), **{f"far/deep/{name}": jpeg() for name in NAMES}})
    options = ReadOptions(images=tmp_path / "far")
    assert load(read(tmp_path / "d.csv", options).records[0].source) == tmp_path / "far" / "deep" / "a.jpg"
