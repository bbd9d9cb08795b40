"""The one face of everything that embeds a query. Search, the index and evaluation see nothing else.

Letters: N images, Q embeddings of an image, M texts, E width of the space that images and texts share. All embeddings are
float32 of unit length."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features


class QueryEncoder(Protocol):
    """Embeds texts and pictures into one space."""

    @property
    def name(self) -> str:
        """The scorer's name in an evaluation: itc, clip."""

    @property
    def matches(self) -> bool:
        """Whether `matching` works."""

    @property
    def per_image(self) -> int:
        """Q."""

    @property
    def width(self) -> int:
        """E."""

    def query(self, text: str) -> np.ndarray:
        """A text to search with -> (1, E). A text that is longer than the model reads is truncated, with a warning."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (M, E). Long texts are truncated."""

    def picture(self, file: Path) -> np.ndarray:
        """The picture in `file` -> (Q, E). QfError if it cannot be read, EncoderError if the encoder has changed."""

    def images(self, features: "Features") -> Iterator[np.ndarray]:
        """All images of the features, some at a time -> (n, Q, E)."""

    def scores(self, features: "Features", rows: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Scores (N, M) of the images in `rows` and texts: the maximum over an image's embeddings of the dot product."""

    def matching(self, features: "Features", rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """ITM logits (n,) of pairs (n, 2) of positions in `rows` and `texts`. QfError unless the encoder `matches`."""
