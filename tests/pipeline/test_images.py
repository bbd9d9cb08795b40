"""Pictures from files of every kind against transformers' processors, and the limits against what hostile files ask."""

import csv
import importlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps
from qf.pipeline.encoders.preprocessing import Preprocessing
from qf.pipeline.errors import EncoderError
from qf.pipeline.images import MAX_BYTES, MAX_PIXELS, UnreadableImage, load_image, thumbnail

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


CLIP, SIGLIP, BLIP = "clip.CLIPImageProcessor", "siglip.SiglipImageProcessor", "blip.BlipImageProcessor"
BIT, VIT = "bit.BitImageProcessor", "vit.ViTImageProcessor"
CONFIGS = {
    "clip": (CLIP, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "small crop": (CLIP, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 28}}),
    "large crop": (CLIP, {"size": {"shortest_edge": 24}, "crop_size": {"height": 33, "width": 33}}),
    "bilinear": (CLIP, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}),
    "no crop": (CLIP, {"size": {"height": 32, "width": 24}, "do_center_crop": False}),
    "squashed, then cropped": (CLIP, {"size": {"height": 40, "width": 36}, "crop_size": {"height": 32, "width": 32}}),
    "siglip": (SIGLIP, {"size": {"height": 32, "width": 32}}),
    "siglip, no mean": (SIGLIP, {"size": {"height": 32, "width": 24}, "do_normalize": False}),
    "blip": (BLIP, {"size": {"height": 30, "width": 30}}),
    "dinov2": (BIT, {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.485, 0.456, 0.406]}),
    "vit": (VIT, {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
}  # fmt: skip


def processor_of(name):
    """transformers' processor (PIL backend), and ours from the file that it saves."""
    module, kind = CONFIGS[name][0].split(".")
    file = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(file, kind + "Pil")(**CONFIGS[name][1])
    return processor, Preprocessing.from_config(json.loads(processor.to_json_string()))


def normalised(ours, image):
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (ours.mean, ours.std))
    return (ours(image).astype(np.float32) * ours.rescale_factor - mean) / std


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "shape", [(64, 48), (47, 93), (33, 32), (9, 7), (1, 1), (3000, 120), (50, 401), (500, 333), (223, 1999)]
)
def test_equals_the_processor_of_transformers(name, shape):
    processor, ours = processor_of(name)
    image = noise(*shape)
    expected, got = processor(image, return_tensors="np")["pixel_values"][0], normalised(ours, image)
    assert got.shape == expected.shape
    # a panorama is cut before it is resized, with the cut in single precision: one grey level at most
    level = ours.rescale_factor / min(ours.std)
    assert np.abs(got - expected).max() < (1e-5 if max(shape) <= 8 * min(shape) else 1.01 * level)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(1, 150), st.floats(1 / 8, 8))
def test_equals_the_processor_at_every_size(name, width, ratio):
    image = noise(width, max(1, int(width * ratio)))
    if max(image.size) <= 8 * min(image.size):
        processor, ours = processor_of(name)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.abs(normalised(ours, image) - expected).max() < 1e-5


