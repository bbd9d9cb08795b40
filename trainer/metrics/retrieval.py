"""Retrieval metrics on score matrices."""

import torch
from torch import Tensor

KS = (1, 5, 10)


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """scores, relevant (N, C) -> (N,): how many candidates stand before the first relevant one.

    Ties go to the candidate that stands first in the dataset, as in search: a scorer that gives everything the same score
    finds what chance finds."""
    best, first = scores.masked_fill(~relevant, -torch.inf).max(1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    return ((scores > best) | (scores == best) & earlier).sum(1)


def recalls(scores: Tensor, relevant: Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5 and R@10 of the queries (rows), in percent, under the names `prefix_R@K`."""
    if len(scores) == 0:
        return {f"{prefix}_R@{k}": 0.0 for k in KS}
    found = ranks(scores, relevant)
    return {f"{prefix}_R@{k}": round((found < k).double().mean().item() * 100, 2) for k in KS}


def text_to_image(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """scores (B, M), image_rows (M,) the image of each text -> R@K of texts finding their image."""
    relevant = image_rows[:, None] == torch.arange(len(scores), device=scores.device)[None]  # (M, B)
    return recalls(scores.T, relevant, "text_to_image")


def image_to_text(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """scores (B, M), image_rows (M,) -> R@K of images finding any of their texts; images without a text do not count."""
    relevant = image_rows[None] == torch.arange(len(scores), device=scores.device)[:, None]  # (B, M)
    asked = relevant.any(1)
    return recalls(scores[asked], relevant[asked], "image_to_text")


def retrieval(scores: Tensor, image_rows: Tensor) -> dict[str, float]:
    """Both directions."""
    return {**text_to_image(scores, image_rows), **image_to_text(scores, image_rows)}


def mean_recall_at_1(metrics: dict[str, float]) -> float:
    """What `best` means: the mean of every R@1 there is: both directions and, where matching is trained, re-ranked."""
    found = [value for name, value in metrics.items() if name.endswith("_R@1")]
    return sum(found) / len(found)
