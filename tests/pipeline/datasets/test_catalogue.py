"""The catalogue is a sequence of records that takes no memory to speak of."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.datasets.catalogue import BATCH, Catalogue
from qf.pipeline.datasets.records import Record
from qf.pipeline.datasets.sources import FileSlice, ImageFile, ParquetCell
from qf.pipeline.errors import DatasetError
from qf.pipeline.files import sha256_json

SOURCES = st.one_of(
    st.none(),
    st.builds(ImageFile, st.sampled_from(["/a", "b"]), st.text(st.characters(codec="utf-8"))),
    st.builds(FileSlice, st.sampled_from(["c.tar", "/a"]), st.integers(0, 2**60), st.integers(0, 2**60)),
    st.builds(
        ParquetCell, st.just("d"), st.sampled_from(["image.bytes", "jpg"]), st.integers(0, 99), st.integers(0, 99)
    ),
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
RECORDS = st.builds(
    Record, TEXT, TEXT, SOURCES, st.lists(TEXT, max_size=3).map(tuple), st.sampled_from(["train", "val", "test"]),
    st.sampled_from(["", "broken"]),
)  # fmt: skip


def sha256_of(records):
    used = [r.captions if r.captions or r.problem else None for r in records]
    return sha256_json([[r.key, r.image, captions, r.split] for r, captions in zip(records, used, strict=True)])


@given(st.lists(RECORDS, unique_by=lambda record: record.key, max_size=20), st.slices(20))
def test_what_goes_in_comes_out(records, at):
    catalogue = Catalogue(iter(records))
    assert list(catalogue) == records
    assert catalogue[at] == records[at]
    assert catalogue.sha256 == sha256_of(records)
    good = [r for r in records if not r.problem]
    for split in ("train", "val", "test"):
        assert catalogue.splits[split] == sum(r.split == split for r in good)
        assert catalogue.captions[split] == sum(len(r.captions) for r in good if r.split == split)


@given(st.lists(RECORDS, unique_by=lambda record: record.key, max_size=20))
def test_splits_are_drawn_only_where_all_is_train(records):
    catalogue = Catalogue(records, lambda key: "test" if "a" in key else "val")
    if all(r.split == "train" for r in records if not r.problem):
        records = [replace(r, split="test" if "a" in r.key else "val") for r in records]
    expected = Catalogue(records)
    assert list(catalogue) == records
    assert (catalogue.splits, catalogue.captions) == (expected.splits, expected.captions)
    assert catalogue.sha256 == expected.sha256


def many(count):
    return (Record(f"{n}", f"{n}.jpg", ImageFile("/f", f"{n}.jpg"), (f"caption {n}",), "train") for n in range(count))


def test_slices_across_batches():
    records, catalogue = list(many(2 * BATCH + 5)), Catalogue(many(2 * BATCH + 5))
    for at in (
        slice(0, 3),
        slice(BATCH - 2, BATCH + 2),
        slice(100, 2 * BATCH + 1),
        slice(-7, None),
        slice(None, None, 999),
    ):
        assert catalogue[at] == records[at]
    assert (catalogue[0], catalogue[-1], catalogue[BATCH]) == (records[0], records[-1], records[BATCH])
    assert catalogue.sha256 == sha256_of(records)
    with pytest.raises(IndexError):
        catalogue[len(records)]


def test_keys_that_repeat_are_found_far_apart():
    records = list(many(2 * BATCH + 5))
    with pytest.raises(DatasetError, match=r"two images have the key '17'; keys must be unique \(--key-column"):
        Catalogue([*records, records[17]])


def test_half_a_surrogate_pair_is_replaced():
    half = Record("k", "a.jpg", ImageFile("/f", "a.jpg"), ("a \ud83d dog",), "train")
    name = Record("\udcff", "\udcff.jpg", ImageFile("/f", "\udcff.jpg"), ("x",), "train")
    first, second = Catalogue([half, name])
    assert (first.source, first.captions) == (half.source, ("a ? dog",))
    assert (second.source, second.problem) == (None, "its name is no valid Unicode")


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    """A tmpfs too small for the records."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        with pytest.raises(DatasetError, match=f"{tmp_path} is full.*set TMPDIR"):
            Catalogue(many(20_000))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)


CODE = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
from test_catalogue import Catalogue, many
def memory():  # that the process itself holds, without mapped files
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
list(Catalogue(many(20_000)))
before, started, peak = memory(), time.perf_counter(), 0
count = int(sys.argv[2])
catalogue = Catalogue(many(count))
made = time.perf_counter() - started
for n, record in enumerate(catalogue):
    if n % 10_000 == 0:
        assert record.image == f"{n}.jpg", record
        peak = max(peak, memory())
print(count, peak - before, round(count / made), round(count / (time.perf_counter() - started - made)))
"""


def test_memory_stays_flat():
    """300,000 records, 8 bytes each while keys are compared and 20 MB of slack; as Python objects they take 150 MB.

    Run with 10,000,000 as the last argument it is the figure for ten million."""
    from pathlib import Path

    command = [sys.executable, "-c", CODE, str(Path(__file__).parent), "300000"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert not out.returncode, out.stderr
    count, growth, _, _ = map(int, out.stdout.split())
    assert growth < 20 + 8 * count / 2**20
