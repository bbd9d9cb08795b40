"""Retrieval: the images and captions that it is measured on, and recall from score matrices.

N images and M texts are measured on; N queries and C candidates in general."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...pipeline.features.reader import Features

KS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalSet:
    """The captioned images of a split with all their captions, which R@K is measured on."""

    rows: np.ndarray  # (N,) rows of the features
    texts: list[str]  # M captions
    image_rows: Tensor  # (M,) the place in `rows` of each caption's image

    @classmethod
    def of(cls, features: Features, split: str, limit: int | None = None) -> "RetrievalSet":
        """All captions of the first `limit` captioned images of a split."""
        rows = features.rows(split, captioned=True)[:limit]
        texts = [caption for row in rows for caption in features.captions[row]]
        image_rows = [n for n, row in enumerate(rows) for _ in features.captions[row]]
        return cls(rows, texts, torch.tensor(image_rows, dtype=torch.long))


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """scores, relevant (N, C) -> (N,): the number of candidates before the best relevant one.

    Ties go to the first in the dataset, as in search: a scorer that scores everything alike does as well as chance."""
    best, first = scores.masked_fill(~relevant, -torch.inf).max(1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    return ((scores > best) | (scores == best) & earlier).sum(1)


def recalls(scores: Tensor, relevant: Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5 and R@10 of the queries (rows), in percent, under the names `prefix_R@K`."""
    return recall(ranks(scores, relevant) if len(scores) else torch.empty(0), prefix)


def recall(found: Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5 and R@10 of queries with the ranks `found` (n,), in percent, under the names `prefix_R@K`; 0 without queries."""
    if len(found) == 0:
        return {f"{prefix}_R@{k}": 0.0 for k in KS}
    return {f"{prefix}_R@{k}": round((found < k).double().mean().item() * 100, 2) for k in KS}


def text_to_image(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """scores (N, M), image_rows (M,) the image of each text -> R@K of texts that look for their image."""
    relevant = image_rows[:, None] == torch.arange(len(scores), device=scores.device)[None]  # (M, N)
    return recalls(scores.T, relevant, "text_to_image")


def image_to_text(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """scores (N, M), image_rows (M,) -> R@K of images that look for any of their texts; images without a text do not count."""
    relevant = image_rows[None] == torch.arange(len(scores), device=scores.device)[:, None]  # (N, M)
    asked = relevant.any(1)
    return recalls(scores[asked], relevant[asked], "image_to_text")


def retrieval(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """scores (N, M), image_rows (M,) -> R@K in both directions."""
    return {**text_to_image(scores, image_rows), **image_to_text(scores, image_rows)}


def mean_recall_at_1(metrics: dict[str, float]) -> float:
    """The mean of every R@1 of a validation: both directions and, where ITM is trained, re-ranked."""
    found = [value for name, value in metrics.items() if name.endswith("_R@1")]
    return sum(found) / len(found)
