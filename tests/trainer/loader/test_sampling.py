"""Every image, caption and view comes as often as it should: the arithmetic of a batch, without reading anything."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.trainer.loader.sampling import STRETCHES, Sampler, epoch_order


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_an_epoch_is_shuffled_within_windows(sizes, window, seed):
    """Every row comes once, a stretch of a shard spreads over two windows at most, and the same seed gives the same order."""
    shards = np.repeat(np.arange(len(sizes)) * 2, sizes)
    order = epoch_order(shards, window, np.random.default_rng(seed))
    assert np.array_equal(np.sort(order), np.arange(len(shards)))
    assert np.array_equal(order, epoch_order(shards, window, np.random.default_rng(seed)))
    windows = np.empty(len(order), np.int64)
    windows[order] = np.arange(len(order)) // window
    stretch = -(-window // STRETCHES)
    for first, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        for start in range(first, first + size, stretch):
            assert np.ptp(windows[start : min(start + stretch, first + size)]) <= 1


def test_a_small_set_is_shuffled_as_a_whole():
    drawn = Counter(tuple(epoch_order(np.array([0, 0, 1, 3]), 4, np.random.default_rng(s))) for s in range(4800))
    assert drawn.keys() == set(permutations(range(4)))
    assert min(drawn.values()) > 140  # of 200 expected each
    assert max(drawn.values()) < 260


def test_shards_of_a_large_set_come_in_another_order_each_epoch():
    shards = np.arange(4096) // 64
    first, second = (epoch_order(shards, 1024, np.random.default_rng(seed)) for seed in range(2))
    for order in (first, second):
        assert {len(set(shards[part])) for part in order.reshape(4, 1024)} == {16}  # whole shards, mixed
    assert set(shards[first[:1024]]) != set(shards[second[:1024]])


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_caption_is_matched_with_every_view_equally_often(counts, views, captions_per_image, matched_captions):
    """After as many epochs as an image has captions times views."""
    sampler = Sampler(
        np.array(counts),
        np.zeros(len(counts), int),
        batch_size=len(counts),
        captions_per_image=captions_per_image,
        matched_captions=matched_captions,
        views=views,
        seed=0,
        shuffle_window=9,
    )
    owners = np.repeat(np.arange(len(counts)), counts)  # the image of each caption
    for image, count in enumerate(counts):
        seen = Counter()
        for epoch in range(count * views):
            sample = sampler.sample(epoch)
            assert np.array_equal(sample.images[sample.image_rows], owners[sample.captions])
            view = sample.views[sample.images == image].item()
            matched = sample.captions[sample.matched]
            seen.update((view, caption) for caption in matched[owners[matched] == image].tolist())
        assert len(seen) == count * views
        assert len(set(seen.values())) == 1


def test_a_sample_is_a_function_of_its_number_and_the_seed():
    options = {"batch_size": 3, "captions_per_image": 1, "matched_captions": 0, "views": 2, "shuffle_window": 4}
    counts, shards = np.array([2, 1, 3, 2, 2, 4, 1]), np.zeros(7, int)
    first, again, other = (Sampler(counts, shards, seed=seed, **options) for seed in (5, 5, 6))
    forward = [first.sample(number) for number in range(8)]
    for number in reversed(range(8)):
        for ours, theirs in zip(vars(forward[number]).values(), vars(again.sample(number)).values(), strict=True):
            assert np.array_equal(ours, theirs)
    assert any(not np.array_equal(forward[n].images, other.sample(n).images) for n in range(8))


@pytest.mark.parametrize("count", [1, 5, 16, 17, 10_000])
def test_an_image_of_very_many_captions_brings_16_of_them_and_over_the_epochs_all(count):
    options = {
        "batch_size": 2,
        "captions_per_image": 0,
        "matched_captions": 1,
        "views": 1,
        "seed": 0,
        "shuffle_window": 4,
    }
    sampler = Sampler(np.array([count, 2]), np.zeros(2, int), **options)
    samples = [sampler.sample(number) for number in range(min(count, 40))]
    seen = {caption for sample in samples for caption in sample.captions[sample.image_rows == 0].tolist()}
    assert {len(sample.captions) for sample in samples} == {min(count, 16) + 2}
    assert len(seen) == min(count, 16 * len(samples))
