"""Vectors of images and texts that are compared with each other: one space of an index."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .compact import Form, exact
from .vectors import make_vectors, read_vectors

ROWS_AT_ONCE = 2**16  # vectors


@dataclass(frozen=True)
class Space:
    """Vectors of N images (`per_image` each, in a row) and of M texts that are compared with each other."""

    images: Any  # faiss index of N * per_image vectors
    texts: Any | None  # faiss index of M vectors; None if they were not embedded
    form: Form

    @classmethod
    def of(cls, images: np.ndarray, texts: np.ndarray | None) -> "Space":
        """images (N, Q, E), texts (M, E), all of them in float32."""
        made = make_vectors(images.reshape(-1, images.shape[-1]))
        return cls(made, None if texts is None else make_vectors(texts), exact(images.shape[1], ""))

    @classmethod
    def read(cls, files: Iterable[Path], form: Form) -> "Space":
        """A space from its files of images and of texts. Errors as of `read_vectors`."""
        images, texts = (read_vectors(file, form.type) for file in files)
        return cls(images, texts, form)

    @property
    def per_image(self) -> int:
        """The vectors of an image."""
        return len(self.form.slots)

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Vectors of images, vectors of texts, and whether they are of one width."""
        return self.images.ntotal, self.texts.ntotal, self.images.d == self.texts.d  # type: ignore[union-attr]

    def is_finite(self) -> bool:
        """Whether all vectors are finite."""
        return _finite(self.images) and _finite(self.texts)


def _finite(index: Any) -> bool:
    """Whether all vectors of a FAISS index are finite, looked at some at a time."""
    return all(
        np.isfinite(index.reconstruct_n(start, min(ROWS_AT_ONCE, index.ntotal - start))).all()
        for start in range(0, index.ntotal, ROWS_AT_ONCE)
    )
