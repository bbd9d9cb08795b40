"""Decoding on a decoder whose scores are written down."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.decoding import Decoding, generate

END, WORDS = 0, 4


class Table:
    """A decoder whose logits depend on the last token alone."""

    def __init__(self, logits: torch.Tensor, count: int = 1) -> None:
        self.logits, self.count = logits, count

    def start(self):
        return self.logits[WORDS].expand(self.count, -1).clone()

    def advance(self, rows, tokens):
        return self.logits[tokens].clone()


def score(logits, text, how):
    logs = logits.log_softmax(-1)
    path = [WORDS, *text]
    ended = len(text) < how.max_length
    total = sum(logs[a, b].item() for a, b in itertools.pairwise([*path, END] if ended else path))
    return total / (len(text) + ended) ** how.length_penalty


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_wide_beams_find_the_best_text_of_all(seed, length_penalty):
    logits = torch.randn(WORDS + 1, WORDS, generator=torch.Generator().manual_seed(seed)) * 2
    how = Decoding(beams=64, max_length=3, length_penalty=length_penalty)
    every = [list(t) for n in range(4) for t in itertools.product(range(1, WORDS), repeat=n)]
    best = max(score(logits, text, how) for text in every)
    (found,) = generate(Table(logits), frozenset((END,)), how)
    assert math.isclose(score(logits, found, how), best, rel_tol=1e-4, abs_tol=1e-5)


def test_a_text_has_its_least_and_its_most_tokens():
    logits = torch.zeros(WORDS + 1, WORDS)
    logits[:, END] = 5.0
    for beams, least in itertools.product((1, 3), (0, 2)):
        (text,) = generate(Table(logits), frozenset((END,)), Decoding(beams=beams, min_length=least, max_length=6))
        assert len(text) == least
    logits[:, END] = -50.0
    assert all(
        len(t) == 6 for b in (1, 3) for t in generate(Table(logits), frozenset((END,)), Decoding(beams=b, max_length=6))
    )


def test_the_repetition_penalty_makes_greedy_search_change_its_word():
    logits = torch.tensor([[-9.0, 2.0, 1.5, 1.0]]).expand(WORDS + 1, -1)
    (plain,) = generate(Table(logits), frozenset((END,)), Decoding(max_length=3))
    (changed,) = generate(Table(logits), frozenset((END,)), Decoding(max_length=3, repetition_penalty=4.0))
    assert (plain, changed) == ([1, 1, 1], [1, 2, 3])


@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_drawn_tokens_are_among_the_likeliest_that_make_up_top_p(top_p, seed):
    logits = torch.tensor([[-9.0, 2.0, 1.0, 0.0]]).expand(WORDS + 1, -1)
    shares = logits[0].softmax(-1).sort(descending=True)
    allowed = {
        int(t)
        for t, before in zip(shares.indices, shares.values.cumsum(0) - shares.values, strict=True)
        if before < top_p
    }
    how = Decoding(temperature=1.0, top_p=top_p, max_length=4, seed=seed)
    for text in generate(Table(logits, 3), frozenset((END,)), how):
        assert set(text) <= allowed


def test_each_token_of_the_first_text_is_reported():
    logits = torch.tensor([[-9.0, 2.0, 1.5, 1.0]]).expand(WORDS + 1, -1)
    seen: list[list[int]] = []
    generate(Table(logits, 2), frozenset((END,)), Decoding(max_length=3), lambda text: seen.append(list(text)))
    assert seen == [[1], [1, 1], [1, 1, 1]]


@pytest.mark.parametrize("beams", [1, 2, 8])
def test_more_beams_than_continuations_are_no_problem(beams):
    logits = torch.tensor([[0.0, 1.0]]).expand(WORDS + 1, -1)
    assert len(generate(Table(logits), frozenset((END,)), Decoding(beams=beams, max_length=3))) == 1
