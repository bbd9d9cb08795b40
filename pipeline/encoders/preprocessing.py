"""Resizing and cropping as a model's image processor does it; the device rescales and normalises later."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import EncoderError
from .views import View

MAX_SIDE = 4096  # pixels of what an encoder takes
PANORAMA = 8  # pictures longer than this times their shorter side are cropped before they are resized

# The defaults of transformers' image processors, for fields that preprocessor_config.json lacks. The oldest files lack most.
# A size of one number is the length of the shorter side; for Blip and ViT it is the side of a square.
CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": Image.Resampling.BICUBIC,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SQUARE = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": CLIP,
    "Bit": CLIP,
    "Siglip": SQUARE | {"resample": Image.Resampling.BICUBIC},
    "Blip": CLIP | {"size": {"height": 384, "width": 384}, "do_center_crop": False},
    "ViT": SQUARE | {"resample": Image.Resampling.BILINEAR},
    "DINOv3ViT": SQUARE
    | {
        "resample": Image.Resampling.BILINEAR,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "": {"resample": Image.Resampling.BICUBIC},  # written by hand, beside an ONNX export
}


@dataclass(frozen=True)
class Preprocessing:
    """The input of a model, from its `preprocessor_config.json`.

    A picture is resized, its shorter side to `shortest_edge`, or squashed to `squash` (height, width), and the middle
    `height` x `width` are cut out. DINOv3's processor resizes in floating point, ours rounds to whole grey levels as the
    others do: a difference of at most one level."""

    height: int
    width: int
    shortest_edge: int | None
    squash: tuple[int, int] | None
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Preprocessing":
        """Read the fields that transformers' image processors save. EncoderError if qf does not know the processor."""
        name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
        if kind not in PROCESSORS:
            raise _refused(f"{name} is not an image processor that qf supports ({', '.join(filter(None, PROCESSORS))})")
        config = PROCESSORS[kind] | {field: value for field, value in config.items() if value is not None}
        if not config.get("do_resize", True) or config.get("do_pad", False):
            raise _refused("do_resize is off or do_pad is on; qf needs pictures of one size")
        size, crop = config.get("size"), config.get("crop_size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if kind in ("Blip", "ViT") else {"shortest_edge": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        edge = size.get("shortest_edge") if isinstance(size, dict) and "longest_edge" not in size else None
        out = crop if config.get("do_center_crop", False) else size
        resized: list[Any] = (
            [edge] if edge else [size.get("height"), size.get("width")] if isinstance(size, dict) else [None]
        )
        final: list[Any] = [out.get("height"), out.get("width")] if isinstance(out, dict) else [None]
        if not all(isinstance(length, int) and 0 < length <= MAX_SIDE for length in resized + final):
            raise _refused(f"no fixed picture size in size {size} and crop_size {crop}")
        resample, factor = config["resample"], config.get("rescale_factor", 1 / 255)
        if resample not in list(Image.Resampling) or not isinstance(factor, int | float):
            raise _refused(f"resample {resample!r} or rescale_factor {factor!r} is not valid")
        unit = config.get("do_normalize", True)
        return cls(
            height=final[0],
            width=final[1],
            shortest_edge=edge,
            squash=None if edge else (resized[0], resized[1]),
            resample=int(resample),
            rescale_factor=factor if config.get("do_rescale", True) else 1.0,
            mean=_three("image_mean", config.get("image_mean") if unit else 0.0),
            std=_three("image_std", config.get("image_std") if unit else 1.0),
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> (3, height, width) uint8: resized and cropped. Rescaling and normalising are left to the device."""
        width, height = self._resized(*image.size)
        left, top = (width - self.width) // 2, (height - self.height) // 2
        box = (left, top, left + self.width, top + self.height)
        if max(width, height) <= PANORAMA * min(width, height):
            cropped = image.resize((width, height), self.resample).crop(box)  # margins beyond the picture are black
        else:  # crop before resizing: a strip of 10000 x 10 would become millions of pixels
            x, y = image.width / width, image.height / height
            part = (max(left, 0) * x, max(top, 0) * y, min(box[2], width) * x, min(box[3], height) * y)
            inner = (min(box[2], width) - max(left, 0), min(box[3], height) - max(top, 0))
            cropped = Image.new("RGB", (self.width, self.height))
            cropped.paste(self._resized_part(image, part, inner), (max(-left, 0), max(-top, 0)))
        return _channels_first(cropped)

    def aspect(self, width: int, height: int) -> float:
        """Width over height of the part that the encoder sees. A squashed picture is seen whole."""
        return width / height if self.squash else self.width / self.height

    def view(self, image: Image.Image, view: View) -> np.ndarray:
        """A part of an RGB picture, resized and maybe mirrored -> (3, height, width) uint8."""
        part = image.crop((view.left, view.top, view.right, view.bottom))
        part = part.resize((self.width, self.height), self.resample)
        return _channels_first(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else part)

    def _resized_part(
        self, image: Image.Image, part: tuple[float, float, float, float], size: tuple[int, int]
    ) -> Image.Image:
        """`part` of the picture, resized to `size`.

        It is resized across first, as Pillow resizes a whole picture, so that rounding gives the same pixels. Only rows that
        the filter reaches are read."""
        left, top, right, bottom = part
        reach = 4 * max(1.0, (bottom - top) / size[1])  # Lanczos reaches 3 of the result's pixels, or of the picture's
        first, last = max(0, int(top - reach)), min(image.height, int(bottom + reach) + 1)
        rows = image.crop((0, first, image.width, last))
        across = rows.resize((size[0], rows.height), self.resample, box=(left, 0, right, rows.height))
        return across.resize(size, self.resample, box=(0, top - first, size[0], bottom - first))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing; the longer side is rounded down."""
        if self.squash:
            return self.squash[1], self.squash[0]
        edge = self.shortest_edge or 0
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _three(name: str, value: Any) -> tuple[float, float, float]:
    """A value a channel, from one or from three."""
    values = [value] * 3 if isinstance(value, int | float) else value
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
        raise _refused(f"{name} must be three values, not {value}")
    return values[0], values[1], values[2]


def _refused(reason: str) -> EncoderError:
    return EncoderError(f"preprocessor_config.json: {reason}")
