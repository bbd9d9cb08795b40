"""Image bytes to upright RGB pictures, with every limit.

Memory: larger pictures than MAX_PIXELS are refused by their header. One of that size takes 8 to 11 bytes a pixel while it
is decoded and made upright RGB, as WebP 17, as JPEG 2000 20 (measured), and 3 to 4 afterwards: a worker stays below 2 GB,
3 GB for the worst WebP and 3.6 GB for the worst JPEG 2000."""

import errno
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .lfs import CURE, is_lfs_pointer, is_lfs_text

# the raster formats that datasets come in; Pillow opens more, among them ones that start other programs (EPS: Ghostscript)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, twice what it warns about
MAX_BYTES = 256 * 2**20
STRIP_PIXELS = 2**20  # converted at once
THUMBNAIL_SIZE = 128
HEIC = re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # errors of the machine, not of a picture
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageFile.LOAD_TRUNCATED_IMAGES = False


class UnreadableImage(Exception):
    """The picture cannot be used; the message is the reason, for the rejects."""


def load_image(source: Path | bytes) -> Image.Image:
    """The picture in `source`, upright, first frame, RGB. UnreadableImage with the reason if there is none.

    Transparency is laid on white, as transformers' processors do. They take the stored picture as it is, so theirs
    equals ours on the upright one; deeper greys, which they clip at 255, are scaled to eight bits here."""
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise UnreadableImage("empty file" if size == 0 else f"{size} bytes, the limit is {MAX_BYTES} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings: our own limit follows
            return _to_rgb(_upright(_decoded(source)))
    except (UnreadableImage, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except IsADirectoryError as error:
        raise UnreadableImage("a folder, not a picture") from error
    except UnidentifiedImageError as error:
        if is_lfs_text(source) if isinstance(source, bytes) else is_lfs_pointer(source):
            raise UnreadableImage(CURE) from error
        if HEIC.match(_start(source)):
            raise UnreadableImage("HEIC, which qf does not read; convert it to JPEG") from error
        raise UnreadableImage(f"not an image that qf reads ({', '.join(IMAGE_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # damaged bytes raise errors of any type; none may end an extraction
        if getattr(error, "errno", None) in PASSING:
            raise
        truncated = "truncated" in str(error).lower()
        raise UnreadableImage(f"damaged image: {'it is truncated' if truncated else 'it cannot be decoded'}") from error


def _start(source: Path | bytes) -> bytes:
    """The first bytes of a picture; none if they cannot be read any more."""
    if isinstance(source, bytes):
        return source[:12]
    try:
        with open(source, "rb", buffering=0) as file:
            return file.read(12)
    except OSError:
        return b""


def _decoded(source: Path | bytes) -> Image.Image:
    """The first frame, as stored. The size in the header is checked before pixels are decoded."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS} in all")
        image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The picture, turned upright by its EXIF orientation."""
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture whose EXIF is damaged is still a picture
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A plain RGB picture. It is converted strip by strip, so that a large picture needs no second copy."""
    rgb = Image.new("RGB", image.size)
    deep = image.mode.startswith(("I", "F"))  # more than eight bits: convert("RGB") would clip them at 255
    black, white = _range(image) if deep else (0, 0)
    for top, strip in _strips(image):
        if deep:
            levels = (np.nan_to_num(np.asarray(strip, np.float64), nan=black) - black) * (256 / (white - black))
            strip = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        elif "A" in strip.getbands() or "a" in strip.getbands() or strip.info.get("transparency") is not None:
            ground = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(ground, strip.convert("RGBA"))
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture cut into strips, each with its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _range(image: Image.Image) -> tuple[float, float]:
    """The values of a deep grey that become black and just above white. UnreadableImage if it holds no number.

    For integers they are those of 8, 10, 12 or 16 bits, whichever hold all its values; for floats 0 and 1, 255 or 65535,
    where it is clear which. For any other picture they are its own lowest and highest value."""
    values = (np.asarray(strip, np.float64) for _, strip in _strips(image))
    finite = [part[np.isfinite(part)] for part in values]
    low = min((part.min() for part in finite if part.size), default=np.inf)
    high = max((part.max() for part in finite if part.size), default=-np.inf)
    if low > high:
        raise UnreadableImage("its pixels hold no numbers")
    if low >= 0 and image.mode == "F":
        for limit in (1, 255, 65535):
            if limit / 10 < high <= limit:
                return 0, limit * 256 / 255
    elif low >= 0 and high < 2**16:
        return 0, next(2**bits for bits in (8, 10, 12, 16) if high < 2**bits)
    return low, low + (high - low or 1) * 256 / 255


def thumbnail(image: Image.Image, size: int = THUMBNAIL_SIZE) -> bytes:
    """A small JPEG of the picture, its longer side at most `size` pixels."""
    scale = min(1.0, size / max(image.size))
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    data = io.BytesIO()
    image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=2.0).save(data, "JPEG", quality=85)
    return data.getvalue()
