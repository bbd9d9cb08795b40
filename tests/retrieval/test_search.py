"""Exact search over distinct items, against a naive count, with ties on purpose."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval.index.vectors import flat
from qf.retrieval.search import Ranking, best_distinct, nearest_images, reorder


def naive(vectors, queries, k):
    """(N, Q, E), (n, E): the k items with the greatest maximum, ties to the first."""
    scores = np.einsum("iqe,ne->inq", vectors.astype(np.float64), queries.astype(np.float64)).max((1, 2))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return order, [scores[i] for i in order]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 35),
    st.integers(0, 2**32 - 1),
)
def test_the_k_best_distinct_items_come_in_a_defined_order(items, per_item, width, queries, k, seed):
    draw = np.random.default_rng(seed)
    vectors = draw.integers(-2, 3, (items, per_item, width)).astype(np.float32)  # few values: many ties
    asked = draw.integers(-2, 3, (queries, width)).astype(np.float32)
    hits = best_distinct(flat(vectors.reshape(-1, width)), asked, k, per_item)
    order, scores = naive(vectors, asked, k)
    assert hits.items.tolist() == order
    assert hits.scores.tolist() == scores


def test_an_item_with_all_the_best_vectors_does_not_hide_the_others():
    vectors = np.zeros((50, 8, 4), np.float32)
    vectors[7] = 5.0
    vectors[:, 0, 0] += np.arange(50) / 100
    hits = best_distinct(flat(vectors.reshape(-1, 4)), np.eye(1, 4, dtype=np.float32), 5, 8)
    assert hits.items.tolist() == [7, 49, 48, 47, 46]


def test_search_among_unit_vectors_equals_the_full_score_matrix():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(500, 16, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    index = flat(vectors.reshape(-1, 32))
    assert isinstance(index, faiss.IndexFlatIP)
    for query in draw.normal(size=(20, 1, 32)).astype(np.float32):
        assert best_distinct(index, query, 10, 16).items.tolist() == naive(vectors, query, 10)[0]


def test_an_empty_index_gives_no_hits():
    index = flat(np.zeros((0, 4), np.float32))
    assert len(best_distinct(index, np.ones((1, 4), np.float32), 3, 1).items) == 0


def test_images_like_an_image_compare_query_by_query():
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(20, 3, 4)).astype(np.float32)
    hits = nearest_images(flat(vectors.reshape(-1, 4)), vectors[5], 4, 3)
    scores = [float(np.mean([vectors[i, q] @ vectors[5, q] for q in range(3)])) for i in range(20)]
    assert hits.items.tolist() == sorted(range(20), key=lambda i: -scores[i])[:4]
    assert hits.scores[0] == pytest.approx(max(scores), rel=1e-5)


def test_reordering_adds_matching_to_the_first_score():
    hits, order = reorder(
        Ranking(np.array([4, 2, 9]), np.array([0.9, 0.8, 0.7], np.float32)), np.array([0.0, 3.0, 3.1], np.float32)
    )
    assert hits.items.tolist() == [2, 9, 4]
    assert order.tolist() == [1, 2, 0]
    assert hits.scores.tolist() == pytest.approx([3.8, 3.8, 0.9])
