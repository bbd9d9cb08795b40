"""Retrieval on a split, as the field measures it: R@K both ways, of the encoder itself, of the run, and of their mix."""

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..pipeline.errors import QfError
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..trainer.metrics.retrieval import RetrievalSet
from .encode.query_encoder import QueryEncoder
from .measure import SplitScores
from .mix_file import ENCODER, RUN_ALONE, Mix, Row

WIDTH = 110  # characters of the table where it is not printed on a terminal


@dataclass(frozen=True)
class Evaluated(Result):
    """R@K of each scorer on a split."""

    split: str
    images: int
    texts: int
    rows: dict[str, Row]  # clip, itc, itc+itm@K, mix, mix+itm@K
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


def evaluate_retrieval(
    features: Features, split: str, encoders: Sequence[QueryEncoder], rerank_at: int, mix: Mix | None = None
) -> Evaluated:
    """R@K on a split: a row for each encoder and for the mix, and for the run and the mix also re-ranked.

    `rerank_at` candidates of each query are re-ranked; 0: none. QfError if no image of the split has a caption."""
    data = RetrievalSet.of(features, split)
    if not features.manifest["captions"]:
        raise QfError(f"{features.folder} holds no captions to measure with; extract a dataset that has some")
    if not data.texts:
        splits = ", ".join(f"{count:,} {name}" for name, count in features.manifest["splits"].items() if count)
        raise QfError(
            f"{features.folder} has no images with captions in the split {split} (images: {splits}); choose another --split"
        )
    scores = SplitScores(features, data, encoders)
    scorers = {name: scorer for name, scorer in (("clip", ENCODER), ("itc", RUN_ALONE)) if name in scores.first}
    if mix is not None:
        scorers["mix"] = mix.scorer
    k, seconds = rerank_at if scores.matcher else 0, None
    if k:
        started = time.perf_counter()
        scores.match([scorer for name, scorer in scorers.items() if name != "clip" and scorer.matches], k)
        seconds = round(time.perf_counter() - started, 2)
    return Evaluated(split, len(data.rows), len(data.texts), scores.rows(scorers, k), seconds)
