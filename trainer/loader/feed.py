"""Batches made ahead of training, and on the device by the time they are asked for."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...pipeline.prefetch import map_ahead

PREFETCH = 4  # batches made ahead


class OnDevice(Protocol):
    """A batch whose tensors may be on a CUDA device."""

    def tensors(self) -> list[Tensor]:
        """All its tensors."""


Made = TypeVar("Made", bound=OnDevice)


def moved(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without waiting for it."""
    tensor = torch.as_tensor(values)
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # a pinned tensor is not copied first


def made_ahead(make: Callable[[int], Made], device: torch.device, start: int, stop: int) -> Generator[Made, None, None]:
    """The batches `start` to `stop` - 1, made ahead in a thread; on CUDA in a stream of its own."""
    with ThreadPoolExecutor(1) as pool:
        if device.type != "cuda":
            yield from map_ahead(pool, make, range(start, stop), PREFETCH)
            return
        copies = torch.cuda.Stream(device)

        def load(number: int) -> tuple[Made, torch.cuda.Event]:
            with torch.cuda.stream(copies):  # also makes the thread use this device
                return make(number), copies.record_event()

        for batch, copied in map_ahead(pool, load, range(start, stop), PREFETCH):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(copied)
            for tensor in batch.tensors():
                tensor.record_stream(stream)  # keep its memory until the step is done with it
            yield batch
