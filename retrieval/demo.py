"""The whole journey on the built-in sample: extract, train, index, evaluate, search."""

import math
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..data.scenes import answerable, fits, scene_named, write_sample
from ..pipeline.artifacts import CONFIG
from ..pipeline.config import ComputeOptions, EncoderOptions, ReadOptions
from ..pipeline.device import resolve_device
from ..pipeline.errors import QfError
from ..pipeline.extract.extract import Extracted, extract_source
from ..pipeline.features.reader import Features
from ..pipeline.formatting import counted
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from ..trainer.config import Stage1Config
from ..trainer.runs.folder import Trained, read_settings
from ..trainer.stage1.pace import Pace, measure_pace
from ..trainer.stage1.stage import train
from .config import DEMO_EPOCHS, DEMO_MINUTES, RERANK, DemoOptions, EvalOptions
from .demo_texts import Spoken, speak
from .evaluate import Evaluated
from .index.build import Indexed
from .journey import Watch, evaluate, index_run
from .searcher import Hit, Searcher, open_searcher
from .sheet import contact_sheet

RUN = "demo"
SAMPLE_SEED = 0
TRAINING = Stage1Config(  # nothing here generates; the encoder teaches, so a high rate does no harm
    epochs=DEMO_EPOCHS,
    losses="itc,itm",
    batch_size=64,
    lr=2e-3,
    num_query_tokens=8,  # as good as 16 here, and a step costs less
    dropout=0.0,
    contrast_first=0.6,
    easy_negatives=0.3,
    checkpoint_every=100,
)
LEAST_EPOCHS = 0.5  # trained even where the minutes do not suffice for them
SPARE = 0.06  # share of the minutes that is not planned
# what these cost for an image, in units of its part in a training step of all losses; measured in float32
VALIDATED, INDEXED, EVALUATED = 1.0, 0.14, 8.0
SEARCHES, HITS = 6, 6  # rows of the contact sheet, and tiles in a row


@dataclass(frozen=True)
class Search:
    """A query with its hits, and the keys of all indexed pictures that fit it."""

    query: str
    hits: list[Hit]
    keys: set[str]

    @property
    def fitting(self) -> int:
        """The number of hits that fit the query."""
        return sum(hit.key in self.keys for hit in self.hits)

    @property
    def possible(self) -> int:
        """The number of hits that would fit it in the best order."""
        return min(len(self.hits), len(self.keys))

    def to_json(self) -> dict[str, Any]:
        """The query, the two numbers, and the hits, each with whether it fits."""
        hits = [{**hit.to_json(), "fits": hit.key in self.keys} for hit in self.hits]
        return {"query": self.query, "fitting": self.fitting, "possible": self.possible, "hits": hits}


@dataclass(frozen=True)
class Demonstrated(Result):
    """The results of each part of the journey."""

    extract: Extracted
    train: Trained
    index: Indexed
    eval: Evaluated
    search: list[Search]
    sheet: str
    cut: str | None  # what was left out to end in time
    texts: Spoken | None = None  # the second part, of --full

    def to_json(self) -> dict[str, Any]:
        """An object with the JSON of each part; `texts` only with --full."""
        parts = {name: getattr(self, name).to_json() for name in ("extract", "train", "index", "eval")}
        more = {"texts": self.texts.to_json()} if self.texts else {}
        return {**parts, "search": [one.to_json() for one in self.search], "sheet": self.sheet, "cut": self.cut, **more}

    def __str__(self) -> str:
        hits = sum(len(one.hits) for one in self.search)
        fitting, possible = sum(one.fitting for one in self.search), sum(one.possible for one in self.search)
        most = "" if possible == hits else f" ({possible} at best)"
        found = f"search    {fitting} of {hits} hits fit their query{most}; see {self.sheet}"
        cut = [f"cut       {self.cut}"] if self.cut else []
        texts = [self.texts] if self.texts else []
        return "\n".join(map(str, (self.extract, self.train, *cut, self.index, self.eval, found, *texts)))