def stored_pictures():
    """The bytes of a file in each mode, and what a processor of transformers is given for it: as stored, but upright."""
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        yield encoded(smooth(40, 31), "JPEG", exif=exif), lambda image: ImageOps.exif_transpose(image)
    rgba, palette = noise(40, 31, "RGBA"), smooth(40, 31).quantize(16)
    exact = [
        (rgba, "PNG", {}),
        (rgba, "WEBP", {"lossless": True}),
        (rgba.convert("LA"), "PNG", {}),
        (palette, "PNG", {}),
    ]
    exact += [
        (palette, "PNG", {"transparency": 3}),
        (palette, "GIF", {"transparency": 2}),
        (noise(40, 31, "L"), "PNG", {}),
    ]
    exact += [(noise(40, 31), "PNG", {"transparency": (7, 7, 7)}), (noise(40, 31, "L"), "PNG", {"transparency": 9})]
    exact += [
        (noise(40, 31, "CMYK"), "JPEG", {}),
        (noise(40, 31, "L"), "JPEG", {}),
        (noise(40, 31, "CMYK"), "TIFF", {}),
    ]
    exact += [(noise(40, 31, "L").convert("1"), "PNG", {}), (noise(40, 31), "BMP", {}), (noise(40, 31), "PPM", {})]
    for image, format_, more in exact:
        yield encoded(image, format_, **more), lambda image: image
    deep = Image.fromarray((np.arange(1240, dtype=np.uint16) * 52).reshape(31, 40))
    for format_ in ("PNG", "TIFF", "PPM"):
        yield encoded(deep, format_), lambda image: Image.fromarray((np.asarray(image) // 256).astype(np.uint8))


@pytest.mark.parametrize("name", ["clip", "siglip", "blip", "dinov2"])
def test_equals_the_processor_on_every_kind_of_file(name):
    processor, ours = processor_of(name)
    for number, (data, upright) in enumerate(stored_pictures()):
        stored = upright(Image.open(io.BytesIO(data)))
        expected = processor(stored, return_tensors="np")["pixel_values"][0]
        assert np.abs(normalised(ours, load_image(data)) - expected).max() < 1e-5, number


def test_dinov3_differs_by_the_rounding_alone():
    """Its processor (torchvision only) rescales, resizes in floating point with antialiasing, and normalises."""
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 48}, "resample": 2}
    ours = Preprocessing.from_config(config)
    for image in (noise(64, 48), noise(20, 90), smooth(500, 333), noise(3, 2)):
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        exact = torch.nn.functional.interpolate(levels, (32, 48), mode="bilinear", antialias=True)[0].numpy()
        assert np.abs(ours(image) - exact).max() <= 1.01
        assert np.abs(ours(image) - exact).mean() < 0.4


@pytest.mark.parametrize("kind", ["clip.CLIP", "siglip.Siglip", "blip.Blip", "bit.Bit", "vit.ViT"])
def test_what_a_file_leaves_out_is_the_processors_default(kind):
    module, name = kind.split(".")
    file = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    for fields in ({}, {"size": 48, "crop_size": 40}, {"do_center_crop": True, "size": 48, "crop_size": 40}):
        if name == "Siglip" and "size" in fields:
            continue  # without a crop a shorter side gives no fixed size
        processor = getattr(file, f"{name}ImageProcessorPil")(**fields)
        ours = Preprocessing.from_config({"image_processor_type": f"{name}ImageProcessorFast", **fields})
        image = noise(60, 50)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.abs(normalised(ours, image) - expected).max() < 1e-5
    if name == "CLIP":
        old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
        assert Preprocessing.from_config(old) == Preprocessing.from_config(
            {"image_processor_type": "CLIPImageProcessor"}
        )


def test_a_panorama_never_grows():
    ours = Preprocessing.from_config(CONFIGS["clip"][1] | {"image_processor_type": "CLIPImageProcessor"})
    assert ours(noise(20000, 2)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 32}},
        {"size": {"shortest_edge": 32, "longest_edge": 64}},
        {"size": {"height": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "do_center_crop": False},
        {"size": "large"},
        {"size": -3},
        {"crop_size": {"height": 10**6, "width": 32}},
        {"do_resize": False},
        {"do_pad": True},
        {"image_mean": [0.5, 0.5]},
        {"image_std": "a"},
        {"resample": 17},
        {"rescale_factor": "1/255"},
        {"image_processor_type": "ConvNextImageProcessor"},
        {"image_processor_type": "Siglip2ImageProcessor"},
        {"image_processor_type": None},
    ],
)
def test_preprocessing_that_qf_does_not_know_is_refused(config):
    with pytest.raises(EncoderError, match=r"^preprocessor_config\.json: ") as caught:
        Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor"} | config)
    assert "\n" not in str(caught.value)


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


def test_a_damaged_exif_is_no_damaged_picture():
    data = encoded(noise(8, 6), "JPEG", exif=b"Exif\x00\x00nonsense")
    assert load_image(data).size == (8, 6)


def png(width, height, kind=0):
    """A PNG whose header claims a size, with a few rows of zeros."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def tiff(width, height):
    data = bytearray(encoded(noise(8, 6), "TIFF"))
    for tag, value in ((0x100, width), (0x101, height)):
        for kind in (3, 4):  # a short or a long
            at = data.find(struct.pack("<HHI", tag, kind, 1))
            if at >= 0:
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


BOMBS = {
    "png": png(60000, 60000),
    "png just above": png(MAX_PIXELS // 8 + 1, 8),
    # one frame, larger than its canvas
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 8, 6, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    + b"\x02\x02\x4c\x01\x00;",
    "tiff": tiff(400_000, 400_000),
    "bmp": encoded(noise(8, 6), "BMP")[:18] + struct.pack("<ii", 100_000, 100_000) + encoded(noise(8, 6), "BMP")[26:],
    "ppm": b"P6 90000 90000 255\n" + bytes(5000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_before_memory_is_taken(name, monkeypatch):
    def never(*args):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(UnreadableImage, match="pixels"):
        load_image(BOMBS[name])


def test_large_pictures_take_no_more_than_stated():
    """Eight bytes a pixel above what was there before, here for a transparent picture, the costliest."""
    code = """
