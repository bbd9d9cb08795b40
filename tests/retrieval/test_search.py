"""Exact search over distinct items, against a naive count, with ties on purpose."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval.index.vectors import make_vectors
from qf.retrieval.search import Part, Ranking, best_distinct, nearest_images, reorder


def naive(parts, k):
    """The k items with the greatest weighted sum, over (vectors (N, Q, E), queries (n, E), weight), of the maximum; ties to
    the first."""
    scores = sum(
        weight * np.einsum("iqe,ne->inq", vectors.astype(np.float64), queries.astype(np.float64)).max((1, 2))
        for vectors, queries, weight in parts
    )
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return order, [scores[i] for i in order]


def searched(parts, k):
    """The same by `best_distinct`."""
    return best_distinct(
        [Part(make_vectors(v.reshape(-1, v.shape[-1])), queries, v.shape[1], weight) for v, queries, weight in parts], k
    )


@st.composite
def made_up_parts(draw, most):
    """Up to `most` parts over the same items. Few values: many ties, and sums without rounding."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, parts = draw(st.integers(1, 30)), []
    for _ in range(draw(st.integers(1, most))):
        per_item, width, queries = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        vectors = random.integers(-2, 3, (items, per_item, width)).astype(np.float32)
        asked = random.integers(-2, 3, (queries, width)).astype(np.float32)
        parts.append((vectors, asked, draw(st.sampled_from([0.125, 0.25, 0.5, 1.0, 2.0]))))
    return parts


@settings(max_examples=150, deadline=None)
@given(made_up_parts(most=1), st.integers(1, 35))
def test_the_k_best_distinct_items_come_in_a_defined_order(parts, k):
    hits = searched(parts, k)
    assert (hits.items.tolist(), hits.scores.tolist()) == naive(parts, k)


@settings(max_examples=300, deadline=None)
@given(made_up_parts(most=3), st.integers(1, 35))
def test_the_k_best_by_a_weighted_sum_over_spaces_come_in_a_defined_order(parts, k):
    hits = searched(parts, k)
    assert (hits.items.tolist(), hits.scores.tolist()) == naive(parts, k)


def test_an_item_with_all_the_best_vectors_does_not_hide_the_others():
    vectors = np.zeros((50, 8, 4), np.float32)
    vectors[7] = 5.0
    vectors[:, 0, 0] += np.arange(50) / 100
    assert searched([(vectors, np.eye(1, 4, dtype=np.float32), 1.0)], 5).items.tolist() == [7, 49, 48, 47, 46]


def test_the_best_by_the_sum_may_be_the_best_in_no_space():
    first, second = np.zeros((2, 200, 1, 1), np.float32)
    first[:100, 0, 0] = second[100:, 0, 0] = np.linspace(1, 0.9, 100)
    first[150] = second[150] = 0.8  # below a hundred others in one space, below forty-nine in the other
    hits = searched([(first, np.ones((1, 1), np.float32), 0.5), (second, np.ones((1, 1), np.float32), 0.5)], 1)
    assert hits.items.tolist() == [150]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_search_among_unit_vectors_equals_the_full_score_matrix(weight):
    draw = np.random.default_rng(0)

    def unit(*shape):
        vectors = draw.normal(size=shape).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    trained, own = unit(500, 16, 32), unit(500, 1, 24)
    assert isinstance(make_vectors(trained.reshape(-1, 32)), faiss.IndexFlatIP)
    for _ in range(20):
        parts = [(trained, unit(1, 32), 1 - weight), (own, unit(1, 24), weight)][: 2 if weight else 1]
        assert searched(parts, 10).items.tolist() == naive(parts, 10)[0]


def test_an_item_has_the_same_score_wherever_it_stands():
    draw = np.random.default_rng(3)
    vectors = np.repeat(draw.normal(size=(1, 7, 33)).astype(np.float32), 3000, 0)
    part = Part(make_vectors(vectors.reshape(-1, 33)), draw.normal(size=(5, 33)).astype(np.float32), 7, 0.3)
    assert len(set(part.scores(np.arange(3000)).tolist())) == 1


def test_an_empty_index_gives_no_hits():
    part = Part(make_vectors(np.zeros((0, 4), np.float32)), np.ones((1, 4), np.float32), 1)
    assert len(best_distinct([part], 3).items) == 0


def test_images_like_an_image_compare_query_by_query():
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(20, 3, 4)).astype(np.float32)
    hits = nearest_images(make_vectors(vectors.reshape(-1, 4)), vectors[5], 4, 3)
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


def test_reordering_weighs_the_matching_score():
    first = Ranking(np.array([4, 2, 9]), np.array([0.75, 0.5, 0.25], np.float32))
    assert reorder(first, np.array([0.0, 3.0, 3.0], np.float32), 0.125)[0].scores.tolist() == [0.875, 0.75, 0.625]
    same, order = reorder(first, np.array([0.0, 3.0, 3.0], np.float32), 0.0)
    assert (same.items.tolist(), order.tolist()) == ([4, 2, 9], [0, 1, 2])
