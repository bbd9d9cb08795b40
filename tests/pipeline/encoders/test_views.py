"""Augmented views: parts of the picture, the same for ever, as the parameters in the shard say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.views import AREA, View, draw_view
from qf.pipeline.images import load_image

from conftest import run_extract  # isort: skip

sides = st.integers(1, 3000)


@given(st.integers(0, 9), st.text(max_size=5), st.integers(1, 9), sides, sides, st.booleans(), st.floats(0.1, 10))
def test_a_view_is_a_part_of_the_picture(seed, key, number, width, height, flip, aspect):
    view = draw_view(seed, key, number, width, height, flip, aspect)
    assert view == draw_view(seed, key, number, width, height, flip, aspect)
    assert 0 <= view.left < view.right <= width
    assert 0 <= view.top < view.bottom <= height
    assert flip or not view.flip


def test_views_cover_what_they_promise():
    views = [draw_view(0, f"{n}", 1, 500, 400, True, 1.25) for n in range(2000)]
    areas = np.array([(v.right - v.left) * (v.bottom - v.top) for v in views]) / (500 * 400)
    assert areas.max() <= 1.0
    assert 0.37 < areas.min() < AREA[0]
    assert 0.6 < areas.mean() < 0.7
    assert 900 < sum(view.flip for view in views) < 1100
    assert len({(v.left, v.top) for v in views}) > 1000
    assert draw_view(0, "a", 1, 500, 400, True, 1.25) != draw_view(0, "a", 2, 500, 400, True, 1.25)
    assert draw_view(0, "a", 1, 500, 400, True, 1.25) != draw_view(1, "a", 1, 500, 400, True, 1.25)


@pytest.mark.parametrize("size", [(900, 300), (300, 900), (640, 480), (500, 500)])
def test_what_is_seen_is_hardly_distorted(size, clip_folder):
    """An encoder that cuts a square out of a picture sees views that are nearly square, too, and half of what it can."""
    preprocessing = load_encoder(str(clip_folder), torch.device("cpu"), torch.float32).preprocessing
    assert preprocessing.aspect(*size) == 1.0
    for number in range(300):
        view = draw_view(0, "a", number, *size, True, preprocessing.aspect(*size))
        across, down = view.right - view.left, view.bottom - view.top
        assert 0.74 < across / down < 1.35
        assert across * down > 0.37 * min(size) ** 2
    squashing = replace(preprocessing, shortest_edge=None, squash=(32, 32))
    assert squashing.aspect(*size) == size[0] / size[1]


def test_the_picture_is_cut_resized_and_mirrored(clip_folder):
    preprocessing = load_encoder(str(clip_folder), torch.device("cpu"), torch.float32).preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    image = Image.fromarray(pixels)
    got = preprocessing.view(image, View(10, 5, 74, 53, False))
    expected = image.crop((10, 5, 74, 53)).resize((32, 32), preprocessing.resample)
    assert np.array_equal(got, np.asarray(expected).transpose(2, 0, 1))
    mirrored = preprocessing.view(image, View(10, 5, 74, 53, True))
    assert np.array_equal(mirrored, got[:, :, ::-1])


def test_features_of_views_are_those_of_their_crops(tmp_path, pictures, clip_folder):
    """Training images have them, others not; what the shard says of each gives the same features again."""
    options = {"views": 2, "seed": 3, "codec": "float32", "shard_size": 7, "batch_size": 4}
    features = run_extract(pictures, clip_folder, tmp_path / "features", **options)
    assert features.views == 2
    assert features.manifest["augmentation"] == {"flip": True, "seed": 3}
    plain = run_extract(pictures, clip_folder, tmp_path / "plain", codec="float32")
    assert torch.allclose(features.read(features.rows())["tokens"], plain.read(plain.rows())["tokens"], atol=1e-5)
    encoder = load_encoder(str(clip_folder), torch.device("cpu"), torch.float32)
    said = features.table.column("views").to_pylist()
    assert {len(said[row]) for row in features.rows("val")} == {0}
    for row in features.rows("train"):
        image = load_image(pictures.parent / features.keys[row])
        assert [View(**view) for view in said[row]] == [
            draw_view(3, features.keys[row], number, *image.size, True, 1.0) for number in (1, 2)
        ]
        for number, view in enumerate(said[row], start=1):
            again, _ = encoder.encode(encoder.preprocessing.view(image, View(**view))[None])
            stored = features.read(np.array([row]), np.array([number]))["tokens"]
            assert torch.allclose(stored, again, atol=1e-5)
    changed = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert changed["views"] == 2
