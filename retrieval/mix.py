"""Fits the weights of the mix: pure functions on score matrices, one direction at a time.

Letters: n queries, C candidates. A matrix (n, C) holds a score of each pair, `relevant` (n, C) whether the pair belongs together.

Each fit tries a few weights, the single scorers among them, and takes the best by R@1; R@5 + R@10 break ties. So no mix is below
the best single scorer on the queries that it was fitted on. Three things keep it from learning the noise of few queries:

- It chooses one number, on a coarse grid.
- Among weights that are equally good it takes the middle of the longest range, farthest from where the result changes. The
  fewer the queries, the more weights are equally good and the more the range decides.
- The grid begins with the scorer that has learnt least: the encoder alone, or no matching. If that is as good as any mix, and
  the other end is not, it is taken: nothing shows that the other scorer helps, and among more candidates than there are in
  validation it may harm."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..trainer.metrics.retrieval import ranks
from ..trainer.stage1.embedder import rerank
from .mix_file import Weights

STEPS = 20  # of the grid
Quality = tuple[int, int]  # queries found at 1; found at 5, plus found at 10


def mixed(scores: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The weighted sum of the scores clip and itc, (n, C) each. A score of weight zero may be missing."""
    parts = [weight * scores[name] for name, weight in (("clip", weights.clip), ("itc", weights.itc)) if weight]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def candidates(scores: Tensor, k: int, rows: int = 256) -> Tensor:
    """scores (n, C) -> (n, K) the best of each query, at most `k`, ties to the first; computed `rows` queries at a time."""
    best = [some.sort(dim=1, descending=True, stable=True).indices[:, :k] for some in scores.split(rows)]
    return torch.cat(best) if best else torch.empty(0, min(k, scores.shape[1]), dtype=torch.long)


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
    return grid[flattest_best([quality(mixed(scores, weights), relevant) for weights in grid])]


def fit_matching(first: Tensor, chosen: Tensor, matching: Tensor, relevant: Tensor) -> float:
    """The weight of the matching logit beside the first score (n, C), for the candidates `chosen` (n, K) with the logits
    `matching` (n, K). The grid begins with 0, the first score alone, and steps through the share of matching in the spread of
    the sum, up to 95 %."""
    unit = _spread(first.gather(1, chosen)) / _spread(matching)
    grid = [round(unit * step / (STEPS - step), 6) for step in range(STEPS)]
    return grid[flattest_best([quality(rerank(first, chosen, weight * matching), relevant) for weight in grid])]


def quality(scores: Tensor, relevant: Tensor) -> Quality:
    """How well the scores (n, C) rank: R@1 first, then R@5 + R@10, as counts of queries."""
    found = ranks(scores, relevant)
    at_1, at_5, at_10 = (int((found < k).sum()) for k in (1, 5, 10))
    return at_1, at_5 + at_10


def flattest_best(qualities: Sequence[Quality]) -> int:
    """The middle of the longest range of the best qualities: the earlier of two middles, the earlier of two ranges.

    The first, if it is among the best and the last is not."""
    best = max(qualities)
    if qualities[0] == best != qualities[-1]:
        return 0
    longest, start = range(0), 0
    for n, found in enumerate([*qualities, None]):
        if found != best:
            longest = max(longest, range(start, n), key=len)
            start = n + 1
    return longest[(len(longest) - 1) // 2]


def _spread(scores: Tensor) -> float:
    """The standard deviation of a query's scores, the mean over queries."""
    return max(float(scores.std(1, correction=0).mean()), 1e-6)
