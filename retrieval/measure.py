"""The scores of every scorer on the images and captions of a split, and their R@K.

Letters: N images, M texts; all matrices are (N, M), on the CPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..pipeline.features.reader import Features
from ..trainer.metrics.retrieval import RetrievalSet, image_to_text, text_to_image
from ..trainer.stage1.embedder import rerank
from .encode.query_encoder import QueryEncoder
from .mix import candidates, mixed
from .mix_file import IMAGE_TO_TEXT, TEXT_TO_IMAGE, WAYS, Row, Scorer


def queries_first(matrix: Tensor, way: str) -> Tensor:
    """(N, M) -> a row for each query of that direction, (M, N) for text to image; and back."""
    return matrix.T if way == TEXT_TO_IMAGE else matrix


class SplitScores:
    """The scores of a split: `first` has those of clip and itc, `matching` the logits of the pairs that were matched."""

    def __init__(self, features: Features, data: RetrievalSet, encoders: Sequence[QueryEncoder]) -> None:
        self.features, self.data = features, data
        self.first = {e.name: torch.from_numpy(e.scores(features, data.rows, data.texts)) for e in encoders}
        self.matcher = next((encoder for encoder in encoders if encoder.matches), None)
        self.matching = torch.zeros(len(data.rows), len(data.texts))

    def ranked(self, scorer: Scorer, way: str) -> Tensor:
        """The scores without matching, a row for each query."""
        return queries_first(mixed(self.first, getattr(scorer, way)), way)

    def match(self, scorers: Iterable[Scorer], k: int) -> None:
        """Match the `k` best candidates of each query and scorer, in both directions. Each pair is matched once."""
        asked = torch.zeros(self.matching.shape, dtype=torch.bool)
        for scorer in scorers:
            for way in WAYS:
                queries_first(asked, way).scatter_(1, candidates(self.ranked(scorer, way), k), True)
        pairs = asked.nonzero().numpy()  # (n, 2)
        assert self.matcher is not None
        self.matching[asked] = torch.from_numpy(
            self.matcher.matching(self.features, self.data.rows, self.data.texts, pairs)
        )

    def matched(self, scorer: Scorer, way: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """First scores, the candidates (n, k) and their matching logits (n, k), a row for each query, after `match`."""
        first = self.ranked(scorer, way)
        chosen = candidates(first, k)
        return first, chosen, queries_first(self.matching, way).gather(1, chosen)

    def rows(self, scorers: Mapping[str, Scorer], k: int) -> dict[str, Row]:
        """R@K of each scorer. With `k`, also re-ranked, after `match`; the encoder alone is not."""
        rows = {}
        for name, scorer in scorers.items():
            rows[name] = self._row(partial(self.ranked, scorer))
            if k and name != "clip":
                rows[f"{name}+itm@{k}"] = self._row(partial(self._reranked, scorer, k))
        return rows

    def _reranked(self, scorer: Scorer, k: int, way: str) -> Tensor:
        first, chosen, matching = self.matched(scorer, way, k)
        return rerank(first, chosen, getattr(scorer, way).itm * matching)

    def _row(self, ranked: Callable[[str], Tensor]) -> Row:
        """R@K of the scores that `ranked` gives for each way, with a row for each query."""
        to_image = text_to_image(queries_first(ranked(TEXT_TO_IMAGE), TEXT_TO_IMAGE), self.data.image_rows)
        return {**to_image, **image_to_text(queries_first(ranked(IMAGE_TO_TEXT), IMAGE_TO_TEXT), self.data.image_rows)}
