"""Fits the weights of the mix: pure functions on score matrices, one direction at a time.

Letters: n queries, C candidates. A matrix (n, C) holds a score of each pair, `relevant` (n, C) whether the pair belongs together.

Each fit tries a few weights on a coarse grid. The grid begins with the scorer that has learnt least (the encoder alone, or no
matching) and ends with the one that was trained. The choice, by R@1, must serve other queries and more candidates than these:

- It is not below either end. So no mix is below the best single scorer on the queries that it was fitted on.
- A weight counts as better than the first end only if that is more than noise: the queries that it gains, less those that it
  loses, are above two standard errors of that difference (McNemar 1947). If no weight is, the one nearest to the first end is
  taken. With three runs and subsets of 25, 100 and 250 validation images of the sample, the plain best weight lost up to 18 points
  of test R@1 against the encoder; so chosen, it lost none where the encoder was the best single scorer on the subset.
- Of the weights that are better, the best is taken: by R@1, then R@5 + R@10, then the middle of the longest range of equals,
  farthest from where the result changes."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..trainer.metrics.retrieval import ranks
from ..trainer.stage1.embedder import rerank
from .mix_file import Weights

STEPS = 20  # of the grid
STANDARD_ERRORS = 2.0  # of a difference that is more than noise


def mixed(scores: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The weighted sum of the scores clip and itc, (n, C) each. A score of weight zero may be missing."""
    weighed = [(scores[name], weight) for name, weight in (("clip", weights.clip), ("itc", weights.itc)) if weight]
    parts = [matrix if weight == 1 else weight * matrix for matrix, weight in weighed]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def candidates(scores: Tensor, k: int) -> Tensor:
    """scores (n, C) -> (n, K) the best of each query, at most `k`, in any order. Ties go to the first."""
    best = scores.topk(min(k, scores.shape[1]))
    torn = (scores >= best.values[:, -1:]).sum(1) > k  # others are as good as the last one
    best.indices[torn] = scores[torn].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best.indices


def fit_first(scores: Mapping[str, Tensor], relevant: Tensor) -> Weights:
    """The weights of clip and itc, which sum to one, without matching. Without clip, itc counts alone.

    Cosines of the encoder lie closer together than those of a run. So the grid steps through the share of each in the spread of
    the sum: at the middle both matter alike. It begins with the encoder alone."""
    if "clip" not in scores:
        return Weights(0.0, 1.0, 0.0)
    grid = []
    for step in range(STEPS + 1):
        clip, itc = (STEPS - step) / _spread(scores["clip"]), step / _spread(scores["itc"])
        share = round(itc / (clip + itc), 6)
        grid.append(Weights(round(1 - share, 6), share, 0.0))
    return grid[choose([ranks(mixed(scores, weights), relevant) for weights in grid])]


def fit_matching(first: Tensor, chosen: Tensor, matching: Tensor, relevant: Tensor) -> float:
    """The weight of the matching logit beside the first score (n, C), for the candidates `chosen` (n, K) with the logits
    `matching` (n, K). The grid begins with 0, the first score alone, and steps through the share of matching in the spread of
    the sum, up to 95 %. BLIP-2's own weight, 1, is the last one where matching logits are spread as widely as they commonly are."""
    unit = _spread(first.gather(1, chosen)) / _spread(matching)
    grid = sorted([*(round(unit * step / (STEPS - step), 6) for step in range(STEPS)), 1.0])
    return grid[choose([ranks(rerank(first, chosen, weight * matching), relevant) for weight in grid])]


def choose(found: Sequence[Tensor]) -> int:
    """The place in the grid of the weight to take. `found`, for each weight: the rank (n,) of each query's best relevant
    candidate, from 0 on."""
    at_1 = [_count(ranked, 1) for ranked in found]
    good = [n for n in range(len(found)) if at_1[n] >= max(at_1[0], at_1[-1])]
    better = [n for n in good if beyond_noise(found[n], found[0])]
    if not better:
        return good[0]
    quality = {n: (at_1[n], _count(found[n], 5) + _count(found[n], 10)) for n in better}
    return middle([n for n in better if quality[n] == max(quality.values())])


def beyond_noise(new: Tensor, old: Tensor) -> bool:
    """Whether the ranks (n,) `new` find more queries at 1 than `old` by more than two standard errors of the difference."""
    gained, lost = int(((new < 1) & (old >= 1)).sum()), int(((old < 1) & (new >= 1)).sum())
    return gained - lost > STANDARD_ERRORS * (gained + lost) ** 0.5


def middle(places: Sequence[int]) -> int:
    """The middle of the longest range of consecutive numbers: the earlier of two middles, of the earlier of two ranges."""
    longest: list[int] = []
    current: list[int] = []
    for place in places:
        current = [*current, place] if current and place == current[-1] + 1 else [place]
        longest = max(longest, current, key=len)
    return longest[(len(longest) - 1) // 2]


def _count(ranked: Tensor, k: int) -> int:
    return int((ranked < k).sum())


def _spread(scores: Tensor) -> float:
    """The standard deviation of a query's scores, the mean over queries."""
    return max(float(scores.std(1, correction=0).mean()), 1e-6)
