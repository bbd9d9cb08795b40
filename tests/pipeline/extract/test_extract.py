"""Extraction: rejects, resume after SIGKILL, full disks, and features that are never mixed."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from qf.pipeline.artifacts import write_sealed
from qf.pipeline.config import EncoderOptions, ExtractOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import ArtifactError, DatasetError
from qf.pipeline.extract.extract import extract_source
from qf.pipeline.features.manifest import Planned
from qf.pipeline.features.reader import Features

from conftest import make_pictures, run_extract  # isort: skip


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("manifest.json", ".checked.json")}


def test_a_folder_holds_shards_manifest_and_rejects_only(features):
    assert sorted(files(features.folder)) == ["rejects.jsonl", *(f"shard-{n:05d}.arrow" for n in range(4))]
    assert [shard["records"] for shard in features.manifest["shards"]] == [7, 7, 7, 3]
    assert not (features.folder / "rejects.jsonl").read_bytes()


def test_unreadable_pictures_are_rejected_by_name(tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures", copies=3)
    (source.parent / "blue-bar-0.png").write_bytes(b"")
    with open(source, "a") as file:
        file.write("nowhere.png,a thing,train\nred-bar-0.png,,train\n")
    features = run_extract(source, clip_folder, tmp_path / "features", max_rejects=0.1, shard_size=5)
    rejects = [json.loads(line) for line in (tmp_path / "features" / "rejects.jsonl").read_text().splitlines()]
    assert {r["key"]: r["reason"] for r in rejects} == {"blue-bar-0.png": "empty file", "nowhere.png": "no such file"}
    assert len(features) == 35
    assert features.manifest["rejected"] == 2
    assert set(features.keys) & {r["key"] for r in rejects} == set()


def test_tars_and_parquet_files_give_the_same_features(tmp_path, pictures, clip_folder, features):
    """Pictures read from where they lie inside: tokens, splits and captions equal those of the files."""
    records = list(read(pictures).records)
    data = [(pictures.parent / record.image).read_bytes() for record in records]
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for record, content in zip(records, data, strict=True):
            for name, part in (
                (record.image, content),
                (f"{record.image[:-4]}.txt", "\n".join(record.captions).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    images = [{"bytes": content, "path": record.image} for record, content in zip(records, data, strict=True)]
    columns = {
        "image": images,
        "captions": [record.captions for record in records],
        "split": [r.split for r in records],
    }
    pq.write_table(pa.table(columns), tmp_path / "pictures.parquet", row_group_size=10)
    for source in (tmp_path / "pictures.tar", tmp_path / "pictures.parquet"):
        made = run_extract(source, clip_folder, tmp_path / source.suffix[1:], shard_size=7, batch_size=4)
        assert [list(c) for c in made.captions] == [list(c) for c in features.captions]
        assert np.array_equal(made.pooled, features.pooled)
        assert made.manifest["captions"] == 48
    assert made.keys == features.keys


def test_too_many_rejects_fail_and_a_mended_dataset_goes_on(tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("blue-bar-0.png", "blue-bar-1.png"):
        shutil.move(source.parent / name, hidden / name)
    with pytest.raises(
        DatasetError, match=r"2 of 24 records were rejected, more than --max-rejects 0\.05 allows.*no such file"
    ):
        run_extract(source, clip_folder, tmp_path / "features", shard_size=5)
    assert len((tmp_path / "features" / "rejects.jsonl").read_text().splitlines()) == 2
    for path in hidden.iterdir():
        shutil.move(path, source.parent / path.name)
    assert len(run_extract(source, clip_folder, tmp_path / "features", shard_size=5)) == 24


def test_finished_features_are_kept_and_others_never_mixed_in(tmp_path, pictures, clip_folder, onnx_folder):
    folder = tmp_path / "features"
    run_extract(pictures, clip_folder, folder)
    before = files(folder)
    run_extract(pictures, clip_folder, folder)
    assert files(folder) == before
    with pytest.raises(ArtifactError, match=r"made otherwise: encoder was .*clip0 and is now .*onnx0; .*--overwrite"):
        run_extract(pictures, onnx_folder, folder)
    with pytest.raises(ArtifactError, match="codec was 'float16' and is now 'float32'"):
        run_extract(pictures, clip_folder, folder, codec="float32")
    with pytest.raises(ArtifactError, match=r"source was .*pictures0/photos.csv and is now .*fewer/photos.csv"):
        run_extract(make_pictures(tmp_path / "fewer", copies=1), clip_folder, folder)
    assert files(folder) == before
    assert Features(run_extract(pictures, onnx_folder, folder, overwrite=True).folder).encoder["width"] == 3


CODE = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[4])
from conftest import run_extract
run_extract(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), **json.loads(sys.argv[5]))
"""


