"""Retrieval on a split, as the field measures it: R@K both ways, of the encoder itself, of ITC, and re-ranked by ITM."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pipeline.encoders.text import TextModel, has_text_model
from ..pipeline.errors import EncoderError, QfError
from ..pipeline.features.reader import Features
from ..trainer.metrics.retrieval import RetrievalSet, image_to_text, retrieval, text_to_image
from ..trainer.stage1.embedder import rerank, similarity_matrix
from .encode.qformer import Run, check_features


def evaluate_retrieval(
    features: Features,
    split: str,
    run: Run | None,
    device: torch.device,
    rerank_at: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`{split, images, texts, clip, itc, "itc+itm@K"}`; `clip` where the encoder has a text tower, the others with a run.

    The clip row is zero-shot: the encoder never saw these pairs as training data of qf. Where the encoder is gone, a run
    does without it, which `say` is told. K is `rerank_at`, 0 for none."""
    data = RetrievalSet.of(features, split)
    if not len(data.rows):
        splits = ", ".join(f"{count:,} {name}" for name, count in features.manifest["splits"].items() if count)
        raise QfError(f"{features.folder} has no images in the split {split} (it has {splits}); choose another --split")
    result: dict[str, Any] = {"split": split, "images": len(data.rows), "texts": len(data.texts)}
    try:
        if (scores := zero_shot_scores(features, data, device)) is not None:
            result["clip"] = retrieval(scores, data.image_rows)
    except EncoderError as error:
        if run is None:
            raise
        say(f"no zero-shot row: {error}")
    if run is not None:
        check_features(run, features)
        scores = similarity_matrix(run.embedder.images(features, data.rows), run.embedder.texts(data.texts))
        result["itc"] = retrieval(scores, data.image_rows)
        if rerank_at:
            started = time.perf_counter()
            result[f"itc+itm@{rerank_at}"] = reranked(run, features, data, scores, rerank_at)
            result["rerank_seconds"] = round(time.perf_counter() - started, 2)
    if run is None and "clip" not in result:
        raise QfError(
            f"encoder {features.encoder['id']} has no text tower and there is no run yet; train one first: qf train"
        )
    return result


def zero_shot_scores(features: Features, data: RetrievalSet, device: torch.device) -> Tensor | None:
    """The encoder's own scores (N, M), or None if it has no joint space with a text tower."""
    if features.pooled is None or not has_text_model(features.encoder):
        return None
    texts = TextModel(features.encoder, device).encode(data.texts)
    return torch.from_numpy(features.pooled[data.rows] @ texts.T)


def reranked(run: Run, features: Features, data: RetrievalSet, scores: Tensor, k: int) -> dict[str, float]:
    """R@K after matching the k best images of each text and the k best texts of each image. `scores` (N, M)."""
    images_of = scores.T.topk(min(k, scores.shape[0])).indices  # (M, k) images
    texts_of = scores.topk(min(k, scores.shape[1])).indices  # (N, k) texts
    asked = torch.zeros(scores.shape, dtype=torch.bool)
    asked.T.scatter_(1, images_of, True)
    asked.scatter_(1, texts_of, True)
    pairs = asked.nonzero()  # each pair is matched once, whichever way it was asked
    matching = torch.zeros(scores.shape)
    matching[asked] = run.embedder.matching(features, data.rows, data.texts, pairs.numpy())
    to_image = rerank(scores.T, images_of, matching.T.gather(1, images_of)).T
    to_text = rerank(scores, texts_of, matching.gather(1, texts_of))
    return {**text_to_image(to_image, data.image_rows), **image_to_text(to_text, data.image_rows)}
