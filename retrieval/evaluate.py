"""Retrieval on a split, as the field measures it: R@K both ways, of the encoder itself, of the run, and of their mix."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.errors import QfError
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..trainer.metrics.retrieval import RetrievalSet
from .certainty import Certainty, certainties
from .encode.query_encoder import QueryEncoder
from .measure import SplitScores, rows_of
from .mix_file import ENCODER, RUN_ALONE, WAYS, Mix, Row

WIDTH = 110  # characters of the table where it is not printed on a terminal


@dataclass(frozen=True)
class Evaluated(Result):
    """R@K of each scorer on a split."""

    split: str
    images: int
    texts: int
    rows: dict[str, Row]  # clip, itc, itc+itm@K, mix, mix+itm@K
    certainty: dict[str, dict[str, Certainty]]  # of each scorer, by direction
    rerank_seconds: float | None
    drawings: dict[str, str]  # plot, failures: the files that were drawn

    def to_json(self) -> dict[str, Any]:
        """The fields, with a field for each scorer in place of `rows`, and one for each part of `certainty`."""
        parts: dict[str, dict[str, Any]] = {"intervals": {}, "gains": {}, "milliseconds": {}}
        for name, both in self.certainty.items():
            parts["intervals"][name] = {f"{way}_R@1": one.interval for way, one in both.items()}
            parts["milliseconds"][name] = {way: round(one.milliseconds, 4) for way, one in both.items()}
            if all(one.gain is not None for one in both.values()):
                parts["gains"][name] = {
                    f"{way}_R@1": {"gain": one.gain, "interval": one.gain_interval} for way, one in both.items()
                }
        seconds = {} if self.rerank_seconds is None else {"rerank_seconds": self.rerank_seconds}
        measured = {"split": self.split, "images": self.images, "texts": self.texts, **self.rows}
        return {**measured, **parts, **seconds, **self.drawings}

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        title = (
            f"{self.split}: {self.images:,} images, {self.texts:,} texts; recall in %, with 95 % intervals; ms a query"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for heading in ("R@1", "95 %", "R@5", "R@10", "R@1 - encoder's", "ms"):
            table.add_column(heading, justify="right", no_wrap=True)
        for way in WAYS:
            table.add_row(way.replace("_", " "))
            for name, row in self.rows.items():
                at_1, at_5, at_10 = (f"{row[f'{way}_R@{k}']:.1f}" for k in (1, 5, 10))
                one = self.certainty[name][way]
                spread, gain = one.cells()
                time = f"{one.milliseconds:.{2 if one.milliseconds < 10 else 0}f}"
                label = "  encoder" if name == "clip" else f"  {name.upper()}"
                table.add_row(label, at_1, spread, at_5, at_10, gain, time)
            table.add_section()
        text = io.StringIO()
        Console(file=text, width=None if sys.stdout.isatty() else WIDTH).print(table)
        drawn = [f"{name:9} {file}" for name, file in self.drawings.items()]
        return "\n".join([text.getvalue().rstrip(), *drawn])


def evaluate_retrieval(
    features: Features,
    split: str,
    encoders: Sequence[QueryEncoder],
    rerank_at: Sequence[int],
    mix: Mix | None = None,
    plot: Path | None = None,
    failures: Path | None = None,
) -> Evaluated:
    """R@K on a split: a row for each encoder and for the mix, and for the run and the mix also re-ranked.

    Each of `rerank_at` numbers of candidates is re-ranked. `plot` and `failures` are drawn if they are given. QfError if no image of
    the split has a caption."""
    data = RetrievalSet.of(features, split)
    if not features.manifest["captions"]:
        raise QfError(f"{features.folder} holds no captions to measure with; extract a dataset that has some")
    if not data.texts:
        splits = ", ".join(f"{count:,} {name}" for name, count in features.manifest["splits"].items() if count)
        raise QfError(
            f"{features.folder} has no images with captions in the split {split} (images: {splits}); choose another --split"
        )
    scores = SplitScores(features, data, encoders)
    scorers = {name: scorer for name, scorer in (("clip", ENCODER), ("itc", RUN_ALONE)) if name in scores.embedded}
    if mix is not None:
        scorers["mix"] = mix.scorer
    ks = rerank_at if scores.matcher else ()
    rankings = scores.rankings(scorers, ks)
    rows, certainty = rows_of(rankings), certainties(rankings, data.image_rows.numpy())
    drawings = {}
    if plot is not None:
        from .plot import draw_tradeoff

        draw_tradeoff(rows, certainty, plot)
        drawings["plot"] = str(plot)
    if failures is not None:
        from .failures import draw_failures

        draw_failures(scores, scorers, rankings, rows, failures)
        drawings["failures"] = str(failures)
    seconds = round(scores.seconds, 2) if ks else None
    return Evaluated(split, len(data.rows), len(data.texts), rows, certainty, seconds, drawings)
