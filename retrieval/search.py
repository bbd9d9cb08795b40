"""Exact search for the k best distinct images or texts, and re-ranking by image-text matching.

In one space, score(text, image) is the maximum over the image's query embeddings of the dot product with the text's embedding
(Li et al. 2023, section 3.2). A score may be the weighted sum over several spaces. Ties go to the image that stands first in
the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAME = 1e-5  # scores closer than this may come in another order from FAISS than from our own sum
SCORED_AT_ONCE = 1024  # items


@dataclass(frozen=True)
class Ranking:
    """The best items of one search, best first: positions in the index, and their scores."""

    items: np.ndarray  # (k,)
    scores: np.ndarray  # (k,) float32


@dataclass(frozen=True)
class Part:
    """A part of a score: `weight` times the maximum, over `queries` (n, E) and the vectors of an item, of the dot product.

    Item i owns `per_item` vectors of the FAISS `index`, from i * per_item on. The weight is positive."""

    index: Any
    queries: np.ndarray
    per_item: int
    weight: float = 1.0

    @property
    def total(self) -> int:
        """The number of items."""
        return int(self.index.ntotal) // self.per_item

    def nearest(self, count: int) -> tuple[np.ndarray, float]:
        """At least `count` distinct items, or all, and a bound: this part is not greater for any other item."""
        wanted = min(self.index.ntotal, count * self.per_item)
        scores, vectors = self.index.search(np.ascontiguousarray(self.queries, np.float32), wanted)
        bound = -np.inf if wanted == self.index.ntotal else float(scores[:, -1].max())
        return np.unique(vectors // self.per_item), self.weight * bound

    def scores(self, items: np.ndarray) -> np.ndarray:
        """items (n,) -> this part of their scores (n,) float32. Items with the same vectors get the same score."""
        out = np.empty(len(items), np.float32)
        for start in range(0, len(items), SCORED_AT_ONCE):
            some = items[start : start + SCORED_AT_ONCE]
            places = some[:, None] * self.per_item + np.arange(self.per_item)
            vectors = self.index.reconstruct_batch(places.reshape(-1)).reshape(*places.shape, -1)  # (i, per_item, E)
            products = np.einsum("ne,iqe->iqn", self.queries, vectors)
            out[start : start + len(some)] = products.max((1, 2))
        return np.float32(self.weight) * out


def best_distinct(parts: Sequence[Part], k: int) -> Ranking:
    """The k items with the greatest score, which is the sum of the parts.

    Exact, by Fagin's threshold algorithm (Fagin, Lotem, Naor 2001, "Optimal aggregation algorithms for middleware"): the
    nearest items of each part are scored in all parts. An item that none of them found scores at most the sum of the bounds.
    The search is widened until the k-th best item is above that."""
    total = parts[0].total
    k = min(k, total)
    if k <= 0:
        return Ranking(np.empty(0, np.int64), np.empty(0, np.float32))
    same = SAME * sum(part.weight for part in parts)
    depth = k + 1
    while True:
        found, bounds = zip(*(part.nearest(depth) for part in parts), strict=True)
        items = np.unique(np.concatenate(found))
        scores = np.stack([part.scores(items) for part in parts]).sum(0)
        if sum(bounds) < np.partition(scores, -k)[-k] - same:
            break
        depth *= 2
    order = np.lexsort((items, -scores))[:k]
    return Ranking(items[order], scores[order])


def nearest_images(index: Any, query: np.ndarray, k: int, per_item: int) -> Ranking:
    """The k images most like the picture `query` (Q, E). The score is the mean over the Q queries of their dot products.

    Query q of one picture is compared only with query q of another, because each query has its own role. The search is exact,
    over all images."""
    vectors = index.reconstruct_n(0, index.ntotal).reshape(-1, query.size)  # (N, Q * E)
    scores = vectors @ query.reshape(-1).astype(np.float32) / per_item
    order = np.lexsort((np.arange(len(scores)), -scores))[:k]
    return Ranking(order, scores[order].astype(np.float32))


def reorder(hits: Ranking, matching: np.ndarray, weight: float = 1.0) -> tuple[Ranking, np.ndarray]:
    """Rank by first score plus `weight` times matching score; 1 is BLIP-2's way. `matching` (k,) is in the order of `hits`.

    Returns the new ranking, and the position (k,) in `hits` of each of its items."""
    scores = hits.scores + np.float32(weight) * matching
    order = np.lexsort((hits.items, -scores))
    return Ranking(hits.items[order], scores[order]), order
