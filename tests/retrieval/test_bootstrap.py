"""The bootstrap against a plain loop, and against what a formula says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval import bootstrap
from qf.retrieval.bootstrap import interval, resampled


@st.composite
def counted(draw):
    """hits (S, N) and counts (N,)"""
    counts = np.array(draw(st.lists(st.integers(1, 5), min_size=1, max_size=12)))
    scorers = draw(st.integers(1, 3))
    return np.array([[draw(st.integers(0, int(count))) for count in counts] for _ in range(scorers)]), counts


@settings(max_examples=60)
@given(counted(), st.integers(0, 2**31), st.integers(1, 40))
def test_replicates_are_those_of_a_plain_loop_whatever_is_drawn_at_once(made, seed, at_once):
    hits, counts = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWN", at_once)
        found = resampled(hits, counts, 20, seed)
    random = np.random.default_rng(seed)
    for replicate in found:
        drawn = random.integers(len(counts), size=len(counts))
        for scorer, share in zip(hits, replicate, strict=True):
            assert share == pytest.approx(100 * sum(scorer[n] for n in drawn) / sum(counts[n] for n in drawn))


def test_the_interval_of_independent_queries_is_that_of_a_share():
    """400 images with a query each, 70 % of them found: the normal interval is 65.5 to 74.5."""
    hits = (np.arange(400) < 280).astype(int)
    low, high = interval(resampled(hits[None], np.ones(400, int))[:, 0])
    half = 196 * (0.7 * 0.3 / 400) ** 0.5
    assert low == pytest.approx(70 - half, abs=0.6)
    assert high == pytest.approx(70 + half, abs=0.6)


def test_captions_of_an_image_that_fail_together_widen_the_interval():
    """The same 70 % of 400 texts, five an image: an image counts once, not five times."""
    alone = interval(resampled((np.arange(400) < 280).astype(int)[None], np.ones(400, int))[:, 0])
    together = interval(resampled(np.where(np.arange(80) < 56, 5, 0)[None], np.full(80, 5))[:, 0])
    assert together[1] - together[0] > 1.8 * (alone[1] - alone[0])


def test_the_difference_of_two_scorers_is_a_paired_one():
    """Both find nearly the same images: their difference is far surer than either."""
    one = (np.arange(400) < 280).astype(int)
    other = one.copy()
    other[:8] = 0
    shares = resampled(np.stack([one, other]), np.ones(400, int))
    low, high = interval(shares[:, 0] - shares[:, 1])
    assert 0 < low < 2 < high < 4
    assert interval(resampled(np.stack([one, one]), np.ones(400, int)) @ [1, -1]) == (0.0, 0.0)


def test_the_same_seed_gives_the_same_interval():
    hits, counts = np.arange(50)[None] % 3, np.full(50, 3)
    assert (resampled(hits, counts) == resampled(hits, counts)).all()
    assert (resampled(hits, counts) != resampled(hits, counts, seed=1)).any()
