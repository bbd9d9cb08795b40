"""A picture as a frozen encoder sees it: from a file, encoded now, or from the features, by its key."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..pipeline.codecs import decode
from ..pipeline.encoders import load_encoder
from ..pipeline.errors import EncoderError, QfError
from ..pipeline.features import Features
from ..pipeline.images import Preprocessing, UnreadableImage, load_image


@dataclass(frozen=True)
class Picture:
    """What an encoder sees of a picture, and what it makes of it."""

    name: str
    pixels: np.ndarray  # (3, height, width) uint8
    tokens: Tensor  # (1, T, W)
    pooled: Tensor | None  # (1, P)


def encode_picture(file: Path, identity: dict[str, Any], device: torch.device) -> Picture:
    """The picture in `file` through the encoder of that identity, in float32. QfError if it cannot be read, EncoderError if
    the encoder is no longer the same."""
    try:
        image = load_image(file)
    except UnreadableImage as error:
        raise QfError(f"{file}: {error}; give another picture") from error
    encoder = load_encoder(identity["id"], device, torch.float32, identity["layer"])
    now = json.loads(json.dumps(encoder.identity))  # as a manifest has it
    if (now["sha256"], now["preprocessing"]) != (identity["sha256"], identity["preprocessing"]):
        raise EncoderError(
            f"encoder {identity['id']} is no longer the one that made the features, or prepares pictures otherwise; restore it, or "
            "extract again with --overwrite"
        )
    pixels = encoder.preprocessing(image)
    return Picture(str(file), pixels, *encoder.encode(pixels[None]))


def cached_picture(features: Features, key: str) -> Picture:
    """The picture of that key in the features: the tokens that training sees, and its thumbnail for pixels.

    QfError if there is none."""
    row = pc.index(features.table.column("key"), key).as_py()
    if row < 0:
        raise QfError(f"{key} is neither a file nor a key of {features.folder}; name a picture")
    thumbnail = features.table.column("thumbnail")[row].as_py()
    pixels = Preprocessing(**features.encoder["preprocessing"])(load_image(thumbnail))
    return Picture(key, pixels, decode(features.encoded(np.array([row]))), None)
