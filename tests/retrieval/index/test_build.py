"""Building an index from features and any encoders that have the face."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from qf.pipeline.artifacts import read_manifest
from qf.pipeline.features.reader import Features
from qf.retrieval.config import IndexOptions
from qf.retrieval.encode.joint_space import JointSpace
from qf.retrieval.index.build import build_index
from qf.retrieval.index.manifest import INDEX
from qf.retrieval.index.store import open_index
from qf.retrieval.verify import verify

from conftest import run_extract  # isort: skip

CPU = torch.device("cpu")


class Counting:
    """Two embeddings an image, one for each text: their positions, in batches of five images."""

    name, per_image, width = "itc", 2, 3
    folder, manifest = Path("runs/counting"), {"sha256": "0" * 64}

    def images(self, features):
        every = np.arange(len(features) * 2 * 3, dtype=np.float32).reshape(-1, 2, 3)
        yield from (every[start : start + 5] for start in range(0, len(every), 5))

    def for_queries(self):
        return None

    def captions(self, features):
        return np.arange(sum(map(len, features.captions)) * 3, dtype=np.float32).reshape(-1, 3)


def test_batches_of_images_lie_in_the_order_of_the_features(trained, tmp_path):
    features = Features(trained / "features")
    result = build_index([Counting()], Counting(), features, tmp_path / "index")
    space = open_index(tmp_path / "index").spaces["itc"]
    assert space.images.reconstruct_n(0, 24 * 2).ravel().tolist() == list(range(24 * 2 * 3))
    assert space.texts.reconstruct_n(0, 48).ravel().tolist() == list(range(48 * 3))
    assert (result.images, result.vectors, result.texts, result.type) == (24, 48, 48, "flat")


def test_the_result_is_what_scripts_and_people_read(trained, tmp_path):
    result = build_index([Counting()], Counting(), Features(trained / "features"), tmp_path / "index")
    manifest = read_manifest(tmp_path / "index", INDEX)
    assert list(result.to_json()) == ["images", "vectors", "texts", "type", "bytes", "seconds", "index", "why"]
    assert result.bytes == manifest["bytes"] == sum(file["bytes"] for file in manifest["files"])
    assert str(result).startswith("index     24 images as 48 vectors, 48 texts; ")


def test_building_twice_gives_the_same_bytes(trained, tmp_path):
    files = []
    for name in ("first", "second"):
        build_index([Counting()], Counting(), Features(trained / "features"), tmp_path / name)
        files.append([file["sha256"] for file in read_manifest(tmp_path / name, INDEX)["files"]])
    assert files[0] == files[1]


def test_an_index_without_a_run_is_of_the_encoders_own_space(features, tmp_path):
    result = build_index([JointSpace(features.encoder, CPU)], None, features, tmp_path / "index")
    assert (result.images, result.vectors, result.texts) == (24, 24, 48)
    assert read_manifest(tmp_path / "index", INDEX)["run"] is None
    index = open_index(tmp_path / "index")
    assert list(index.spaces) == ["clip"]
    assert (index.first.images.reconstruct_n(0, 24) == features.pooled).all()
    assert sorted(path.name for path in (tmp_path / "index").glob("*.faiss")) == [
        "encoder_images.faiss",
        "encoder_texts.faiss",
    ]
    assert verify(tmp_path / "index").problems == []


def test_images_without_captions_are_indexed(pictures, clip_folder, tmp_path):
    bare = shutil.copytree(pictures.parent, tmp_path / "photos", ignore=shutil.ignore_patterns("*.csv"))
    features = run_extract(bare, clip_folder, tmp_path / "features")
    result = build_index([JointSpace(features.encoder, CPU)], None, features, tmp_path / "index")
    assert (result.images, result.texts) == (24, 0)
    assert len(open_index(tmp_path / "index")) == 24
    assert verify(tmp_path / "index").problems == []


class Drawn(Counting):
    """Random embeddings of unit length, eight an image; captions lie near the first two of their image."""

    per_image, width = 8, 32

    def images(self, features):
        draw = np.random.default_rng(0).normal(size=(len(features), 8, 32)).astype(np.float32)
        every = draw / np.linalg.norm(draw, axis=-1, keepdims=True)
        every[:, 2:] = -every[:, :1]
        yield from (every[start : start + 5] for start in range(0, len(every), 5))

    def captions(self, features):
        every = np.concatenate(list(self.images(features)))
        return np.concatenate([every[n, np.arange(len(some)) % 2] for n, some in enumerate(features.captions)])


@pytest.mark.parametrize(("type", "stored"), [("sq8", "sq8"), ("fp16", "fp16"), ("auto", "sq8")])
def test_a_small_index_keeps_what_wins(trained, tmp_path, monkeypatch, type, stored):
    monkeypatch.setattr("qf.retrieval.index.build.SAMPLE", 10)
    features = Features(trained / "features")
    whole = build_index([Drawn()], Drawn(), features, tmp_path / "whole")
    result = build_index([Drawn()], Drawn(), features, tmp_path / "index", IndexOptions(type, 0.9, 0.0))
    assert (result.type, result.vectors) == (stored, 24 * 2)
    assert result.bytes < whole.bytes
    assert "recall@10" in str(result)
    space = open_index(tmp_path / "index").spaces["itc"]
    wanted = np.concatenate(list(Drawn().images(features)))[:, :2]
    found = space.images.reconstruct_n(0, 48).reshape(24, 2, 32)
    assert np.abs(found - wanted)[:10].max() < 0.01
    assert read_manifest(tmp_path / "index", INDEX)["spaces"]["itc"]["slots"] == [0, 1]


def test_exact_vectors_stay_while_they_fit(trained, tmp_path):
    result = build_index(
        [Drawn()], Drawn(), Features(trained / "features"), tmp_path / "index", IndexOptions("auto", 0.9, 1.0)
    )
    assert result.type == "flat"
    assert "no more than --max-memory 1 GB" in result.why