import io, resource
from PIL import Image
from qf.pipeline.images import load_image
data = io.BytesIO()
Image.new("RGBA", (5000, 4000), (9, 9, 9, 9)).save(data, "PNG", compress_level=1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
load_image(data.getvalue())
load_image(data.getvalue())
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 20e6 * 8 + 40e6  # the writing took 4 bytes a pixel already


def test_a_file_above_the_limit_is_not_opened(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UnreadableImage, match="bytes, the limit is"):
        load_image(tmp_path / "huge.png")


def test_formats_that_run_programs_are_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImage, match="not an image that qf reads"):
        load_image(eps)


FILES = [
    *(encoded(smooth(24, 17), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")),
    encoded(smooth(24, 17), "TIFF", compression="tiff_lzw"),
    encoded(smooth(24, 17), "JPEG", progressive=True),
    encoded(noise(24, 17, "RGBA"), "PNG"),
    encoded(smooth(24, 17).quantize(8), "PNG", transparency=1),
    encoded(Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8)), "PNG"),
]


def readable(data):
    """An RGB picture within the limits or UnreadableImage: nothing else may come of bytes."""
    try:
        image = load_image(data)
    except UnreadableImage:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *(file[:16] for file in FILES)]))
def test_random_bytes(data, magic):
    readable(magic + data)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, 10**6) | st.none(),
)
def test_damaged_files(file, changes, cut):
    data = bytearray(file)
    for at, value in changes:
        data[at % len(data)] = value
    readable(bytes(data[: cut % len(data)] if cut is not None else data))


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


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_troubles_of_the_machine_are_no_rejects(tmp_path, monkeypatch, error):
    """They pass, and a picture that was given up for them would be missing for ever."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)):
        load_image(tmp_path / "a.png")


GREY = np.linspace(0, 1, 48).reshape(6, 8)
DEEP = {
    "fractions": (GREY.astype(np.float32), GREY),
    "floats up to 255": ((GREY * 255).astype(np.float32), GREY),
    "floats up to 65535": ((GREY * 65535).astype(np.float32), GREY),
    "floats of any size": ((GREY * 3e20 - 1e20).astype(np.float32), GREY),
    "floats just above 1": ((GREY * 1.2).astype(np.float32), GREY),
    "a dark picture of fractions": ((GREY / 5).astype(np.float32), GREY / 5),
    "8 bits in 16": ((GREY * 255).astype(np.uint16), GREY),
    "12 bits in 16": ((GREY * 4095).astype(np.uint16), GREY),
    "16 bits": ((GREY * 65535).astype(np.uint16), GREY),
    "16 bits, the other end first": ((GREY * 65535).astype(">u2"), GREY),
    "8 bits in 32": ((GREY * 255).astype(np.int32), GREY),
    "32 bits": ((GREY * 2e9).astype(np.int32), GREY),
    "negative": ((GREY * 2000 - 1000).astype(np.int32), GREY),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_neither_black_nor_clipped(name):
    stored, expected = DEEP[name]
    levels = np.asarray(load_image(encoded(Image.fromarray(stored), "TIFF")))[..., 1]
    assert np.abs(levels - expected * 255).max() <= 1


def test_floats_that_are_no_numbers_are_black_or_a_reject():
    holes = GREY.astype(np.float32)
    holes[0, :2] = np.nan, np.inf
    levels = np.asarray(load_image(encoded(Image.fromarray(holes), "TIFF")))[..., 0]
    assert (levels[0, 0], levels[0, 1], levels[5, 7]) == (0, 255, 255)
    with pytest.raises(UnreadableImage, match="its pixels hold no numbers"):
        load_image(encoded(Image.fromarray(holes * np.nan), "TIFF"))


def test_premultiplied_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 6), (200, 0, 0, 0))
    for mode in ("RGBA", "LA"):
        assert np.asarray(load_image(encoded(clear.convert(mode), "TIFF"))).min() == 255
