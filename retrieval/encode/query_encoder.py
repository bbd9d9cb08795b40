"""The one face of everything that embeds a query. Search, the index and evaluation see nothing else.

Letters: N images, Q embeddings of an image, M texts, E width of the space that images and texts share. All embeddings are
float32 of unit length."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from ...pipeline.encoders.picture import Picture
    from ...pipeline.features.reader import Features

log = logging.getLogger(__name__)


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
        """A text to search with -> (1, E). Warns of a text that is longer than the model reads, which is truncated, and of
        unknown words."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (M, E). Long texts are truncated."""

    def for_queries(self) -> bytes | None:
        """A description that an index keeps, so that a query is embedded without transformers; None if none is needed or possible."""

    def captions(self, features: "Features") -> np.ndarray:
        """All captions of the features, image by image -> (M, E)."""

    def picture(self, picture: "Picture") -> np.ndarray:
        """A picture that the frozen encoder has seen -> (Q, E)."""

    def images(self, features: "Features") -> Iterator[np.ndarray]:
        """All images of the features, some at a time -> (n, Q, E)."""

    def matching(self, features: "Features", rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """ITM logits (n,) of pairs (n, 2) of positions in `rows` and `texts`. QfError unless the encoder `matches`."""


def warn_of_unknown_words(reader: str, words: Sequence[str], nothing_known: bool) -> None:
    """Warn that `words` of a text are not in the vocabulary of the reader, or that nothing of the text is."""
    if nothing_known:
        log.warning(
            "the %s knows no word of the text: its scores do not depend on it; use words of the captions", reader
        )
    elif words:
        named = ", ".join(repr(word) for word in words)
        log.warning("the %s does not know %s: its scores are those of the other words", reader, named)
