"""Features and their encoders to an index."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...pipeline.formatting import duration, size
from ...pipeline.results import Result
from ..config import IndexOptions
from .compact import Form, choose_form, exact
from .space import Space
from .store import make_index, origin, save_index
from .vectors import BYTES, empty_index, make_vectors

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features

SAMPLE = 8192  # images on which the form of a space is chosen


class IndexedRun(Protocol):
    """A run as the index knows it: see `encode.qformer.Run`."""

    @property
    def folder(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]: ...


class Embeds(Protocol):
    """An encoder as the index uses it: see `encode.query_encoder`."""

    @property
    def name(self) -> str: ...

    @property
    def per_image(self) -> int: ...

    @property
    def width(self) -> int: ...

    def images(self, features: "Features") -> Iterator[np.ndarray]: ...

    def captions(self, features: "Features") -> np.ndarray: ...

    def for_queries(self) -> bytes | None: ...


@dataclass(frozen=True)
class Indexed(Result):
    """A finished index."""

    images: int
    vectors: int
    texts: int
    type: str
    bytes: int
    seconds: float
    index: str
    why: str  # of the type and the number of vectors

    def __str__(self) -> str:
        form = "" if self.type == "flat" else f"\n          {self.type}: {self.why}"
        return (
            f"index     {self.images:,} images as {self.vectors:,} vectors, {self.texts:,} texts; {size(self.bytes)} at "
            f"{self.index}  ({duration(self.seconds)}){form}"
        )


def build_index(
    encoders: Sequence[Embeds],
    run: IndexedRun | None,
    features: "Features",
    folder: Path,
    options: IndexOptions = IndexOptions(),  # noqa: B008 - frozen
) -> Indexed:
    """Index all images and captions of the features in `folder`, in the space of each encoder. `run` is the one among them."""
    started = time.perf_counter()
    exact_bytes = sum(
        4 * encoder.width * (encoder.per_image * len(features) + sum(map(len, features.captions)))
        for encoder in encoders
    )
    spaces = {encoder.name: _space(encoder, features, options, exact_bytes) for encoder in encoders}
    built_from = None if run is None else (run.folder, run.manifest["sha256"])
    encoder_text = next((made for encoder in encoders if (made := encoder.for_queries())), None)
    index = make_index(features, spaces, origin(folder, built_from, features), encoder_text)
    manifest = save_index(index, folder)
    counts = {name: manifest[name] for name in ("images", "vectors", "texts", "type", "bytes")}
    seconds = round(time.perf_counter() - started, 3)
    return Indexed(**counts, seconds=seconds, index=str(folder), why=index.first.form.why)


def _space(encoder: Embeds, features: "Features", options: IndexOptions, exact_bytes: int) -> Space:
    """The space of an encoder. Its form is chosen on the first SAMPLE images; the others follow batch by batch, so that no more of them
    than these are in memory as float32."""
    batches = encoder.images(features)
    first = _first(batches, SAMPLE, encoder)
    texts = encoder.captions(features)
    form = _form(first, texts, features, options, exact_bytes)
    images = empty_index(form.type, first[:, list(form.slots)].reshape(-1, encoder.width))
    for batch in chain([first], batches):
        images.add(np.ascontiguousarray(batch[:, list(form.slots)].reshape(-1, encoder.width), np.float32))
    return Space(images, make_vectors(texts, form.type), form)


def _form(first: np.ndarray, texts: np.ndarray, features: "Features", options: IndexOptions, exact_bytes: int) -> Form:
    """How to store a space, by its first images (n, Q, E) and the texts (M, E) of all images."""
    if options.type == "flat":
        return exact(first.shape[1], "exact vectors, as asked for")
    if options.type == "auto" and exact_bytes <= options.max_memory * 1e9:
        return exact(
            first.shape[1],
            f"exact vectors take {size(exact_bytes)}, no more than --max-memory {options.max_memory:g} GB",
        )
    owners = np.repeat(np.arange(len(first)), [len(captions) for captions in features.captions[: len(first)]])
    types = list(BYTES)[::-1] if options.type == "auto" else [options.type]
    return choose_form(first, texts[: len(owners)], owners, types, options.recall)


def _first(batches: Iterator[np.ndarray], count: int, encoder: Embeds) -> np.ndarray:
    """The embeddings (n, Q, E) of the first images, at least `count` or all; their batches are taken."""
    taken: list[np.ndarray] = [np.empty((0, encoder.per_image, encoder.width), np.float32)]
    while sum(map(len, taken)) < count and (batch := next(batches, None)) is not None:
        taken.append(np.array(batch, np.float32))
    return np.concatenate(taken)
