"""Vectors in FAISS."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.errors import QfError
from qf.retrieval.index.vectors import import_faiss, make_vectors, read_vectors
from qf.retrieval.search import Part, best_distinct


def test_a_flat_index_gives_the_exact_inner_products():
    draw = np.random.default_rng(0)
    vectors, query = draw.normal(size=(50, 8)).astype(np.float32), draw.normal(size=(1, 8)).astype(np.float32)
    scores, found = make_vectors(vectors).search(query, 50)
    assert scores[0] == pytest.approx(np.sort(vectors @ query[0])[::-1], rel=1e-4, abs=1e-5)
    assert sorted(found[0].tolist()) == list(range(50))


def test_a_missing_faiss_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(QfError, match=r"FAISS is not installed; pip install 'qf\[cpu\]'"):
        make_vectors(np.zeros((1, 2), np.float32))


@pytest.mark.parametrize("type", ["flat", "fp16", "sq8"])
@given(count=st.integers(0, 40), width=st.integers(1, 9), seed=st.integers(0, 100))
def test_a_file_gives_back_the_vectors_as_they_are_stored(tmp_path_factory, type, count, width, seed):
    drawn = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    vectors = drawn / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-6)
    index = make_vectors(vectors, type)
    file = tmp_path_factory.getbasetemp() / f"vectors-{type}"
    file.write_bytes(import_faiss().serialize_index(index).tobytes())
    read = read_vectors(file, type)
    assert (read.ntotal, read.d) == (count, width)
    stored = read.reconstruct_n(0, count) if count else vectors
    assert np.array_equal(stored, index.reconstruct_n(0, count) if count else vectors)
    assert np.abs(stored - vectors).max(initial=0) <= {"flat": 0, "fp16": 1e-3, "sq8": 1e-2}[type]


@pytest.mark.parametrize("type", ["fp16", "sq8"])
def test_a_file_of_another_type_or_cut_short_is_refused(tmp_path, type):
    data = import_faiss().serialize_index(make_vectors(np.ones((100, 8), np.float32), type)).tobytes()
    (tmp_path / "whole").write_bytes(data)
    for other in {"flat", "fp16", "sq8"} - {type}:
        with pytest.raises(ValueError, match="it is no|it has no room|not of the type"):
            read_vectors(tmp_path / "whole", other)
    (tmp_path / "cut").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="it has no room"):
        read_vectors(tmp_path / "cut", type)


@pytest.mark.parametrize("type", ["flat", "fp16", "sq8"])
@given(count=st.integers(1, 12), slots=st.integers(1, 4), k=st.integers(1, 14), seed=st.integers(0, 100))
def test_search_is_exact_over_what_is_stored(type, count, slots, k, seed):
    drawn = np.random.default_rng(seed).integers(-2, 3, (count * slots, 3)).astype(np.float32)  # with ties
    index = make_vectors(drawn, type)
    stored = index.reconstruct_n(0, len(drawn)).reshape(count, slots, 3)
    query = np.random.default_rng(seed + 1).integers(-2, 3, (1, 3)).astype(np.float32)
    part = Part(index, query, slots)
    ranking = best_distinct([part], k)
    scores = part.scores(np.arange(count))
    np.testing.assert_allclose(scores, (stored @ query[0]).max(1), atol=1e-5)
    order = np.lexsort((np.arange(count), -scores))[:k]
    assert ranking.items.tolist() == order.tolist()
