"""The fit of the mix: on made-up scores, with ties on purpose, against its promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval.mix import beyond_noise, candidates, choose, fit_first, fit_matching, middle, mixed
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
    found = at_1(mixed({"clip": clip, "itc": itc}, weights), relevant)
    assert found >= max(at_1(clip, relevant), at_1(itc, relevant))


@settings(max_examples=150)
@given(made_up(), st.integers(1, 16))
def test_reranking_the_mix_is_never_below_the_mix(made, k):
    clip, _, itm, relevant = made
    chosen = candidates(clip, k)
    weight = fit_matching(clip, chosen, itm.gather(1, chosen), relevant)
    assert weight >= 0
    assert at_1(rerank(clip, chosen, weight * itm.gather(1, chosen)), relevant) >= at_1(clip, relevant)


@settings(max_examples=100)
@given(made_up(), st.integers(1, 16))
def test_with_widely_spread_logits_the_fit_is_not_below_blip2s_sum(made, k):
    _, itc, itm, relevant = made
    itc, itm = itc / 100, itm + torch.arange(itm.shape[1]) / 10  # no logits are all alike
    chosen = candidates(itc, k)
    matching = itm.gather(1, chosen)
    weight = fit_matching(itc, chosen, matching, relevant)
    assert at_1(rerank(itc, chosen, weight * matching), relevant) >= at_1(rerank(itc, chosen, matching), relevant)


@settings(max_examples=100)
@given(made_up(), st.integers(1, 16))
def test_candidates_are_the_best_and_ties_go_to_the_first(made, k):
    naive = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in made[0].tolist()]
    assert [sorted(row) for row in candidates(made[0], k).tolist()] == [sorted(row) for row in naive]


def test_without_the_encoder_the_run_counts_alone():
    assert fit_first({"itc": torch.rand(3, 4)}, torch.eye(3, 4) > 0) == Weights(0.0, 1.0, 0.0)


def test_each_score_counts_by_its_spread():
    """Two scorers that are unsure of different queries; one has a hundredth of the other's spread."""
    sure, unsure = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    clip = torch.cat([sure, unsure] * 10) / 100
    itc = torch.cat([unsure, sure] * 10)
    relevant = torch.tensor([[True, False]]).expand(20, 2)
    weights = fit_first({"clip": clip, "itc": itc}, relevant)
    assert at_1(mixed({"clip": clip, "itc": itc}, weights), relevant) == 20
    assert weights.clip / weights.itc == pytest.approx(100, rel=1e-3)


def test_a_useless_scorer_gets_no_weight():
    torch.manual_seed(0)
    good, noise, relevant = torch.eye(200) + torch.rand(200, 200), torch.rand(200, 200), torch.eye(200) > 0
    assert fit_first({"clip": good, "itc": noise}, relevant) == Weights(1.0, 0.0, 0.0)
    assert fit_first({"clip": noise, "itc": good}, relevant).clip < 0.1
    blurred = torch.eye(200) + torch.rand(200, 200) * 1.3
    chosen = candidates(blurred, 16)
    assert fit_matching(blurred, chosen, noise[:, :16], relevant) == 0
    assert fit_matching(blurred, chosen, relevant.float().gather(1, chosen), relevant) > 0


def ranked(*at_1, queries=100):
    """The ranks of so many queries for each weight, of which the first `at_1` are found."""
    return [(torch.arange(queries) >= count).long() for count in at_1]


@pytest.mark.parametrize(
    ("at_1", "wanted"),
    [
        ((50, 51, 52, 40), 0),  # nothing is better than the first end by more than noise
        ((50, 60, 60, 40), 1),
        ((50, 60, 60, 60, 40), 2),
        ((50, 60, 40, 60, 60, 60), 4),
        ((50, 49, 51, 51, 51), 2),  # the first that is not below the other end
        ((50, 52, 60, 40, 55), 2),
        ((0, 0, 0), 0),
        ((100, 100, 100), 0),
    ],
)
def test_the_choice_is_careful(at_1, wanted):
    assert choose(ranked(*at_1)) == wanted


def test_recall_at_5_and_10_break_ties():
    first, second, third = ranked(50, 60, 60)
    assert choose([first, torch.where(second == 1, 20, 0), third]) == 2
    assert choose([first, torch.where(second == 1, 7, 0), torch.where(third == 1, 20, 0)]) == 1


def test_gains_are_counted_against_losses():
    before = torch.arange(100) % 2  # every second query is found
    assert beyond_noise(torch.where(torch.arange(100) < 10, 0, before), before)  # five more, none less
    after = before.clone()
    after[:40] = 1 - after[:40]  # twenty more, twenty less
    after[41:49:2] = 0
    assert not beyond_noise(after, before)  # four more of forty-four that changed


def test_the_middle_is_that_of_the_longest_range():
    assert [middle(places) for places in ([3], [0, 1], [0, 1, 2, 6], [0, 4, 5, 6, 9], [0, 1, 5, 6])] == [3, 0, 1, 5, 0]
