"""Losses and negatives against slow oracles written here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.objectives import Lesson, hard_negatives, itc_loss, itm_pairs, positives, similarities, teach_loss
from torch.testing import assert_close


def test_similarity_is_the_maximum_over_queries():
    images, texts = torch.randn(3, 4, 5), torch.randn(6, 5)
    naive = torch.tensor([[max(float(q @ t) for q in image) for t in texts] for image in images])
    assert_close(similarities(images, texts), naive)


def test_itc_loss_with_several_positives():
    torch.manual_seed(0)
    logits = torch.randn(3, 5)
    owner = [0, 0, 1, 2, 2]
    positive = torch.tensor([[owner[m] == b for m in range(5)] for b in range(3)])

    def one_way(rows, positives):
        total = 0.0
        for row, mine in zip(rows, positives, strict=True):
            smooth = [0.9 * float(p) / int(mine.sum()) + 0.1 / len(row) for p in mine]
            total -= sum(t * float(v) for t, v in zip(smooth, row.log_softmax(0), strict=True))
        return total / len(rows)

    naive = (one_way(logits, positive) + one_way(logits.T, positive.T)) / 2
    assert float(itc_loss(logits, positive)) == pytest.approx(naive, rel=1e-5)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_a_share_of_the_contrastive_targets_is_the_teachers():
    torch.manual_seed(0)
    logits, owner = torch.randn(3, 5), [0, 0, 1, 2, 2]
    positive = torch.tensor([[owner[m] == b for m in range(5)] for b in range(3)])
    lesson = Lesson(unit(3, 4), unit(5, 4))
    taught = lesson.images @ lesson.texts.T / 0.02

    def one_way(rows, positives, teacher):
        total = 0.0
        for row, mine, theirs in zip(rows, positives, teacher, strict=True):
            own = [float(p) / int(mine.sum()) for p in mine]
            target = [0.7 * a + 0.3 * float(b) for a, b in zip(own, theirs.softmax(0), strict=True)]
            smooth = [0.9 * t + 0.1 / len(row) for t in target]
            total -= sum(t * float(v) for t, v in zip(smooth, row.log_softmax(0), strict=True))
        return total / len(rows)

    naive = (one_way(logits, positive, taught) + one_way(logits.T, positive.T, taught.T)) / 2
    assert float(itc_loss(logits, positive, lesson, 0.3)) == pytest.approx(naive, rel=1e-5)
    assert torch.equal(itc_loss(logits, positive, lesson, 0.0), itc_loss(logits, positive))


def test_the_distance_to_the_teacher_is_that_of_each_text_and_of_each_images_best_query():
    torch.manual_seed(0)
    images, texts, lesson = unit(3, 4, 5), unit(6, 5), Lesson(unit(3, 5), unit(6, 5))
    image = sum(1 - max(float(q @ t) for q in one) for one, t in zip(images, lesson.images, strict=True)) / 3
    text = sum(1 - float(a @ b) for a, b in zip(texts, lesson.texts, strict=True)) / 6
    assert float(teach_loss(images, texts, lesson)) == pytest.approx(image + text, rel=1e-5)
    assert float(teach_loss(lesson.images[:, None], lesson.texts, lesson)) == pytest.approx(0, abs=1e-6)


def test_negatives_never_show_the_same_picture_and_are_mostly_hard():
    torch.manual_seed(0)
    image_rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    same_picture = torch.tensor([0, 1, 0, 3])  # images 0 and 2 are one picture
    positive = same_picture[:, None] == same_picture[image_rows][None]
    similarity = torch.zeros(4, 8)
    similarity[3, 2] = similarity[1, 6] = 8.0  # text 2 is close to image 3, image 1 is close to text 6
    drawn = [hard_negatives(similarity, positive, image_rows, torch.arange(8)) for _ in range(200)]
    for images, texts in drawn:
        assert not positive[images, torch.arange(8)].any()
        assert not positive[image_rows, texts].any()
    assert sum(int(images[2] == 3) for images, _ in drawn) > 190
    assert sum(int(texts[2] == 6) for _, texts in drawn) > 190


def test_easy_negatives_are_drawn_evenly():
    torch.manual_seed(0)
    rows = torch.arange(4)
    similarity = torch.tensor([[9.0, 0, 0, 8], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]])
    draws = [
        hard_negatives(similarity, torch.eye(4, dtype=torch.bool), rows, rows, hardness=0.0)[1][0] for _ in range(600)
    ]
    counts = torch.stack(draws).bincount(minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 150


def test_pairs_to_match_are_positives_and_both_kinds_of_negatives():
    images, texts, matches = itm_pairs(
        torch.eye(2, dtype=torch.bool),
        torch.tensor([0, 1]),
        torch.arange(2),
        (torch.tensor([1, 0]), torch.tensor([1, 0])),
    )
    assert images.tolist() == [0, 1, 1, 0, 0, 1]
    assert texts.tolist() == [0, 1, 0, 1, 1, 0]
    assert matches.tolist() == [True, True, False, False, False, False]
    image_rows = torch.tensor([0, 0, 1, 1])
    positive = torch.arange(2)[:, None] == image_rows
    images, texts, _ = itm_pairs(
        positive, image_rows, torch.tensor([1, 2]), (torch.tensor([1, 0]), torch.tensor([3, 0]))
    )
    assert images.tolist() == [0, 1, 1, 0, 0, 1]
    assert texts.tolist() == [1, 2, 1, 2, 3, 0]


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_where_every_text_fits_every_picture_all_pairs_match(hardness):
    positive, rows = torch.ones(3, 3, dtype=torch.bool), torch.arange(3)
    positive[0, 1] = False  # text 1 and image 0 are the only negatives of each other
    negatives = hard_negatives(torch.zeros(3, 3), positive, rows, rows, hardness)
    images, texts, matches = itm_pairs(positive, rows, rows, negatives)
    assert matches.tolist() == positive[images, texts].tolist()
    assert [(int(i), int(t)) for i, t in zip(images[~matches], texts[~matches], strict=True)] == [(0, 1), (0, 1)]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_positives_are_texts_of_the_picture_and_texts_that_read_the_same(pictures, texts):
    """No other texts are."""
    rows, reads = [row % len(pictures) for row, _ in texts], [7 * words for _, words in texts]
    found = positives(torch.tensor(pictures), torch.tensor(rows), torch.tensor(reads))
    for image, picture in enumerate(pictures):
        described = {words for row, words in zip(rows, reads, strict=True) if pictures[row] == picture}
        assert found[image].tolist() == [words in described for words in reads]


def test_similarities_in_slices_equal_those_of_the_whole_batch(monkeypatch):
    images, texts = torch.randn(7, 4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    whole = similarities(images, texts)
    expected = torch.autograd.grad(whole.square().sum(), (images, texts))
    monkeypatch.setattr("qf.trainer.objectives.MOST_PRODUCTS", 2 * 4 * 6)
    slices = similarities(images, texts)
    assert_close(slices, whole)
    assert_close(torch.autograd.grad(slices.square().sum(), (images, texts)), expected)
