"""The whole journey on the built-in sample: extract, train, index, evaluate, search."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.scenes import write_sample
from ..pipeline.config import ExtractOptions
from ..pipeline.datasets.read import read
from ..pipeline.device import resolve_precision
from ..pipeline.encoders.load import load_encoder
from ..pipeline.extract.extract import Progress, extract
from ..pipeline.features.reader import Features
from ..trainer.config import Stage1Config
from ..trainer.runs.log import Report
from ..trainer.stage1.stage import train
from .encode.qformer import open_run
from .evaluate import evaluate_retrieval
from .index.build import build_index
from .searcher import Searcher
from .sheet import contact_sheet

RERANK = 16
SEARCHES = 6  # rows of the contact sheet


@dataclass(frozen=True)
class Watch:
    """What the caller is told while the journey runs."""

    say: Callable[[str], None] = lambda text: None
    extracting: Progress = lambda status: None
    training: Report = lambda line, total: None


def demo(
    workspace: Path, scenes: int, config: Stage1Config, device: torch.device, precision: str, watch: Watch
) -> dict[str, Any]:
    """Draw a sample of `scenes` training scenes and take it all the way: {extract, train, index, eval, search, sheet}.

    Run again, it goes on where it stopped."""
    sample = workspace / f"sample-{scenes}"
    if not (sample / "captions.csv").is_file():
        watch.say("drawing the sample")
        write_sample(sample, train=scenes, val=min(250, scenes // 16), test=min(500, scenes // 8))
    encoder = load_encoder("builtin", device, resolve_precision(precision, device))
    watch.say("extracting features with the builtin CLIP")
    extracted = extract(
        read(sample / "captions.csv"),
        str(sample / "captions.csv"),
        encoder,
        workspace / "features",
        ExtractOptions(),
        watch.extracting,
    )
    features = Features(workspace / "features")
    watch.say("training a Q-Former on the cached features")
    trained = train(features, workspace / "runs" / "demo", config, device, report=watch.training)
    run = open_run(workspace / "runs" / "demo", device, precision)
    watch.say("indexing")
    indexed = build_index(run, features, workspace / "index")
    watch.say(f"evaluating on the test split, re-ranking the best {RERANK}")
    evaluated = evaluate_retrieval(features, "test", run, device, RERANK)
    watch.say("searching")
    searcher = Searcher.open(workspace / "index", device, precision)
    searches, right = [], []
    for row in np.random.default_rng(config.seed).choice(features.rows("test"), SEARCHES, replace=False):
        query = features.captions[row][0]
        searches.append((query, searcher.text(query, 6, RERANK)))
        right.append(features.keys[row])
    contact_sheet(searches, workspace / "demo.png", right)
    found = [
        {"query": query, "wanted": key, "hits": [answer.line() for answer in answers]}
        for (query, answers), key in zip(searches, right, strict=True)
    ]
    return {
        "extract": extracted,
        "train": trained.to_json(),
        "index": indexed,
        "eval": evaluated,
        "search": found,
        "sheet": str(workspace / "demo.png"),
    }
