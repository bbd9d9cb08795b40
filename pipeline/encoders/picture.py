"""One picture, such as a query, through the frozen encoder that made the features."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import QfError
from ..images import UnreadableImage, load_image
from .identity import SAME_INPUT, FrozenEncoder, check_unchanged
from .load import load_encoder


@dataclass(frozen=True)
class Picture:
    """A picture as an encoder sees it, and its features."""

    name: str
    pixels: np.ndarray  # (3, height, width) uint8
    tokens: Tensor  # (1, T, W)
    pooled: Tensor | None  # (1, P)


def same_encoder(identity: dict[str, Any], device: torch.device) -> FrozenEncoder:
    """The encoder of that identity, in float32. EncoderError if it is no longer the same."""
    encoder = load_encoder(identity["id"], device, torch.float32, identity["layer"])
    now = json.loads(json.dumps(encoder.identity))  # tuples become lists, as in a manifest
    check_unchanged(identity, now, SAME_INPUT)
    return encoder


def encode_picture(file: Path, identity: dict[str, Any], device: torch.device) -> Picture:
    """The picture in `file` through the encoder of that identity, in float32. QfError if it cannot be read, EncoderError if
    the encoder is no longer the same."""
    try:
        image = load_image(file)
    except UnreadableImage as error:
        raise QfError(f"{file}: {error}; give another picture") from error
    return seen_by(image, same_encoder(identity, device), str(file))


def seen_by(image: Image.Image, encoder: FrozenEncoder, name: str) -> Picture:
    """An upright RGB picture through the encoder."""
    pixels = encoder.preprocessing(image)
    return Picture(name, pixels, *encoder.encode(pixels[None]))
