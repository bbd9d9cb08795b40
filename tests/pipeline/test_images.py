import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qf.pipeline.errors import EncoderError
from qf.pipeline.images import Preprocessing, UnreadableImage, load_image, thumbnail

ODD = Path(__file__).resolve().parents[3] / "shared" / "data" / "odd-images"


def noise(width, height, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1}[mode]
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def smooth(width, height):
    wave = (
        np.sin(np.arange(width) / 60)[None, :, None]
        * np.cos(np.arange(height) / 30)[:, None, None]
        * np.array([90, 60, 30])
    )
    return Image.fromarray((128 + wave).astype(np.uint8))


def encoded(image, format_="PNG", **more):
    data = io.BytesIO()
    image.save(data, format_, **more)
    return data.getvalue()


CONFIGS = {
    "clip": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "small crop": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 28}},
    "large crop": {"size": {"shortest_edge": 24}, "crop_size": {"height": 33, "width": 33}},
    "bilinear": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "squash": {"size": {"height": 32, "width": 24}, "do_center_crop": False},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(64, 48), (47, 93), (33, 32), (9, 7), (1, 1), (3000, 120), (500, 333)])
def test_equals_the_processor_of_transformers(name, shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**CONFIGS[name])
    ours = Preprocessing.from_config(processor.to_dict())
    image = noise(*shape) if max(shape) < 1000 else smooth(*shape)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (ours.mean, ours.std))
    got = (ours(image).astype(np.float32) * ours.rescale_factor - mean) / std
    assert got.shape == expected.shape
    # a panorama is cut before it is resized, which may round a little otherwise
    assert np.abs(got - expected).max() < (1e-5 if max(shape) <= 8 * min(shape) else 0.05)


def test_a_panorama_never_grows():
    ours = Preprocessing.from_config(
        CONFIGS["clip"] | {"do_center_crop": True, "image_mean": [0] * 3, "image_std": [1] * 3}
    )
    assert ours(noise(20000, 2)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 32}},
        {"do_resize": False},
        {"size": 32, "do_center_crop": True, "image_mean": None, "image_std": None},
    ],
)
def test_preprocessing_that_qf_does_not_know_is_refused(config):
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json"):
        Preprocessing.from_config({"image_mean": [0] * 3, "image_std": [1] * 3} | config)


def test_modes_and_orientation():
    for mode in ("L", "RGBA"):
        assert load_image(encoded(noise(8, 6, mode))).mode == "RGB"
    assert load_image(encoded(noise(8, 6, "CMYK"), "JPEG")).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(noise(8, 6), "JPEG", exif=exif)).size == (6, 8)
    deep = Image.fromarray((np.arange(48, dtype=np.uint16) * 257).reshape(6, 8))
    assert np.asarray(load_image(encoded(deep)))[..., 0].ravel().tolist() == list(range(48))


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(UnreadableImage, match="empty file"):
        load_image(b"")
    with pytest.raises(UnreadableImage, match="not an image"):
        load_image(b"hello there")
    with pytest.raises(UnreadableImage, match="no such file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(UnreadableImage, match="damaged image"):
        load_image(encoded(noise(64, 64), "JPEG")[:600])
    with pytest.raises(UnreadableImage):
        load_image(tmp_path)


def test_thumbnails_are_small_jpegs():
    small = Image.open(io.BytesIO(thumbnail(noise(400, 200))))
    assert (small.format, small.size) == ("JPEG", (128, 64))


@pytest.mark.skipif(not ODD.is_dir(), reason="the odd images are not here")
def test_odd_images_end_as_expected():
    with open(ODD / "expected.csv") as file:
        for row in csv.DictReader(file):
            try:
                load_image(ODD / row["file"])
                outcome = "ok"
            except UnreadableImage:
                outcome = "reject"
            assert outcome == row["outcome"], row