def demo(folder: Path, options: DemoOptions, on: ComputeOptions, watch: Watch) -> Demonstrated:
    """Draw a sample of `options.scenes` training scenes and take it through the whole journey, in the workspace `folder`; with
    `options.full` also through stage 2.

    Without `options.epochs` the training is sized to this machine. Run again, the demo resumes where it stopped, with the epochs
    that it began with. QfError if the workspace holds a demo with other options."""
    began = time.monotonic()
    workspace, device = Workspace(folder), resolve_device(on.device)
    sample = folder / f"sample-{options.scenes}"
    if not (sample / "captions.csv").is_file():
        watch.say("drawing the sample")
        count = options.scenes
        write_sample(sample, train=count, val=min(250, count // 16), test=min(500, count // 8), seed=SAMPLE_SEED)
    watch.say("extracting features with the builtin CLIP")
    source, builtin = str(sample / "captions.csv"), EncoderOptions(encoder="builtin")
    read = ReadOptions(questions=[sample / "questions.jsonl"])
    extracted = extract_source(source, workspace.features, builtin, read, on=on, progress=watch.extracting)
    assert isinstance(extracted, Extracted)
    features = Features(workspace.features)
    config = replace(TRAINING, seed=options.seed, precision=on.precision)

    @cache
    def pace() -> Pace:
        watch.say("measuring how fast this machine trains")
        return measure_pace(features, config, device)

    epochs = begun_epochs(workspace.run(RUN), options)
    if epochs is None:
        found = pace()
        left = (1 - SPARE) * 60 * DEMO_MINUTES - (time.monotonic() - began)
        epochs = epochs_within(left, found, features.manifest["splits"], config)
        if epochs < DEMO_EPOCHS:
            steps = 60 / found.step(config.contrast_first)
            watch.say(f"this machine does {counted(round(steps), 'training step')} a minute: {cut_to(epochs)}")
    watch.say("training a Q-Former on the cached features")
    trained = train(features, workspace.run(RUN), replace(config, epochs=epochs), device, report=watch.training)
    indexed = index_run(workspace, RUN, on, watch.say)
    evaluated = evaluate(workspace, EvalOptions(split="test", fit_mix=True), RUN, on, watch.say)
    watch.say("searching")
    searches = search_sample(open_searcher(workspace, on))
    sheet = folder / "demo.png"
    contact_sheet([(one.query, one.hits) for one in searches], sheet, [one.keys for one in searches])
    cut = cut_to(epochs) if options.epochs is None and epochs < DEMO_EPOCHS else None
    texts = speak(workspace, RUN, options.seed, on, watch, pace) if options.full else None
    return Demonstrated(extracted, trained, indexed, evaluated, searches, str(sheet), cut, texts)


def begun_epochs(run: Path, options: DemoOptions) -> float | None:
    """The epochs of the options, or else those that the run in the folder `run` began with. None: there are neither.

    QfError if that run has other epochs or another seed than the options; ArtifactError if its settings are damaged."""
    if not (run / CONFIG).is_file():
        return options.epochs
    begun = read_settings(run)["train"]
    if options.epochs not in (None, begun["epochs"]) or options.seed != begun["seed"]:
        raise QfError(
            f"{run} is a demo with --epochs {begun['epochs']:g} --seed {begun['seed']}; give the other one another --workspace"
        )
    return float(begun["epochs"])


def epochs_within(seconds: float, pace: Pace, images: dict[str, int], config: Stage1Config) -> float:
    """The epochs, in tenths, that leave time for the rest of the journey: LEAST_EPOCHS at least, those of `config` at most.

    `images` has the number of images of each split. A validation follows each epoch."""
    image = pace.full / min(config.batch_size, images["train"])
    left = seconds - image * (INDEXED * sum(images.values()) + EVALUATED * images["test"])
    steps = max(1, images["train"] // config.batch_size)
    epoch = steps * pace.step(config.contrast_first) + VALIDATED * image * images["val"]
    return min(config.epochs, max(LEAST_EPOCHS, math.floor(10 * left / epoch) / 10))


def cut_to(epochs: float) -> str:
    """What is left out if the demo trains for so few epochs, and what for."""
    aim = "to end within" if epochs > LEAST_EPOCHS else "the fewest there are, although it may take more than"
    return f"{epochs:g} epochs instead of {DEMO_EPOCHS:g}, {aim} {DEMO_MINUTES} minutes"


def search_sample(searcher: Searcher) -> list[Search]:
    """Search the indexed sample with queries of a person, each of which some of its pictures fit."""
    scenes = {key: scene_named(SAMPLE_SEED, Path(key).stem) for key in searcher.features.keys}
    return [
        Search(
            text,
            searcher.text(text, HITS, RERANK),
            {key for key, scene in scenes.items() if fits(meaning, scene)},
        )
        for text, meaning in answerable(list(scenes.values()), SEARCHES)
    ]
