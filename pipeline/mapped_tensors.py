"""The tensors of safetensors files as NumPy arrays, memory-mapped: a tensor is read when it is used. Imports no PyTorch."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np

from .errors import ArtifactError

BFLOAT16: np.dtype = np.dtype("<u2")  # NumPy has no such type: the bits, which are the upper half of a float32
TYPES: dict[str, np.dtype] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}


class MappedTensors:
    """The floating-point tensors of one or several files, by name."""

    def __init__(self, files: Iterable[Path]) -> None:
        """ArtifactError if one is no whole safetensors file. OSError if it cannot be opened."""
        self._arrays: dict[str, np.ndarray] = {}
        for file in files:
            self._arrays |= _mapped(file)

    def tensor(self, name: str, *shape: int | None) -> np.ndarray:
        """A tensor as float32; a size of None may be any. KeyError if there is none of that name and shape."""
        return _float32(self._array(name, shape))

    def rows(self, name: str, numbers: np.ndarray, width: int) -> np.ndarray:
        """The rows (n, width) of a matrix as float32. No other row is read. Errors as of `tensor`; IndexError."""
        return _float32(self._array(name, (None, width))[numbers])

    def _array(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        found = self._arrays[name]
        if len(found.shape) != len(shape) or any(
            want not in (None, size) for want, size in zip(shape, found.shape, strict=True)
        ):
            raise KeyError(name)
        return found


def _mapped(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of one file."""
    try:
        memory = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(memory[:8].tobytes(), "little")
        header = json.loads(memory[8:start].tobytes())
        arrays = {}
        for name, about in header.items():
            if name == "__metadata__" or about["dtype"] not in TYPES:
                continue
            kind, shape = TYPES[about["dtype"]], tuple(about["shape"])
            first, last = about["data_offsets"]
            if last - first != prod(shape) * kind.itemsize:
                raise ValueError(name)
            arrays[name] = np.ndarray(shape, kind, memory, start + first)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no complete safetensors file: it is damaged or truncated") from error
    return arrays


def _float32(values: np.ndarray) -> np.ndarray:
    """The values as float32; those that are float32 are not copied."""
    if values.dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
