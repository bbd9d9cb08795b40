"""Index files, what they remember, and what they refuse."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from qf.pipeline.artifacts import described, read_manifest
from qf.pipeline.config import ComputeOptions
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import ArtifactError
from qf.pipeline.features.reader import Features
from qf.pipeline.schema import INDEX_COLUMNS
from qf.pipeline.workspace import Workspace
from qf.retrieval.encode.qformer import Run
from qf.retrieval.index import vectors
from qf.retrieval.index.manifest import INDEX
from qf.retrieval.index.rows import save_rows
from qf.retrieval.index.space import Space
from qf.retrieval.index.store import make_index, open_index, save_index
from qf.retrieval.index.vectors import make_vectors
from qf.retrieval.journey import index_run
from qf.retrieval.search import Ranking
from qf.retrieval.searcher import Searcher, open_searcher
from qf.retrieval.verify import verify

from conftest import reseal, run_extract  # isort: skip

CPU, ON = torch.device("cpu"), ComputeOptions("cpu", "float32")

ONE = {"type": "flat", "slots": [0], "recall": None, "why": ""}  # vector an image


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(trained, tmp_path / "work")


def test_the_index_holds_every_query_embedding_and_caption(trained):
    index = open_index(trained / "index")
    features = Features(trained / "features")
    run = Run(trained / "runs" / "stage1", CPU, "float32")
    images = run.embedder.images(features, features.rows()).numpy()
    space, own = index.spaces["itc"], index.spaces["clip"]
    assert np.allclose(space.images.reconstruct_n(0, 24 * 4).reshape(images.shape), images, atol=1e-6)
    captions = [caption for some in features.captions for caption in some]
    texts = run.embedder.texts(captions).numpy()
    assert np.allclose(space.texts.reconstruct_n(0, 48), texts, atol=1e-6)
    assert (own.images.reconstruct_n(0, 24) == features.pooled).all()
    assert np.allclose(own.texts.reconstruct_n(0, 48), TextModel(features.encoder, CPU).encode(captions), atol=1e-3)
    assert index.rows.texts(np.arange(48)) == captions
    assert [row["captions"][0] for row in index.rows_of(index.rows.owners(np.arange(0, 48, 2)))] == captions[::2]
    manifest = read_manifest(trained / "index", INDEX)
    assert (manifest["images"], manifest["vectors"], manifest["texts"]) == (24, 24 * 4, 48)


def test_thumbnails_may_weigh_more_than_2_gib():
    """Three chunks of 900 MB that nobody touches, as features have them, a chunk a shard."""

    def shard(number):
        offsets = np.array([0, 3, 900_000_000], np.int32)
        data = np.zeros(900_000_000, np.uint8)
        data[:3] = number
        binary = pa.Array.from_buffers(pa.binary(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
        names = [f"{number}a", f"{number}b"]
        return pa.table([names, ["val"] * 2, names, [["x"], ["y"]], binary], list(INDEX_COLUMNS))

    table = pa.concat_tables([shard(number) for number in range(3)])
    features = SimpleNamespace(table=table, captions=table.column("captions").to_pylist(), encoder={})
    index = make_index(features, {}, {})
    hits = Searcher(index, features, CPU)._hits(Ranking(np.array([4, 0]), np.array([2.0, 1.0])), 2)
    assert [(hit.key, hit.thumbnail) for hit in hits] == [("2a", b"\2\2\2"), ("0a", b"\0\0\0")]


def test_a_moved_workspace_still_opens(workspace):
    assert len(open_searcher(Workspace(workspace), ON).index) == 24


def test_an_index_of_another_model_is_refused(workspace):
    reseal(workspace / "runs" / "stage1" / "manifest.json", sha256="0" * 64)
    with pytest.raises(ArtifactError, match="built from another model.*rebuild it with `qf index`"):
        open_searcher(Workspace(workspace), ON)


def test_features_of_another_encoder_are_refused(workspace, pictures, onnx_folder):
    shutil.rmtree(workspace / "features")
    run_extract(pictures, onnx_folder, workspace / "features")
    with pytest.raises(ArtifactError, match=r"trained on features of encoder .* \(sha256 \w{12}\)"):
        open_searcher(Workspace(workspace), ON)


def test_the_same_pictures_in_another_codec_are_other_features(workspace, pictures, clip_folder):
    assert not verify(workspace / "index").problems
    shutil.rmtree(workspace / "features")
    run_extract(pictures, clip_folder, workspace / "features", codec="float32")
    with pytest.raises(ArtifactError, match="built from other features"):
        open_searcher(Workspace(workspace), ON)
    assert "built from other features" in verify(workspace / "index").problems[0]


def test_a_damaged_index_is_refused(workspace):
    file = workspace / "index" / "images.faiss"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged.*qf index"):
        open_index(workspace / "index")
    (workspace / "index" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished.*qf index"):
        open_index(workspace / "index")


def test_an_index_of_an_earlier_version_is_refused_and_rebuilt_whole(workspace):
    folder = workspace / "index"
    manifest = read_manifest(folder, INDEX)
    kept = [file for file in manifest["files"] if not file["file"].startswith("rows.")]
    (folder / "rows.bin").rename(folder / "rows.arrow")
    reseal(folder / "manifest.json", files=[*kept, described(folder / "rows.arrow")])
    with pytest.raises(ArtifactError, match="written by an earlier version of qf; rebuild it with `qf index`"):
        open_index(folder)
    index_run(Workspace(workspace), None, ON, print)
    assert len(open_index(folder)) == 24
    assert not (folder / "rows.arrow").exists()


@pytest.mark.parametrize("change", [{"key": 7}, {"captions": ["one"]}], ids=["a wrong type", "too few captions"])
def test_rows_that_are_crafted_with_the_right_checksum_are_refused(workspace, change):
    folder = workspace / "index"
    rows = open_index(folder).rows
    save_rows(replace(rows, read=lambda number: rows.read(number) | change), workspace)
    for name in ("rows.bin", "rows.starts"):
        shutil.move(workspace / name, folder / name)
    files = [described(folder / file["file"]) for file in read_manifest(folder, INDEX)["files"]]
    reseal(folder / "manifest.json", files=files)
    with pytest.raises(ArtifactError, match="damaged.*rebuild it with `qf index`"):
        open_index(folder)


def test_an_index_that_is_rebuilt_while_it_is_opened_is_read_whole(workspace, monkeypatch):
    folder, files = workspace / "index", []
    before = open_index(folder)
    origin = {name: before.manifest[name] for name in ("run", "features")}

    def read_vectors(path, type):
        if not files:  # another process rebuilds the index between two files
            space = Space.of(np.ones((24, 4, 256)), np.zeros((48, 256)))
            other = make_index(Features(workspace / "features"), before.spaces | {"itc": space}, origin)
            save_index(other, folder)
        files.append(path.name)
        return vectors.read_vectors(path, type)

    monkeypatch.setattr("qf.retrieval.index.space.read_vectors", read_vectors)
    index = open_index(folder)
    assert index.first.images.reconstruct(0)[0] == 1
    assert index.first.texts.reconstruct(0)[0] == 0


@pytest.mark.parametrize("file", ["images.faiss", "encoder_images.faiss"])
@pytest.mark.parametrize(
    "make",
    [
        lambda faiss, old: faiss.IndexIDMap(faiss.IndexFlatIP(old.d)),
        lambda faiss, old: faiss.IndexFlatL2(old.d),
        lambda faiss, old: faiss.IndexFlatIP(old.d),
        lambda faiss, old: make_vectors(np.ones((old.ntotal, old.d + 1), np.float32)),
        lambda faiss, old: make_vectors(np.full((old.ntotal, old.d), np.nan, np.float32)),
    ],
    ids=["an IDMap", "another metric", "no vectors", "another dimension", "NaN"],
)
def test_a_crafted_index_with_the_right_checksum_is_refused(workspace, make, file):
    faiss = vectors.import_faiss()
    path = workspace / "index" / file
    path.write_bytes(faiss.serialize_index(make(faiss, faiss.read_index(str(path)))).tobytes())
    manifest = read_manifest(workspace / "index", INDEX)
    files = [described(workspace / "index" / file["file"]) for file in manifest["files"]]
    reseal(workspace / "index" / "manifest.json", files=files)
    with pytest.raises(ArtifactError, match="rebuild it with `qf index`"):
        open_index(workspace / "index")


def test_a_header_that_promises_too_many_vectors_is_refused(workspace):
    path = workspace / "index" / "images.faiss"
    data = bytearray(path.read_bytes())
    data[8:16] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"no room for 1,099,511,627,776 vectors"):
        vectors.read_vectors(path, "flat")


@pytest.mark.parametrize("path", ["a\0b", "\ud800"], ids=["null byte", "half a surrogate pair"])
def test_an_index_of_a_folder_that_cannot_exist_is_refused(workspace, path):
    run = read_manifest(workspace / "index", INDEX)["run"]
    reseal(workspace / "index" / "manifest.json", run=run | {"path": path})
    with pytest.raises(ArtifactError, match="names no folder of its run; rebuild it with `qf index`"):
        open_searcher(Workspace(workspace), ON)
    assert "names no folder of its run" in verify(workspace / "index").problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"run": None},
        {"spaces": {"clip": ONE}},
        {"spaces": {"itc": {**ONE, "slots": [0] * 5}, "clip": ONE}},
        {"vectors": 5},
    ],
)
def test_a_manifest_that_does_not_fit_the_files_is_refused(workspace, changes):
    reseal(workspace / "index" / "manifest.json", **changes)
    with pytest.raises(ArtifactError, match="is not what its manifest says; rebuild it with `qf index`"):
        open_index(workspace / "index")
