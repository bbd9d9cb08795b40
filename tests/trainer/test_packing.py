"""Sequences laid end to end, and image-text pairs that attend to their image, against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer import packing
from qf.trainer.attention import attend
from qf.trainer.packing import ImageRouting, Layout, TextGroups
from torch.testing import assert_close


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4))
def test_splitting_a_packed_tensor_and_joining_it_changes_nothing(queries, groups):
    layout = Layout(queries, tuple((n, length if queries else max(1, length)) for n, length in groups))
    tokens = sum(n * (queries + length) for n, length in layout.groups)
    packed = torch.arange(tokens * 2.0).reshape(tokens, 2)
    split = layout.split(packed)
    assert [group.shape for group in split] == [(n, queries + length, 2) for n, length in layout.groups]
    assert torch.equal(layout.join(split), packed)


def test_queries_come_before_all_text():
    layout = Layout(2, ((1, 3), (2, 1)))  # three sequences
    first, second = layout.split(torch.arange(11.0)[:, None])
    assert first[:, :, 0].tolist() == [[0, 1, 6, 7, 8]]
    assert second[:, :, 0].tolist() == [[2, 3, 9], [4, 5, 10]]
    assert layout.first(3) == Layout(2, ((1, 1), (2, 1)))


@pytest.mark.parametrize("trim", [False, True])
def test_texts_return_in_their_own_order(trim):
    lengths = torch.tensor([4, 1, 3, 3, 2, 1, 5, 4])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.arange(48).reshape(8, 6) * mask
    texts = TextGroups.of(ids, mask, trim)
    assert [group.shape for group in texts.input_ids] == list(texts.groups)
    assert (sum(n * length for n, length in texts.groups) < 48) == trim
    assert torch.equal(texts.restore([group[:, :, None] for group in texts.input_ids], 6)[:, :, 0], ids)
    assert torch.equal(texts.order[texts.back], torch.arange(8))


@pytest.mark.parametrize("padding", [0.0, 3.0])
@pytest.mark.parametrize("image_rows", [[0], [1, 1, 1], [2, 0, 2, 1, 2, 0]])
def test_each_pair_attends_to_its_own_image(monkeypatch, padding, image_rows):
    """Together with the other pairs of the image, or to a copy of its keys and values where that costs less."""
    monkeypatch.setattr(packing, "MOST_PADDING", padding)
    rows = torch.tensor(image_rows)
    query = torch.randn(len(rows), 5, 2, 4)  # (N, Q, H, D / H)
    key, value = torch.randn(2, 3, 2, 7, 4)  # (B, H, T, D / H) each
    routing = ImageRouting.of(rows, 3)
    if not padding:
        assert routing.pairs is None
    found = routing.scatter(attend(*routing.gather(query, key, value), None, 0.0))
    for n, row in enumerate(image_rows):
        alone = attend(query[n, None].transpose(1, 2), key[row, None], value[row, None], None, 0.0)
        assert_close(found[n], alone[0].transpose(0, 1).flatten(1))
