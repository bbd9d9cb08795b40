"""Features and their encoders to an index."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...pipeline.formatting import duration, size
from ...pipeline.results import Result
from .space import Space
from .store import make_index, origin, save_index

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features


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

    def __str__(self) -> str:
        return (
            f"index     {self.images:,} images as {self.vectors:,} vectors, {self.texts:,} texts; {size(self.bytes)} at "
            f"{self.index}  ({duration(self.seconds)})"
        )


def build_index(encoders: Sequence[Embeds], run: IndexedRun | None, features: "Features", folder: Path) -> Indexed:
    """Index all images and captions of the features in `folder`, in the space of each encoder. `run` is the one among them."""
    started = time.perf_counter()
    spaces = {encoder.name: Space.of(_images(encoder, features), encoder.captions(features)) for encoder in encoders}
    built_from = None if run is None else (run.folder, run.manifest["sha256"])
    encoder_text = next((made for encoder in encoders if (made := encoder.for_queries())), None)
    manifest = save_index(make_index(features, spaces, origin(folder, built_from, features), encoder_text), folder)
    counts = {name: manifest[name] for name in ("images", "vectors", "texts", "type", "bytes")}
    return Indexed(**counts, seconds=round(time.perf_counter() - started, 3), index=str(folder))


def _images(encoder: Embeds, features: "Features") -> np.ndarray:
    """The embeddings (N, Q, E) of all images."""
    images = np.empty((len(features), encoder.per_image, encoder.width), np.float32)
    done = 0
    for batch in encoder.images(features):
        images[done : done + len(batch)] = batch
        done += len(batch)
    return images
