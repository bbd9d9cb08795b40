"""The rankings of every scorer on the images and captions of a split, and their R@K.

Letters: N images, M texts; n queries of a direction, K candidates of each."""

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..pipeline.features.reader import Features
from ..trainer.metrics.retrieval import RetrievalSet, recall
from .encode.qformer import Run
from .encode.query_encoder import QueryEncoder
from .mix_file import TEXT_TO_IMAGE, WAYS, Row, Scorer
from .ranking import Embedded, Ranked, rank, rerank

KEPT = 10  # candidates of a query that are kept where fewer are re-ranked
Both = dict[str, Ranked]  # by direction


def embed(encoder: QueryEncoder, features: Features, data: RetrievalSet) -> Embedded:
    """The images and texts of a split in the space of an encoder, on the device of a run."""
    texts = torch.from_numpy(encoder.texts(data.texts))
    if not isinstance(encoder, Run):
        assert features.pooled is not None
        return Embedded(torch.from_numpy(features.pooled[data.rows][:, None]), texts)
    images = torch.empty(len(data.rows), encoder.per_image, encoder.width, device=encoder.device)
    start = 0
    for batch in encoder.embedder.image_batches(features, data.rows):
        images[start : start + len(batch)] = batch
        start += len(batch)
    return Embedded(images, texts.to(images.device))


def rows_of(rankings: Mapping[str, Both]) -> dict[str, Row]:
    """R@K of each scorer, both ways."""
    return {
        name: dict(chain.from_iterable(recall(both[way].ranks, way).items() for way in WAYS))
        for name, both in rankings.items()
    }


class SplitScores:
    """The embeddings of a split in each space, and the logits of the pairs that were matched.

    Neither a matrix (N, M) of scores nor one of logits is ever held, unless `first` is asked for one."""

    def __init__(self, features: Features, data: RetrievalSet, encoders: Sequence[QueryEncoder]) -> None:
        self.features, self.data = features, data
        self.embedded = {encoder.name: embed(encoder, features, data) for encoder in encoders}
        self.matcher = next((encoder for encoder in encoders if encoder.matches), None)
        self._pairs = np.empty(0, np.int64)  # n * M + m of each pair that was matched, ascending
        self._logits = torch.empty(0)
        self.seconds = 0.0  # of matching

    def first(self, way: str) -> dict[str, Tensor]:
        """The whole matrix (n, C) of each space, for a split that is small."""
        return {name: one.scores(way) for name, one in self.embedded.items()}

    def rank(self, scorers: Mapping[str, Scorer], k: int) -> dict[str, Both]:
        """The rankings of each scorer without matching, with the best `k` candidates of each query."""
        ways = {way: rank(self.embedded, scorers, way, self.data.image_rows, k) for way in WAYS}
        return {name: {way: ways[way][name] for way in WAYS} for name in scorers}

    def match(self, rankings: Iterable[Both], k: int) -> None:
        """Match the `k` best candidates of each query, in both directions. Each pair is matched once."""
        wanted = [self._codes(both[way], way, k).ravel() for both in rankings for way in WAYS]
        new = np.setdiff1d(np.concatenate(wanted), self._pairs) if wanted else self._pairs[:0]
        if not len(new):
            return
        assert self.matcher is not None
        began = time.perf_counter()
        pairs = np.stack(np.divmod(new, len(self.data.texts)), 1)  # (n, 2)
        logits = self.matcher.matching(self.features, self.data.rows, self.data.texts, pairs)
        self.seconds += time.perf_counter() - began
        codes = np.concatenate([self._pairs, new])
        order = np.argsort(codes)
        self._pairs, self._logits = codes[order], torch.cat([self._logits, torch.from_numpy(logits)])[order]

    def matching(self, ranked: Ranked, way: str, k: int) -> Tensor:
        """The logits (n, K) of the `k` best candidates of each query, after `match`."""
        return self._logits[np.searchsorted(self._pairs, self._codes(ranked, way, k))]

    def _codes(self, ranked: Ranked, way: str, k: int) -> np.ndarray:
        """A number (n, K) for each pair of a query and one of its `k` best candidates."""
        chosen = ranked.chosen[:, :k].numpy()
        queries = np.arange(len(chosen))[:, None]
        images, texts = (chosen, queries) if way == TEXT_TO_IMAGE else (queries, chosen)
        codes: np.ndarray = images * len(self.data.texts) + texts
        return codes

    def rankings(self, scorers: Mapping[str, Scorer], ks: Sequence[int]) -> dict[str, Both]:
        """The rankings of each scorer, and re-ranked at each of `ks` candidates; the encoder alone is not.

        A pair costs the mean time of all pairs that were matched, in batches. Matching without a weight costs none."""
        first = self.rank(scorers, max([KEPT, *ks]))
        reranking = [name for name, scorer in scorers.items() if name != "clip" and scorer.matches]
        self.match([first[name] for name in reranking], max(ks, default=0))
        found = {}
        for name, scorer in scorers.items():
            found[name] = first[name]
            if name != "clip":
                found |= {
                    f"{name}+itm@{k}": {way: self._reranked(first[name][way], way, scorer, k) for way in WAYS}
                    for k in ks
                }
        return found

    def _reranked(self, first: Ranked, way: str, scorer: Scorer, k: int) -> Ranked:
        if not (weight := getattr(scorer, way).itm):
            return first
        matching = self.matching(first, way, k)
        seconds = self.seconds / len(self._pairs) * matching.numel()
        return rerank(first, way, self.data.image_rows, weight * matching, seconds)
