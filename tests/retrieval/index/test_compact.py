"""How few bytes hold an index: winning slots, recall, the choice of a form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.retrieval.index.compact import best_images, choose_form, recall_of, winning_slots


def unit(draw, *shape):
    values = draw.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def collection(images=60, slots=6, alive=2, width=16, each=4, seed=0):
    """Images of which the first `alive` slots alone ever win: texts lie near these, and the other slots are zero."""
    draw = np.random.default_rng(seed)
    vectors = unit(draw, images, slots, width)
    vectors[:, alive:] = 0
    owners = np.repeat(np.arange(images), each)
    texts = vectors[owners, np.tile(np.arange(each) % alive, images)] + 0.1 * unit(draw, len(owners), width)
    return vectors, texts / np.linalg.norm(texts, axis=1, keepdims=True), owners


def test_the_slots_that_win_are_kept():
    vectors, texts, owners = collection()
    assert winning_slots(vectors, texts, owners) == (0, 1)
    assert winning_slots(vectors[:, ::-1], texts, owners) == (4, 5)


@given(images=st.integers(1, 30), slots=st.integers(1, 4), texts=st.integers(1, 8), seed=st.integers(0, 50))
def test_the_best_images_are_those_of_brute_force(images, slots, texts, seed):
    draw = np.random.default_rng(seed)
    vectors, queries = (
        draw.integers(-1, 2, (images, slots, 3)).astype(np.float32),
        draw.integers(-1, 2, (texts, 3)).astype(np.float32),
    )
    for found, query in zip(best_images(vectors, queries), queries, strict=True):
        scores = [max(float(slot @ query) for slot in image) for image in vectors]
        assert found.tolist() == sorted(range(images), key=lambda n: (-scores[n], n))[:10]


def test_recall_counts_what_is_found():
    assert recall_of(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])) == 0.75


def test_the_smallest_form_that_holds_the_recall_is_chosen():
    vectors, texts, owners = collection()
    form = choose_form(vectors, texts, owners, ["sq8", "fp16", "flat"], 0.9)
    assert (form.type, form.slots) == ("sq8", (0, 1))
    assert form.recall >= 0.9
    assert form.why == f"recall@10 {form.recall:.4f} of 120 held-out captions among 60 images"
    exact = choose_form(vectors, texts, owners, ["sq8", "fp16", "flat"], 1.0)
    assert exact.recall == 1.0
    assert exact.bytes >= form.bytes


def test_a_recall_out_of_reach_is_said():
    draw = np.random.default_rng(0)
    base = unit(draw, 1, 1, 8)
    vectors = base + 1e-4 * unit(draw, 400, 1, 8)  # nearer to each other than sq8 tells apart
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors = np.concatenate([vectors, -vectors])
    texts = unit(draw, 800, 8)
    form = choose_form(vectors, texts, np.arange(800), ["sq8"], 0.999)
    assert form.type == "sq8"
    assert form.recall < 0.999
    assert form.why.endswith(", below --recall 0.999")


@pytest.mark.parametrize("types", [["sq8"], ["sq8", "fp16", "flat"]])
def test_without_captions_nothing_is_measured(types):
    form = choose_form(
        unit(np.random.default_rng(0), 5, 3, 4), np.empty((0, 4), np.float32), np.empty(0, np.int64), types, 0.9
    )
    assert (form.type, form.slots, form.recall) == (types[-1], (0, 1, 2), None)
