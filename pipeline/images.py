"""Image bytes to what a frozen encoder takes, with every limit; equal to the model's own processor (its PIL backend)."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .errors import EncoderError

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, twice what it warns about
MAX_BYTES = 256 * 2**20
THUMBNAIL_SIZE = 128
PANORAMA = 8  # pictures longer than this times their shorter side are cut before they are resized

ImageFile.LOAD_TRUNCATED_IMAGES = False


class UnreadableImage(Exception):
    """The picture cannot be used; the message is the reason, for the rejects."""


def load_image(source: Path | bytes) -> Image.Image:
    """The picture in `source`, upright, first frame, RGB. UnreadableImage with the reason if there is none.

    Transparency is dropped as transformers' processors drop it; 16-bit greys keep their upper eight bits."""
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise UnreadableImage("empty file" if size == 0 else f"{size} bytes, the limit is {MAX_BYTES}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings: our own limit follows
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS} in all")
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits a channel: convert("RGB") would clip them at 255
                    upright = Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8))
                return upright.convert("RGB")
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image that can be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:  # what Pillow's decoders raise
        raise UnreadableImage(f"damaged image: {error}") from error


def thumbnail(image: Image.Image, size: int = THUMBNAIL_SIZE) -> bytes:
    """A small JPEG of the picture, its longer side at most `size` pixels."""
    small = image.copy()
    small.thumbnail((size, size), reducing_gap=2.0)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return data.getvalue()


@dataclass(frozen=True)
class Preprocessing:
    """What a model's `preprocessor_config.json` says of its input.

    `shortest_edge` resizes keeping the aspect ratio; otherwise the picture is squashed to `height` x `width`."""

    height: int
    width: int
    shortest_edge: int | None
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Preprocessing":
        """From the fields that transformers' image processors save. EncoderError if it is one that qf does not know."""
        size = config.get("size", {"shortest_edge": 224})
        if isinstance(size, int):
            size = {"shortest_edge": size}
        crop = config.get("crop_size", size) if config.get("do_center_crop", False) else size
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        edge = size.get("shortest_edge")
        if not {"height", "width"} <= crop.keys() or not (edge or {"height", "width"} <= size.keys()):
            raise EncoderError(f"preprocessor_config.json: no fixed picture size in size {size} and crop_size {crop}")
        if not config.get("do_resize", True):
            raise EncoderError("preprocessor_config.json: do_resize is off; qf needs pictures of one size")
        unit = config.get("do_normalize", True)
        mean, std = (config.get("image_mean"), config.get("image_std")) if unit else ([0.0] * 3, [1.0] * 3)
        if not (mean and std and len(mean) == len(std) == 3):
            raise EncoderError("preprocessor_config.json: image_mean and image_std must have three values each")
        return cls(
            height=crop["height"],
            width=crop["width"],
            shortest_edge=edge,
            resample=int(config.get("resample", Image.Resampling.BICUBIC)),
            rescale_factor=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> (3, height, width) uint8: resized and cropped. Rescaling and normalising are left to the device."""
        if self.shortest_edge is None:
            cropped = image.resize((self.width, self.height), self.resample)
        else:
            width, height = self._resized(*image.size)
            left, top = (width - self.width) // 2, (height - self.height) // 2
            box = (left, top, left + self.width, top + self.height)
            if max(width, height) <= PANORAMA * self.shortest_edge:
                cropped = image.resize((width, height), self.resample).crop(box)  # margins beyond the picture are black
            else:  # cut out what is wanted first, or a strip of 10000 x 10 would become millions of pixels
                x, y = image.width / width, image.height / height
                part = (max(left, 0) * x, max(top, 0) * y, min(box[2], width) * x, min(box[3], height) * y)
                inner = (min(box[2], width) - max(left, 0), min(box[3], height) - max(top, 0))
                cropped = Image.new("RGB", (self.width, self.height))
                cropped.paste(image.resize(inner, self.resample, box=part), (max(-left, 0), max(-top, 0)))
        return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the shorter side at `shortest_edge`, the longer one cut to a whole number."""
        edge = self.shortest_edge or 0
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge
