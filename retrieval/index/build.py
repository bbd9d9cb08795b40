"""Features and a run to an index."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...pipeline.formatting import duration, size
from ...pipeline.results import Result
from .store import make_index, origin, save_index

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features


class IndexedRun(Protocol):
    """A run as the index uses it: see `encode.query_encoder` and `encode.qformer.Run`."""

    @property
    def folder(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]: ...

    @property
    def per_image(self) -> int: ...

    @property
    def width(self) -> int: ...

    def images(self, features: "Features") -> Iterator[np.ndarray]: ...

    def texts(self, texts: Sequence[str]) -> np.ndarray: ...


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


def build_index(run: IndexedRun, features: "Features", folder: Path) -> Indexed:
    """Index all images and captions of the features under the run's model, in `folder`."""
    started = time.perf_counter()
    images = np.empty((len(features), run.per_image, run.width), np.float32)
    done = 0
    for batch in run.images(features):
        images[done : done + len(batch)] = batch
        done += len(batch)
    texts = run.texts([caption for captions in features.captions for caption in captions])
    index = make_index(features, images, texts, origin(folder, run.folder, run.manifest["sha256"], features))
    manifest = save_index(index, folder)
    counts = {name: manifest[name] for name in ("images", "vectors", "texts", "type", "bytes")}
    return Indexed(**counts, seconds=round(time.perf_counter() - started, 3), index=str(folder))
