"""Vectors in FAISS, whole or shortened. Each search compares with all of them as they are stored: none is approximate beyond that."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.errors import QfError

BEGINNINGS = {"flat": b"IxFI", "fp16": b"IxSQ", "sq8": b"IxSQ"}  # of the file of an index of that type
BYTES = {"flat": 4, "fp16": 2, "sq8": 1}  # of a number
RANGES = {"flat": 0, "fp16": 0, "sq8": 8}  # bytes of a dimension's range
MAX_HEADER = 256  # bytes


def import_faiss() -> Any:
    """The faiss module; QfError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise QfError("FAISS is not installed; pip install 'qf[cpu]' (or 'qf[gpu]' on a CUDA machine)") from error
    return faiss


def empty_index(type: str, sample: np.ndarray) -> Any:
    """An inner-product index without vectors. `sample` (n, E) tells the range of each dimension for sq8; greater values are cut."""
    faiss = import_faiss()
    width = sample.shape[-1]
    if type == "flat":
        return faiss.IndexFlatIP(width)
    index = faiss.IndexScalarQuantizer(width, _kinds(faiss)[type], faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(sample if len(sample) else np.zeros((1, width)), np.float32))
    return index


def _kinds(faiss: Any) -> dict[str, int]:
    """What FAISS calls the types of shortened vectors."""
    return {"fp16": faiss.ScalarQuantizer.QT_fp16, "sq8": faiss.ScalarQuantizer.QT_8bit}


def make_vectors(vectors: np.ndarray, type: str = "flat") -> Any:
    """An inner-product index of (n, E) float32 vectors."""
    index = empty_index(type, vectors)
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


def read_vectors(path: Path, type: str) -> Any:
    """The inner-product index of that type in a file, memory-mapped: vectors are read when they are searched.

    ValueError if the file holds anything else. OSError if it cannot be opened."""
    faiss = import_faiss()
    with open(path, "rb") as file:
        if file.read(4) != BEGINNINGS[type]:
            raise ValueError(f"it is no inner-product index of the type {type}")
        width, count = int.from_bytes(file.read(4), "little"), int.from_bytes(file.read(8), "little")
        left = os.fstat(file.fileno()).st_size - (BYTES[type] * count + RANGES[type]) * width
        if not 0 <= left < MAX_HEADER:  # FAISS would believe the header, and read beyond the end
            raise ValueError(f"it has no room for {count:,} vectors of {width:,} numbers")
        try:
            index = faiss.read_index(f"/dev/fd/{file.fileno()}", faiss.IO_FLAG_MMAP_IFC)  # its name need not be UTF-8
        except RuntimeError as error:
            raise ValueError("FAISS cannot read it") from error
    if type != "flat" and index.sq.qtype != _kinds(faiss)[type]:
        raise ValueError(f"its vectors are not of the type {type}")
    return index