@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"workers": 3, "codec": "int8", "views": 2}, {"workers": 2, "shard_format": "webdataset"}],
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, clip_folder, options):
    """Ten SIGKILLs each: while records are read, in the middle of shards, between a shard and its note, at the end."""
    source = make_pictures(tmp_path / "pictures", copies=10)
    options = {"shard_size": 5, "batch_size": 2, **options}
    calm = run_extract(source, clip_folder, tmp_path / "calm", **options)
    killed = tmp_path / "killed"
    tests = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", CODE, str(source), str(clip_folder), str(killed), tests, json.dumps(options)]
    draw, kills = random.Random(json.dumps(options)), 0

    def have():
        return len(list(killed.glob("shard-*"))) if killed.is_dir() else 0

    while kills < 10:
        process, before = subprocess.Popen(command), have()
        while process.poll() is None and have() <= before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    subprocess.run(command, check=True)
    assert kills >= 7
    assert not list(killed.glob("*.tmp"))
    assert files(killed) == files(calm.folder)
    assert Features(killed).keys == calm.keys
    assert len(set(calm.keys)) == 120


def test_two_at_once_are_one_too_many(tmp_path, clip_folder):
    """A second extraction into the folder is refused in one line; the first ends undisturbed."""
    source = make_pictures(tmp_path / "pictures", copies=10)
    calm = run_extract(source, clip_folder, tmp_path / "calm", shard_size=10)
    outcomes = []

    def begin_another(status):
        if not outcomes:
            command = [sys.executable, "-m", "qf.cli", "extract", str(source), "--encoder", str(clip_folder), "-q"]
            outcomes.append(subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True))

    features = run_extract(source, clip_folder, tmp_path / "features", shard_size=10, progress=begin_another)
    (second,) = outcomes
    assert second.returncode == 1
    assert second.stderr.startswith("qf: error: another qf is writing ")
    assert len(second.stderr.splitlines()) == 1
    assert files(features.folder) == files(calm.folder)


