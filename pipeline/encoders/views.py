"""Augmented views of training images, so that caching features does not take augmentation away.

A view is a random part of the picture, resized to the input size of the encoder, maybe mirrored: the random resized crop of Szegedy et
al. 2015 (arXiv:1409.4842), of at least half the area that its shape allows; BLIP-2 was trained with much the same."""

import hashlib
import random
from dataclasses import dataclass

AREA = (0.5, 1.0)  # of the largest part of a shape
ASPECT = (3 / 4, 4 / 3)  # width over height, times that of what the encoder sees


@dataclass(frozen=True)
class View:
    """A part of the upright original, in pixels, and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    flip: bool


def draw_view(seed: int, key: str, number: int, width: int, height: int, flip: bool, aspect: float) -> View:
    """View `number` of the picture `key`, always the same for one seed. With `flip`, half of the views are mirrored.

    `aspect` is the width over the height of the part of the picture that the encoder sees."""
    name = f"{seed} {number} {key}".encode(errors="surrogatepass")
    draw = random.Random(int.from_bytes(hashlib.sha256(name).digest()))
    share = draw.uniform(*AREA)
    aspect *= (ASPECT[1] / ASPECT[0]) ** draw.uniform(-0.5, 0.5)  # uniform in the logarithm
    area = share * min(width**2 / aspect, height**2 * aspect)  # area, relative to the largest part of that shape
    across, down = max(1, round((area * aspect) ** 0.5)), max(1, round((area / aspect) ** 0.5))
    left, top = draw.randint(0, width - across), draw.randint(0, height - down)
    return View(left, top, left + across, top + down, flip and draw.random() < 0.5)
