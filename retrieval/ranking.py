"""Ranks the queries of a split by scorers, some queries at a time: pure functions on embeddings, in bounded memory.

Letters: N images with Q embeddings each, M texts, E width of their space; n queries, C candidates, K of them chosen. Texts rank
images, or images rank texts. Ties go to the candidate that stands first. Results are on the CPU."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..trainer.metrics.retrieval import ranks
from ..trainer.objectives import similarities
from .mix import candidates, mixed
from .mix_file import TEXT_TO_IMAGE, Scorer

BLOCK = 2**21  # scores, and dot products, in memory at once


@dataclass(frozen=True)
class Embedded:
    """The images and texts of a split in one space."""

    images: Tensor  # (N, Q, E)
    texts: Tensor  # (M, E)

    def scores(self, way: str, queries: slice | Tensor = slice(None), block: int = BLOCK) -> Tensor:
        """(n, C) of some queries and all candidates: the maximum over an image's embeddings of the dot product."""
        images, texts = self.images, self.texts
        if way == TEXT_TO_IMAGE:
            texts = texts[queries]
        else:
            images = images[queries]
        out = torch.empty(len(images), len(texts))
        for some, those in _tiles(len(images), len(texts), images.shape[1], block):
            out[some, those] = similarities(images[some], texts[those]).cpu()
        return out.T if way == TEXT_TO_IMAGE else out


def _tiles(images: int, texts: int, per_image: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix of images and texts that take at most `block` dot products each, or one of each."""
    wide = max(1, min(texts, block // per_image))
    high = max(1, block // (per_image * wide))
    for top in range(0, images, high):
        for left in range(0, texts, wide):
            yield slice(top, top + high), slice(left, left + wide)


@dataclass(frozen=True)
class Ranked:
    """The rankings of n queries by one scorer in one direction."""

    ranks: Tensor  # (n,) of each query's best relevant candidate, from 0 on
    chosen: Tensor  # (n, K) the best candidates, best first
    scores: Tensor  # (n, K) theirs
    seconds: float  # for all queries, without embedding them

    @classmethod
    def empty(cls, queries: int, k: int) -> "Ranked":
        """Room for the rankings of so many queries."""
        whole = torch.empty(queries, dtype=torch.long), torch.empty(queries, k, dtype=torch.long)
        return cls(*whole, torch.empty(queries, k), 0.0)

    @property
    def milliseconds(self) -> float:
        """The mean time of a query."""
        return 1000 * self.seconds / max(1, len(self.ranks))


def rank(
    embedded: Mapping[str, Embedded],
    scorers: Mapping[str, Scorer],
    way: str,
    owners: Tensor,
    k: int,
    block: int = BLOCK,
) -> dict[str, Ranked]:
    """Rank all queries of a direction by each scorer, without matching; the best `k` candidates are kept.

    `embedded` has the spaces clip, itc or both, `owners` (M,) the image of each text. No more than `block` scores of a scorer, or
    one query's, are in memory at once. A scorer's time is that of its scores and of choosing the best; a space counts for each
    scorer that has a weight for it."""
    images, texts = next((len(one.images), len(one.texts)) for one in embedded.values())
    queries, wide = (texts, images) if way == TEXT_TO_IMAGE else (images, texts)
    # Made before the loop: small tensors that are made between large ones keep the memory that these leave from being used again.
    found = {name: Ranked.empty(queries, min(k, wide)) for name in scorers}
    places, candidate = torch.arange(queries), torch.arange(wide)
    seconds = dict.fromkeys(scorers, 0.0)
    step = max(1, block // max(1, wide))
    for start in range(0, queries, step):
        some = slice(start, start + step)
        first, taken = {}, {}
        for space, one in embedded.items():
            began = time.perf_counter()
            first[space] = one.scores(way, some, block)
            taken[space] = time.perf_counter() - began
        relevant = belong(places[some, None], candidate[None], way, owners)
        for name, scorer in scorers.items():
            weights = getattr(scorer, way)
            began = time.perf_counter()
            scores = mixed(first, weights)
            chosen = candidates(scores, k)
            chosen, best = best_first(chosen, scores.gather(1, chosen))
            seconds[name] += time.perf_counter() - began
            seconds[name] += sum(taken[space] for space in taken if getattr(weights, space))
            whole = found[name]
            whole.ranks[some], whole.chosen[some], whole.scores[some] = ranks(scores, relevant), chosen, best
    return {name: replace(found[name], seconds=seconds[name]) for name in scorers}


def rerank(first: Ranked, way: str, owners: Tensor, matching: Tensor, seconds: float) -> Ranked:
    """The rankings once the best candidates are re-ranked: by the sum of the first score and `matching` (n, K).

    All others come after them, in their old order. `seconds` is the time of matching all queries."""
    k = matching.shape[1]
    chosen, scores = best_first(first.chosen[:, :k], first.scores[:, :k] + matching)
    relevant = belong(torch.arange(len(chosen))[:, None], chosen, way, owners)
    return Ranked(
        torch.where(relevant.any(1), relevant.int().argmax(1), first.ranks),
        torch.cat([chosen, first.chosen[:, k:]], 1),
        torch.cat([scores, first.scores[:, k:]], 1),
        first.seconds + seconds,
    )


def belong(queries: Tensor, chosen: Tensor, way: str, owners: Tensor) -> Tensor:
    """Whether queries (n, 1) and candidates, (n, K) or (1, K), belong together -> (n, K) bool. `owners` (M,): the image of each
    text."""
    return owners[queries] == chosen if way == TEXT_TO_IMAGE else queries == owners[chosen]


def best_first(chosen: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates (n, K) and their scores (n, K), both from the best to the worst."""
    chosen, order = chosen.sort(1)
    scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return chosen.gather(1, best), scores
