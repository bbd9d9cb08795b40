"""Vectors in FAISS. Flat indexes only: every search is exact."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.errors import QfError

FLAT_IP = b"IxFI"  # how the file of an IndexFlatIP begins
MAX_HEADER = 256  # bytes


def import_faiss() -> Any:
    """The faiss module; QfError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise QfError("FAISS is not installed; pip install 'qf[cpu]' (or 'qf[gpu]' on a CUDA machine)") from error
    return faiss


def flat(vectors: np.ndarray) -> Any:
    """An exact inner-product index of (n, E) float32 vectors."""
    index = import_faiss().IndexFlatIP(vectors.shape[-1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


def read_flat(path: Path) -> Any:
    """The exact inner-product index in a file, memory-mapped: vectors are read when they are searched.

    ValueError if the file holds anything else. OSError if it cannot be opened."""
    faiss = import_faiss()
    with open(path, "rb") as file:
        if file.read(len(FLAT_IP)) != FLAT_IP:
            raise ValueError("it is no flat inner-product index")
        width, count = int.from_bytes(file.read(4), "little"), int.from_bytes(file.read(8), "little")
        left = os.fstat(file.fileno()).st_size - 4 * width * count
        if not 0 <= left < MAX_HEADER:  # FAISS would believe the header, and read beyond the end
            raise ValueError(f"it has no room for {count:,} vectors of {width:,} numbers")
        try:
            return faiss.read_index(f"/dev/fd/{file.fileno()}", faiss.IO_FLAG_MMAP_IFC)  # its name need not be UTF-8
        except RuntimeError as error:
            raise ValueError("FAISS cannot read it") from error
