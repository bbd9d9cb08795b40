"""Retrieval on a split, as the field measures it: R@K both ways, of the encoder itself, of ITC, and re-ranked by ITM."""

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipeline.encoders.text import has_text_model
from ..pipeline.errors import EncoderError, QfError
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..trainer.metrics.retrieval import RetrievalSet, image_to_text, retrieval, text_to_image
from ..trainer.stage1.embedder import rerank
from .encode.joint_space import JointSpace
from .encode.qformer import Run, check_features
from .encode.query_encoder import QueryEncoder

WIDTH = 110  # characters of the table where it is not printed on a terminal


@dataclass(frozen=True)
class Evaluated(Result):
    """R@K of each scorer on a split."""

    split: str
    images: int
    texts: int
    rows: dict[str, dict[str, float]]  # scorer -> R@K: clip, itc, itc+itm@K
    rerank_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields, with a field for each scorer in place of `rows`."""
        seconds = {} if self.rerank_seconds is None else {"rerank_seconds": self.rerank_seconds}
        return {"split": self.split, "images": self.images, "texts": self.texts, **self.rows, **seconds}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        title = f"{self.split}: {self.images:,} images, {self.texts:,} texts; recall in %"
        table = Table(title=title, title_justify="left")
        table.add_column("scorer")
        for way in ("text to image", "image to text"):
            for at in (1, 5, 10):
                table.add_column(f"{way}\nR@{at}" if at == 1 else f"\nR@{at}", justify="right")
        for name, row in self.rows.items():
            label = "encoder, zero-shot" if name == "clip" else name.upper()
            table.add_row(label, *(f"{value:.1f}" for value in row.values()))
        text = io.StringIO()
        Console(file=text, width=None if sys.stdout.isatty() else WIDTH).print(table)
        return text.getvalue().rstrip("\n")


def scorers(
    features: Features, run: Run | None, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> list[QueryEncoder]:
    """The encoders to measure: the features' own where it has a text model, then the run.

    The first one uses no training data of qf. If it is not available any more, `say` gets a line, as long as there is a run. It
    also gets one if the run cannot match. EncoderError if it is not available and there is no run; ArtifactError if
    the run was trained on other features; QfError if nothing is left to measure."""
    found: list[QueryEncoder] = []
    try:
        if features.encoder["joint"] is not None and has_text_model(features.encoder):
            joint_space = JointSpace(features.encoder, device)
            _ = joint_space.text_model  # loaded here, where a missing encoder can be passed over
            found.append(joint_space)
    except EncoderError as error:
        if run is None:
            raise
        say(f"no zero-shot row: {error}")
    if run is not None:
        check_features(run, features)
        if not run.matches:
            say(f"no re-ranked row: run {run.folder} never trained its matching head")
        found.append(run)
    if not found:
        raise QfError(
            f"encoder {features.encoder['id']} has no text model and there is no run yet; train one first: qf train"
        )
    return found


def evaluate_retrieval(features: Features, split: str, encoders: Sequence[QueryEncoder], rerank_at: int) -> Evaluated:
    """R@K on a split: a row for each encoder, and one more for an encoder that matches.

    That one re-ranks `rerank_at` candidates of each query; 0: none. QfError if the split holds no captions."""
    data = RetrievalSet.of(features, split)
    if not features.manifest["captions"]:
        raise QfError(f"{features.folder} holds no captions to measure with; extract a dataset that has some")
    if not len(data.rows):
        splits = ", ".join(f"{count:,} {name}" for name, count in features.manifest["splits"].items() if count)
        raise QfError(
            f"{features.folder} has no captioned images in the split {split} (it has {splits}); choose another --split"
        )
    rows: dict[str, dict[str, float]] = {}
    seconds = None
    for encoder in encoders:
        scores = torch.from_numpy(encoder.scores(features, data.rows, data.texts))  # (N, M)
        rows[encoder.name] = retrieval(scores, data.image_rows)
        if rerank_at and encoder.matches:
            started = time.perf_counter()
            rows[f"{encoder.name}+itm@{rerank_at}"] = reranked(encoder, features, data, scores, rerank_at)
            seconds = round(time.perf_counter() - started, 2)
    return Evaluated(split, len(data.rows), len(data.texts), rows, seconds)


def reranked(encoder: QueryEncoder, features: Features, data: RetrievalSet, scores: Tensor, k: int) -> dict[str, float]:
    """R@K after matching the k best images of each text and the k best texts of each image. `scores` (N, M)."""
    images_of = scores.T.topk(min(k, scores.shape[0])).indices  # (M, k) images
    texts_of = scores.topk(min(k, scores.shape[1])).indices  # (N, k) texts
    asked = torch.zeros(scores.shape, dtype=torch.bool)
    asked.T.scatter_(1, images_of, True)
    asked.scatter_(1, texts_of, True)
    pairs = asked.nonzero()  # (n, 2), each pair once, even if it was asked in both directions
    matching = torch.zeros(scores.shape)
    matching[asked] = torch.from_numpy(encoder.matching(features, data.rows, data.texts, pairs.numpy()))
    to_image = rerank(scores.T, images_of, matching.T.gather(1, images_of)).T
    to_text = rerank(scores, texts_of, matching.gather(1, texts_of))
    return {**text_to_image(to_image, data.image_rows), **image_to_text(to_text, data.image_rows)}
