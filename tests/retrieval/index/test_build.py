"""Building an index from features and any encoder that has the face."""

from pathlib import Path

import numpy as np
from qf.pipeline.artifacts import read_manifest
from qf.pipeline.features.reader import Features
from qf.retrieval.index.build import build_index
from qf.retrieval.index.manifest import INDEX
from qf.retrieval.index.store import open_index


class Counting:
    """Two embeddings an image, one for each text: their positions, in batches of five images."""

    folder, manifest, per_image, width = Path("runs/counting"), {"sha256": "0" * 64}, 2, 3

    def images(self, features):
        every = np.arange(len(features) * 2 * 3, dtype=np.float32).reshape(-1, 2, 3)
        yield from (every[start : start + 5] for start in range(0, len(every), 5))

    def texts(self, texts):
        return np.arange(len(texts) * 3, dtype=np.float32).reshape(-1, 3)


def test_batches_of_images_lie_in_the_order_of_the_features(trained, tmp_path):
    features = Features(trained / "features")
    result = build_index(Counting(), features, tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert index.images.reconstruct_n(0, index.images.ntotal).ravel().tolist() == list(range(24 * 2 * 3))
    assert index.texts.reconstruct_n(0, index.texts.ntotal).ravel().tolist() == list(range(48 * 3))
    assert (result.images, result.vectors, result.texts, result.type) == (24, 48, 48, "flat")


def test_the_result_is_what_scripts_and_people_read(trained, tmp_path):
    result = build_index(Counting(), Features(trained / "features"), tmp_path / "index")
    manifest = read_manifest(tmp_path / "index", INDEX)
    assert list(result.to_json()) == ["images", "vectors", "texts", "type", "bytes", "seconds", "index"]
    assert result.bytes == manifest["bytes"] == sum(file["bytes"] for file in manifest["files"])
    assert str(result).startswith("index     24 images as 48 vectors, 48 texts; ")


def test_building_twice_gives_the_same_bytes(trained, tmp_path):
    files = []
    for name in ("first", "second"):
        build_index(Counting(), Features(trained / "features"), tmp_path / name)
        files.append([file["sha256"] for file in read_manifest(tmp_path / name, INDEX)["files"]])
    assert files[0] == files[1]
