"""The whole journey on the built-in sample: extract, train, index, evaluate, search."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.scenes import write_sample
from ..pipeline.config import ComputeOptions, EncoderOptions, ReadOptions
from ..pipeline.device import resolve_device
from ..pipeline.extract.extract import Extracted, OnStatus, extract_source
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from ..trainer.config import Stage1Config
from ..trainer.runs.folder import Trained
from ..trainer.runs.log import Report, no_report
from ..trainer.stage1.stage import train
from .config import DemoOptions, EvalOptions
from .evaluate import Evaluated
from .index.build import Indexed
from .journey import evaluate, index_run
from .searcher import open_searcher
from .sheet import contact_sheet

RUN = "demo"
RERANK = 16  # candidates of each query
SEARCHES, HITS = 6, 6  # rows of the contact sheet, and tiles in a row


@dataclass(frozen=True)
class Watch:
    """The functions that are called while the journey goes on."""

    say: Callable[[str], None] = lambda text: None
    extracting: OnStatus = lambda status: None
    training: Report = no_report


@dataclass(frozen=True)
class Demonstrated(Result):
    """The results of each part of the journey."""

    extract: Extracted
    train: Trained
    index: Indexed
    eval: Evaluated
    search: list[dict[str, Any]]  # query, the key that was wanted, hits
    sheet: str

    def to_json(self) -> dict[str, Any]:
        """An object with the JSON of each part."""
        parts = {name: getattr(self, name).to_json() for name in ("extract", "train", "index", "eval")}
        return {**parts, "search": self.search, "sheet": self.sheet}

    def __str__(self) -> str:
        found = sum(search["hits"][0]["key"] == search["wanted"] for search in self.search)
        last = f"search    {found} of {len(self.search)} captions found their scene first; see {self.sheet}"
        return "\n".join(map(str, (self.extract, self.train, self.index, self.eval, last)))


def demo(folder: Path, options: DemoOptions, on: ComputeOptions, watch: Watch) -> Demonstrated:
    """Draw a sample of `options.scenes` training scenes and take it through the whole journey, in the workspace `folder`.

    Run again, it resumes where it stopped."""
    workspace, device = Workspace(folder), resolve_device(on.device)
    sample = folder / f"sample-{options.scenes}"
    if not (sample / "captions.csv").is_file():
        watch.say("drawing the sample")
        count = options.scenes
        write_sample(sample, train=count, val=min(250, count // 16), test=min(500, count // 8))
    watch.say("extracting features with the builtin CLIP")
    source, builtin = str(sample / "captions.csv"), EncoderOptions(encoder="builtin")
    extracted = extract_source(source, workspace.features, builtin, ReadOptions(), on=on, progress=watch.extracting)
    assert isinstance(extracted, Extracted)
    features = Features(workspace.features)
    watch.say("training a Q-Former on the cached features")
    config = Stage1Config(
        epochs=options.epochs, seed=options.seed, precision=on.precision, batch_size=64, lr=1e-3, contrast_first=0.4
    )
    trained = train(features, workspace.run(RUN), config, device, report=watch.training)
    indexed = index_run(workspace, RUN, on, watch.say)
    evaluated = evaluate(workspace, EvalOptions(split="test", rerank=RERANK), RUN, on, watch.say)
    watch.say("searching")
    searcher = open_searcher(workspace, on)
    searches, wanted = [], []
    for row in np.random.default_rng(options.seed).choice(features.rows("test"), SEARCHES, replace=False):
        query = features.captions[row][0]
        searches.append((query, searcher.text(query, HITS, RERANK)))
        wanted.append(features.keys[row])
    contact_sheet(searches, folder / "demo.png", wanted)
    found = [
        {"query": query, "wanted": key, "hits": [hit.to_json() for hit in hits]}
        for (query, hits), key in zip(searches, wanted, strict=True)
    ]
    return Demonstrated(extracted, trained, indexed, evaluated, found, str(folder / "demo.png"))