@pytest.fixture
def disk(tmp_path):
    """A tmpfs of 200 kB, and what gives it room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=False)


def test_what_cannot_fit_is_not_begun(tmp_path, clip_folder, disk):
    """One line with the figures, exit code 1; with room the same command does the work."""
    folder, give_room = disk
    source = make_pictures(tmp_path / "pictures", copies=10)
    command = [sys.executable, "-m", "qf.cli", "extract", str(source), "--encoder", str(clip_folder)]
    command += ["--workspace", str(folder), "--precision", "float32"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 1
    said = out.stderr.strip().splitlines()[-1]
    assert said.startswith("qf: error: the features need about 0.6 MB, and ")
    assert "has 0.2 MB free; free some space, choose another --workspace" in said
    assert not list((folder / "features").glob("shard-*"))
    give_room()
    subprocess.run(command, capture_output=True, check=True)
    assert len(Features(folder / "features")) == 120


def test_a_disk_that_fills_up_loses_nothing(tmp_path, clip_folder, disk):
    """Another process takes the room meanwhile; what is finished stays, and with room the same command goes on."""
    folder, give_room = disk
    give_room()
    source = make_pictures(tmp_path / "pictures", copies=10)

    def fill(status):
        if status.done == 40 and not (folder / "ballast").exists():
            free = shutil.disk_usage(folder).free
            (folder / "ballast").write_bytes(bytes(free - 2**15))

    with pytest.raises(OSError, match="No space left"):
        run_extract(source, clip_folder, folder / "features", shard_size=10, batch_size=5, progress=fill)
    done = {path.name for path in (folder / "features").glob("shard-*.arrow")}
    assert 2 < len(done) < 12
    assert not list((folder / "features").glob("*.tmp"))
    (folder / "ballast").unlink()
    features = run_extract(source, clip_folder, folder / "features", shard_size=10, batch_size=5)
    assert len(features) == 120
    assert files(features.folder) == files(
        run_extract(source, clip_folder, tmp_path / "calm", shard_size=10, batch_size=5).folder
    )


def test_a_dry_run_tells_and_writes_nothing(tmp_path, pictures, clip_folder):
    """What it says of the bytes is near what the features then weigh."""
    command = [sys.executable, "-m", "qf.cli", "extract", str(pictures), "--encoder", str(clip_folder), "--json", "-q"]
    command += ["--workspace", str(tmp_path / "out"), "--views", "1", "--codec", "float32"]
    said = json.loads(subprocess.run([*command, "--dry-run"], capture_output=True, check=True).stdout)
    assert not (tmp_path / "out").exists()
    assert (said["records"], said["captions"]) == (24, 48)
    assert said["splits"] == {"train": 12, "val": 12, "test": 0}
    assert said["sampled_rejects"] == 0
    assert said["images_per_second"] > 0
    assert said["free"] > said["bytes"]
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert 0.6 < made["bytes"] / said["bytes"] < 1.2  # these thumbnails are small


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_both_formats_train_and_search_alike(tmp_path, pictures, clip_folder, codec):
    """The journey on Arrow and on WebDataset shards, to the same scores."""
    hits = []
    for shard_format in ("arrow", "webdataset"):
        common = ["--workspace", str(tmp_path / shard_format), "--precision", "float32", "-q"]
        for arguments in (
            ["extract", str(pictures), "--encoder", str(clip_folder), "--format", shard_format, "--codec", codec],
            ["train", "--epochs", "2", "--batch-size", "4", "--num-query-tokens", "2"],
            ["verify"],
        ):
            where = [str(tmp_path / shard_format), "-q"] if arguments == ["verify"] else common
            subprocess.run([sys.executable, "-m", "qf.cli", *arguments, *where], check=True, capture_output=True)
        search = [sys.executable, "-m", "qf.cli", "search", "a red bar", "--rerank", "4", "--json", *common]
        hits.append(subprocess.run(search, check=True, capture_output=True).stdout)
    assert hits[0] == hits[1]
    assert len(hits[0].splitlines()) == 10


def interrupt(after):
    """A progress that stops extraction once so many records are done."""

    def stop(status):
        if status.done >= after:
            raise KeyboardInterrupt

    return stop


def test_an_interrupted_overwrite_goes_on(tmp_path, pictures, clip_folder):
    """What replaces finished features is resumed like any other extraction, also by the very same command."""
    folder = tmp_path / "features"
    options = {"shard_size": 4, "batch_size": 2, "workers": 1, "codec": "int8", "overwrite": True}
    run_extract(pictures, clip_folder, folder)
    with pytest.raises(KeyboardInterrupt):
        run_extract(pictures, clip_folder, folder, progress=interrupt(16), **options)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".features.new").glob("shard-*.arrow")}
    assert len(Features(folder)) == 24  # the old ones, until the new ones are complete
    assert 2 <= len(done) <= 5
    seen = []
    features = run_extract(pictures, clip_folder, folder, progress=lambda status: seen.append(status.done), **options)
    assert len(features) == 24
    assert min(seen) > 4 * (len(done) - 1)
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done


def test_what_is_refused_destroys_nothing(tmp_path, pictures, clip_folder, monkeypatch):
    """Too little room for what is to replace good features; and the cure that the message names works."""
    folder = tmp_path / "features"
    monkeypatch.setattr("qf.pipeline.extract.estimate.free_bytes", lambda folder: 0)
    with pytest.raises(DatasetError, match="has 0.0 MB free"):
        run_extract(pictures, clip_folder, folder, codec="float32")
    monkeypatch.undo()
    run_extract(pictures, clip_folder, folder, codec="int8")  # not mixed with the plan that was refused
    before = files(folder)
    monkeypatch.setattr("qf.pipeline.extract.estimate.free_bytes", lambda folder: 0)
    with pytest.raises(DatasetError, match="free some space"):
        run_extract(pictures, clip_folder, folder, codec="float32", overwrite=True)
    assert files(folder) == before
    assert Features(folder).manifest["codec"] == "int8"


def test_features_of_nothing_are_refused(tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures", copies=1)
    for picture in source.parent.glob("*.png"):
        picture.write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="12 of 12 records were rejected.*not an image"):
        run_extract(source, clip_folder, tmp_path / "features", max_rejects=1.0)


def test_records_that_the_dataset_itself_refuses_are_counted_first(tmp_path, clip_folder):
    source = make_pictures(tmp_path / "pictures", copies=1)
    with open(source, "a") as file:
        file.writelines(f"nowhere-{n}.png,,train\n" for n in range(3))
    with pytest.raises(
        DatasetError,
        match=r"3 of 15 records cannot be used.*nowhere-0\.png: no caption; 3 have .*--allow-uncaptioned",
    ):
        run_extract(source, clip_folder, tmp_path / "features")
    assert not (tmp_path / "features" / "plan.json").exists()


@pytest.mark.parametrize(("finished", "overwrite"), [(False, False), (False, True), (True, False)])
def test_extraction_goes_on_in_the_precision_that_it_began_with(
    tmp_path, pictures, clip_folder, monkeypatch, finished, overwrite
):
    """As on another machine, where "auto" would choose otherwise."""
    folder = tmp_path / "features"
    options = {"encoder": EncoderOptions(str(clip_folder)), "options": ExtractOptions(shard_size=7)}
    monkeypatch.setattr("qf.pipeline.device.bfloat16_pays", lambda: True)
    extract_source(str(pictures), folder, **options)
    assert Features(folder).encoder["precision"] == "bfloat16"
    bytes_before = {path: path.read_bytes() for path in folder.glob("shard-*")}
    if not finished:  # put back what an interrupt leaves: plan and notes of all shards but the last
        manifest = json.loads((folder / "manifest.json").read_text())
        write_sealed(folder / "plan.json", {name: manifest[name] for name in Planned.__annotations__})
        for shard in manifest["shards"][:-1]:
            write_sealed((folder / shard["file"]).with_suffix(".json"), {**shard, "rejects": []})
        (folder / "manifest.json").unlink()
        (folder / manifest["shards"][-1]["file"]).unlink()
    kept = folder / "shard-00000.arrow"
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr("qf.pipeline.device.bfloat16_pays", lambda: False)
    options["options"] = ExtractOptions(shard_size=7, overwrite=overwrite)
    extract_source(str(pictures), folder, **options)
    assert {path: path.read_bytes() for path in folder.glob("shard-*.arrow")} == bytes_before
    assert kept.stat().st_mtime_ns == written


def test_finished_features_that_are_replaced_take_the_precision_of_this_machine(
    tmp_path, pictures, clip_folder, monkeypatch
):
    folder, encoder = tmp_path / "features", EncoderOptions(str(clip_folder))
    for pays, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("qf.pipeline.device.bfloat16_pays", lambda pays=pays: pays)
        extract_source(str(pictures), folder, encoder, options=ExtractOptions(overwrite=True))
        assert Features(folder).encoder["precision"] == precision
