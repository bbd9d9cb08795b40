"""Exact search for the k best distinct images or texts, and re-ranking by image-text matching.

score(text, image) is the maximum over the image's query embeddings of the dot product with the text's embedding (Li et al.
2023, section 3.2). Ties go to the image that stands first in the dataset."""

from dataclasses import dataclass
from typing import Any

import numpy as np

SAME = 1e-5  # scores closer than this may come in another order from FAISS than from our own sum


@dataclass(frozen=True)
class Ranking:
    """The best items of one search, best first: positions in the index, and their scores."""

    items: np.ndarray  # (k,)
    scores: np.ndarray  # (k,) float32


def best_distinct(index: Any, queries: np.ndarray, k: int, per_item: int) -> Ranking:
    """The k items with the greatest score, which is the maximum over `queries` (n, E) and over the item's vectors.

    Item i owns `per_item` vectors of `index`, from i * per_item on. The result is exact: the FAISS search is widened until no
    item can be missing. Then the items that it found are scored again."""
    total = index.ntotal // per_item
    k = min(k, total)
    if k <= 0:
        return Ranking(np.empty(0, np.int64), np.empty(0, np.float32))
    wanted = min(index.ntotal, k * per_item + per_item)
    while True:
        scores, vectors = index.search(np.ascontiguousarray(queries, np.float32), wanted)
        best = _best_per_item(scores, vectors // per_item)
        kth = np.partition(best[1], -k)[-k] if len(best[0]) >= k else -np.inf
        # every missing item scores below the last entry of each query's list
        if wanted == index.ntotal or scores[:, -1].max() < kth - SAME:
            break
        wanted = min(index.ntotal, 2 * wanted)
    items = best[0][best[1] >= kth - SAME]
    exact = np.array([_score(index, queries, item, per_item) for item in items], np.float32)
    order = np.lexsort((items, -exact))[:k]
    return Ranking(items[order], exact[order])


def _best_per_item(scores: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, c) scores of items -> the distinct items and the best score of each."""
    distinct, inverse = np.unique(items.reshape(-1), return_inverse=True)
    best = np.full(len(distinct), -np.inf, np.float32)
    np.maximum.at(best, inverse, scores.reshape(-1))
    return distinct, best


def _score(index: Any, queries: np.ndarray, item: int, per_item: int) -> float:
    vectors = index.reconstruct_n(int(item) * per_item, per_item)  # (per_item, E)
    return float(np.max(np.einsum("ne,qe->nq", queries, vectors)))


def nearest_images(index: Any, query: np.ndarray, k: int, per_item: int) -> Ranking:
    """The k images most like the picture `query` (Q, E). The score is the mean over the Q queries of their dot products.

    Query q of one picture is compared only with query q of another, because each query has its own role. The search is exact,
    over all images."""
    vectors = index.reconstruct_n(0, index.ntotal).reshape(-1, query.size)  # (N, Q * E)
    scores = vectors @ query.reshape(-1).astype(np.float32) / per_item
    order = np.lexsort((np.arange(len(scores)), -scores))[:k]
    return Ranking(order, scores[order].astype(np.float32))


def reorder(hits: Ranking, matching: np.ndarray) -> tuple[Ranking, np.ndarray]:
    """Rank by matching score plus first score, as BLIP-2 does. `matching` (k,) is in the order of `hits`.

    Returns the new ranking, and the position (k,) in `hits` of each of its items."""
    scores = matching + hits.scores
    order = np.lexsort((hits.items, -scores))
    return Ranking(hits.items[order], scores[order]), order
