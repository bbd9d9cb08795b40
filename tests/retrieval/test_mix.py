"""The fit of the mix: on made-up scores, with ties on purpose, against its promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval.mix import candidates, fit_first, fit_matching, flattest_best, mixed, quality
from qf.retrieval.mix_file import Weights
from qf.trainer.metrics.retrieval import ranks
from qf.trainer.stage1.embedder import rerank


@st.composite
def made_up(draw):
    """clip, itc and itm scores (n, C) and what is relevant; few values, so that there are many ties."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, c = draw(st.integers(1, 12)), draw(st.integers(1, 14))
    clip, itc, itm = (torch.randint(-3, 4, (n, c), generator=random).float() for _ in range(3))
    relevant = torch.zeros(n, c, dtype=torch.bool)
    relevant[torch.arange(n), torch.randint(c, (n,), generator=random)] = True
    return clip * draw(st.sampled_from([0.01, 1.0])), itc, itm * 5, relevant


def at_1(scores, relevant):
    return int((ranks(scores, relevant) < 1).sum())


@settings(max_examples=150)
@given(made_up())
def test_the_mix_is_never_below_the_best_single_scorer(made):
    clip, itc, _, relevant = made
    weights = fit_first({"clip": clip, "itc": itc}, relevant)
    assert weights.clip + weights.itc == pytest.approx(1)
    found = quality(mixed({"clip": clip, "itc": itc}, weights), relevant)
    assert found >= max(quality(clip, relevant), quality(itc, relevant))


@settings(max_examples=150)
@given(made_up(), st.integers(1, 16))
def test_reranking_the_mix_is_never_below_the_mix(made, k):
    clip, _, itm, relevant = made
    chosen = candidates(clip, k)
    weight = fit_matching(clip, chosen, itm.gather(1, chosen), relevant)
    assert weight >= 0
    assert at_1(rerank(clip, chosen, weight * itm.gather(1, chosen)), relevant) >= at_1(clip, relevant)


@settings(max_examples=100)
@given(made_up(), st.integers(1, 16), st.integers(1, 5))
def test_candidates_are_the_best_and_ties_go_to_the_first(made, k, rows):
    naive = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in made[0].tolist()]
    assert candidates(made[0], k, rows).tolist() == naive


def test_without_the_encoder_the_run_counts_alone():
    assert fit_first({"itc": torch.rand(3, 4)}, torch.eye(3, 4) > 0) == Weights(0.0, 1.0, 0.0)


def test_each_score_counts_by_its_spread():
    """Two scorers that are unsure of different queries; one has a hundredth of the other's spread."""
    sure, unsure = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    clip = torch.cat([sure, unsure, sure, unsure]) / 100
    itc = torch.cat([unsure, sure, unsure, sure])
    relevant = torch.tensor([[True, False]]).expand(4, 2)
    weights = fit_first({"clip": clip, "itc": itc}, relevant)
    assert at_1(mixed({"clip": clip, "itc": itc}, weights), relevant) == 4
    assert weights.clip / weights.itc == pytest.approx(100, rel=1e-3)


def test_a_useless_scorer_gets_little_weight():
    torch.manual_seed(0)
    good, noise, relevant = torch.eye(200) + torch.rand(200, 200), torch.rand(200, 200), torch.eye(200) > 0
    noise_first = Weights(0.5, 0.5, 0.0)
    for scores, name in (({"clip": good, "itc": noise}, "itc"), ({"clip": noise, "itc": good}, "clip")):
        weights = fit_first(scores, relevant)
        assert getattr(weights, name) < 0.5
        assert at_1(mixed(scores, weights), relevant) >= at_1(mixed(scores, noise_first), relevant)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([3], 0),
        ([1, 2, 3, 3, 3, 2], 3),
        ([3, 3, 1, 3, 3, 3], 4),
        ([3, 3, 1, 3, 3], 0),
        ([3, 3, 3, 3], 1),
        ([1, 1, 1, 2], 3),
        ([1, 3, 3, 3], 2),
        ([3, 3, 3, 2], 0),
        ([3, 2, 3, 3, 2], 0),
    ],
)
def test_of_the_best_weights_the_middle_of_the_longest_range_is_taken_or_the_first_alone(found, wanted):
    assert flattest_best([(value, 0) for value in found]) == wanted


def test_recall_at_5_and_10_break_ties():
    assert flattest_best([(2, 8), (2, 9), (1, 99)]) == 1
    scores = torch.arange(20.0)[None]
    scores[0, 0] = 15.5  # four are better
    assert quality(scores, torch.eye(1, 20) > 0) == (0, 2)
