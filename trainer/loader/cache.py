"""All training features in memory, in their codec: on the device if they fit there, else in host memory."""

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from ...pipeline.device import free_memory
from ...pipeline.features.codecs import Encoded
from ...pipeline.features.reader import Empty, Features
from ...pipeline.formatting import size

SHARE = 0.7  # of the free memory that features may take; training needs the rest
COPIED = 256  # images copied to the device at once
CPU = torch.device("cpu")


class Cache:
    """The features of n training images and their views on one device. A `FeatureSource` with the same bits as the disk."""

    def __init__(self, features: Features, rows: np.ndarray, device: torch.device) -> None:
        """Reads them all."""
        self.count = len(rows)
        rows = np.tile(rows, 1 + features.views)  # view by view
        views = np.repeat(np.arange(1 + features.views), self.count)
        if device.type == "cpu":
            self.columns = features.read(rows, views)
            return
        self.columns = {
            name: torch.empty((len(rows), *shape), dtype=dtype, device=device)
            for name, (dtype, shape) in features.columns.items()
        }
        for start in range(0, len(rows), COPIED):
            some = slice(start, start + COPIED)
            for name, values in features.read(rows[some], views[some]).items():
                self.columns[name][some].copy_(values)  # waits: batches read it from another stream

    def __call__(self, chosen: np.ndarray, views: np.ndarray, empty: Empty) -> Encoded:
        """The columns of some images, on the cache's device. In host memory, `empty` allocates the result."""
        index = views * self.count + chosen
        return {name: self._take(column, index, empty) for name, column in self.columns.items()}

    @staticmethod
    def _take(column: Tensor, index: np.ndarray, empty: Empty) -> Tensor:
        if column.device.type == "cpu":
            out = empty((len(index), *column.shape[1:]), column.dtype)
            np.take(column.numpy(), index, axis=0, out=out.numpy(), mode="clip")  # any other mode copies twice
            return out
        return column.index_select(0, torch.from_numpy(index).pin_memory().to(column.device, non_blocking=True))


def cached(
    features: Features, rows: np.ndarray, device: torch.device, processes: int, say: Callable[[str], None]
) -> Cache | None:
    """The features of `rows` on the device if they fit, else in host memory; None if they fit in neither.

    In host memory each of `processes` holds a copy. Calls `say` with a line that tells where the features are."""
    images = len(rows) * (1 + features.views)
    needed = images * sum(dtype.itemsize * prod(shape) for dtype, shape in features.columns.values())
    full: list[str] = []
    for place in dict.fromkeys((device, CPU)):
        name, copies = ("host memory", processes) if place.type == "cpu" else (f"the memory of {place}", 1)
        free = free_memory(place)
        if needed * copies <= SHARE * free:
            where = f"{name}; {size(free)} are free there"
            say(f"--cache-on-device: {size(needed)} of features into {where}{''.join(full)}")
            return Cache(features, rows, place)
        full.append(f", {name} has too little ({size(free)} free)")
    say(f"--cache-on-device: {size(needed)} of features stay on disk{''.join(full)}")
    return None
