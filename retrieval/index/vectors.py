"""Vectors in FAISS. Flat indexes only: every search is exact."""

from typing import Any

import numpy as np

from ...pipeline.errors import QfError


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
