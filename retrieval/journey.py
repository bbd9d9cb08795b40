"""The library calls behind the commands that need a workspace: train and index, index, evaluate, explain."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..pipeline.config import ComputeOptions, DeviceOptions
from ..pipeline.device import resolve_device
from ..pipeline.encoders.picture import encode_picture
from ..pipeline.features.reader import Features
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from ..trainer.config import Stage1Config, TrainOptions
from ..trainer.distributed.processes import Processes
from ..trainer.runs.folder import Trained
from ..trainer.runs.log import Report
from ..trainer.stage1.stage import train
from .config import EvalOptions, ExplainOptions
from .encode.qformer import check_features, open_run
from .evaluate import Evaluated, evaluate_retrieval, scorers
from .explain import Explained, cached_picture, explain
from .heatmaps import draw_explanation
from .index.build import Indexed, build_index

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedAndIndexed(Result):
    """A finished run and, unless it was not wanted, its index."""

    trained: Trained
    indexed: Indexed | None

    def to_json(self) -> dict[str, Any]:
        """The fields of the run; `index` is the folder of the index, if there is one."""
        return self.trained.to_json()

    def __str__(self) -> str:
        return "\n".join(map(str, filter(None, (self.trained, self.indexed))))


def train_and_index(
    workspace: Workspace, options: TrainOptions, config: Stage1Config, on: DeviceOptions, say: Say, report: Report
) -> TrainedAndIndexed:
    """Train a run in the workspace, then index it. All processes that train together call it; rank 0 indexes."""
    processes, device = Processes.join(resolve_device(on.device))
    folder, features = workspace.run(options.name), Features(workspace.features)
    config = replace(config, init=workspace.weights(config.init))
    trained = train(
        features,
        folder,
        config,
        device,
        options.overwrite,
        report,
        processes,
        cache_on_device=options.cache_on_device,
        say=say,
        tensorboard=options.tensorboard,
    )
    processes.leave()
    if not options.index or not processes.first:
        return TrainedAndIndexed(trained, None)
    indexed = index_run(workspace, options.name, ComputeOptions(str(device), config.precision), say)
    return TrainedAndIndexed(replace(trained, index=indexed.index), indexed)


def index_run(workspace: Workspace, run: str | None, on: ComputeOptions, say: Say) -> Indexed:
    """Build the index of the workspace from the run of that name, or from the latest."""
    say("indexing")
    features = Features(workspace.features)
    opened = open_run(workspace.run(run), resolve_device(on.device), on.precision)
    check_features(opened, features)
    return build_index(opened, features, workspace.index)


def evaluate(workspace: Workspace, options: EvalOptions, run: str | None, on: ComputeOptions, say: Say) -> Evaluated:
    """R@K of the encoder and of the run of that name, or of the latest; of the encoder alone if there is no run yet."""
    device, features = resolve_device(on.device), Features(workspace.features)
    split = options.split or ("test" if len(features.rows("test", captioned=True)) else "val")
    chosen = workspace.run(run) if run else workspace.latest_run()
    say(f"evaluating {chosen or 'the encoder alone (no run yet)'} on the {split} split")
    opened = open_run(chosen, device, on.precision) if chosen else None
    return evaluate_retrieval(features, split, scorers(features, opened, device, say), options.rerank)


def explain_picture(
    workspace: Workspace,
    image: str,
    caption: str,
    options: ExplainOptions,
    run: str | None,
    on: ComputeOptions,
    say: Say,
) -> Explained:
    """Draw how a run sees a picture and a text. `image` is a file, or a key of the workspace's features."""
    device = resolve_device(on.device)
    opened = open_run(workspace.run(run), device, on.precision)
    opened.check_matches()
    if Path(image).is_file():
        say(f"encoding {image}")
        picture = encode_picture(Path(image), opened.manifest["encoder"], device)
    else:
        features = Features(workspace.features)
        check_features(opened, features)
        picture = cached_picture(features, image)
    opened.warn_of_truncation(caption)
    explanation = explain(opened, picture, caption)
    out = options.out or workspace.folder / "explain.png"
    draw_explanation(explanation, out)
    return explanation.result(str(opened.folder), str(out))
