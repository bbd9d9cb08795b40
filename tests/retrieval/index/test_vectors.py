"""Vectors in FAISS."""

import sys

import numpy as np
import pytest
from qf.pipeline.errors import QfError
from qf.retrieval.index.vectors import flat


def test_a_flat_index_gives_the_exact_inner_products():
    draw = np.random.default_rng(0)
    vectors, query = draw.normal(size=(50, 8)).astype(np.float32), draw.normal(size=(1, 8)).astype(np.float32)
    scores, found = flat(vectors).search(query, 50)
    assert scores[0] == pytest.approx(np.sort(vectors @ query[0])[::-1], rel=1e-4, abs=1e-5)
    assert sorted(found[0].tolist()) == list(range(50))


def test_a_missing_faiss_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(QfError, match=r"FAISS is not installed; pip install 'qf\[cpu\]'"):
        flat(np.zeros((1, 2), np.float32))
