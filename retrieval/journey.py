"""The library calls behind the commands that need a workspace or a run: train and index, index, evaluate, explain, export."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..pipeline.artifacts import read_manifest
from ..pipeline.config import ComputeOptions, DeviceOptions
from ..pipeline.device import resolve_device
from ..pipeline.encoders.picture import encode_picture
from ..pipeline.errors import ArtifactError, QfError
from ..pipeline.features.reader import Features
from ..pipeline.results import OnStatus, Result, no_status
from ..pipeline.workspace import Workspace
from ..trainer.config import ExportOptions, Stage1Config, Stage2Config, TrainOptions
from ..trainer.distributed.processes import Processes
from ..trainer.manifest import RUN
from ..trainer.runs.folder import Trained
from ..trainer.runs.log import Report, no_report
from ..trainer.stage1.stage import train
from ..trainer.weights.export import Exported, export
from .config import EvalOptions, ExplainOptions, IndexOptions
from .encode.available import query_encoders
from .encode.qformer import Run, check_features
from .encode.query_encoder import QueryEncoder
from .evaluate import Evaluated, evaluate_retrieval
from .explain import Explained, cached_picture, explain
from .heatmaps import draw_explanation
from .index.build import Indexed, build_index
from .mix_file import Mix, below_encoder, harmed_by_matching
from .validation import ensured_mix, fit_mix, stored_mix

Say = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """The functions that are called while the journey goes on."""

    say: Callable[[str], None] = lambda text: None
    extracting: OnStatus = no_status
    training: Report = no_report


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
    workspace: Workspace,
    options: TrainOptions,
    config: Stage1Config,
    on: DeviceOptions,
    say: Say,
    report: Report,
    progress: OnStatus = no_status,
) -> TrainedAndIndexed:
    """Train a run in the workspace, then fit its mix and index it. All processes that train together call it; rank 0 goes on
    alone after training."""
    processes, device = Processes.join(resolve_device(on.device))
    folder, features = workspace.run("stage1" if options.name is None else options.name), Features(workspace.features)
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
        progress=progress,
    )
    processes.leave()
    if not processes.first:
        return TrainedAndIndexed(trained, None)
    run = Run(folder, device, config.precision)
    encoders = query_encoders(features, run, device, say)
    mix = ensured_mix(features, run, encoders, say)
    if mix and (line := below_encoder(mix.rows)):
        say(f"on validation images {line}")
    if not options.index:
        return TrainedAndIndexed(trained, None)
    say("indexing")
    indexed = build_index(encoders, run, features, workspace.index)
    return TrainedAndIndexed(replace(trained, index=indexed.index), indexed)


def train_run(
    workspace: Workspace,
    options: TrainOptions,
    config: Stage1Config | Stage2Config,
    on: DeviceOptions,
    say: Say,
    report: Report,
    progress: OnStatus = no_status,
) -> Result:
    """Train a run of the stage that `config` is of; see `train_and_index` and `train_stage2`."""
    if isinstance(config, Stage2Config):
        return train_stage2(workspace, options, config, on, say, report)
    return train_and_index(workspace, options, config, on, say, report, progress)


def train_stage2(
    workspace: Workspace, options: TrainOptions, config: Stage2Config, on: DeviceOptions, say: Say, report: Report
) -> Trained:
    """Train a run of stage 2 in the workspace, from the latest run of stage 1 unless `config.init` names other weights."""
    from ..trainer.stage2.stage import train as train_language

    processes, device = Processes.join(resolve_device(on.device))
    features = Features(workspace.features)
    latest = workspace.latest_run(1)
    init = str(latest.resolve()) if config.init is None and latest else workspace.weights(config.init)
    trained = train_language(
        features,
        workspace.run("stage2" if options.name is None else options.name),
        replace(config, init=init),
        device,
        options.overwrite,
        report,
        processes,
        cache_on_device=options.cache_on_device,
        say=say,
        tensorboard=options.tensorboard,
    )
    processes.leave()
    return trained


def index_run(
    workspace: Workspace,
    run: str | None,
    on: ComputeOptions,
    say: Say,
    options: IndexOptions = IndexOptions(),  # noqa: B008 - frozen
) -> Indexed:
    """Build the index of the workspace from the run of that name, or from the latest; from the encoder alone if there is no run
    yet."""
    device, features = resolve_device(on.device), Features(workspace.features)
    opened = _opened(workspace, run, on)
    say("indexing" if opened else "indexing the encoder's own embeddings (no run yet)")
    return build_index(query_encoders(features, opened, device, say), opened, features, workspace.index, options)


def _opened(workspace: Workspace, run: str | None, on: ComputeOptions) -> Run | None:
    """The run of that name, or the latest; None if there is none yet."""
    folder = workspace.run(run) if run else workspace.latest_run()
    return Run(folder, resolve_device(on.device), on.precision) if folder else None


def evaluate(workspace: Workspace, options: EvalOptions, run: str | None, on: ComputeOptions, say: Say) -> Evaluated:
    """R@K of the encoder, of the run of that name, or of the latest, and of their mix; of the encoder alone if there is no run.

    `say` gets the lines about what does not help. QfError if a mix is to be fitted and there is no run, or no validation."""
    device, features = resolve_device(on.device), Features(workspace.features)
    split = options.split or ("test" if len(features.rows("test", captioned=True)) else "val")
    opened = _opened(workspace, run, on)
    encoders = query_encoders(features, opened, device, say)
    mix = _mix_of(features, opened, encoders, options.fit_mix, say)
    say(f"evaluating {opened.folder if opened else 'the encoder alone (no run yet)'} on the {split} split")
    result = evaluate_retrieval(features, split, encoders, options.rerank_at, mix, options.plot, options.failures)
    if opened is not None:
        rows, where = (mix.rows, "validation") if mix else (result.rows, split)
        for line in filter(None, (below_encoder(rows), harmed_by_matching(rows))):
            say(f"on {where} images {line}")
    return result


def evaluate_task(
    workspace: Workspace, options: EvalOptions, run: str | None, on: ComputeOptions, say: Say, progress: OnStatus
) -> Result:
    """Measure a run on the task of the options; see `evaluate` and `evaluate_texts`."""
    if options.task == "retrieval":
        return evaluate(workspace, options, run, on, say)
    from .text_scores import evaluate_texts

    return evaluate_texts(workspace, options, run, on, progress, say)


def _mix_of(features: Features, run: Run | None, encoders: Sequence[QueryEncoder], anew: bool, say: Say) -> Mix | None:
    """The mix to evaluate: the one that the run has, or one that is fitted `anew`. QfError if that is not possible."""
    if run is None:
        if anew:
            raise QfError("--fit-mix fits the weights of a run, and there is none yet; train one first: qf train")
        return None
    if not run.matches:
        say(f"no re-ranked row: run {run.folder} never trained its matching head")
    if anew:
        return fit_mix(features, run, encoders, say)
    try:
        return stored_mix(features, run, encoders)
    except ArtifactError as error:
        say(f"no mix: {error}")
        return None


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
    opened = Run(workspace.run(run), device, on.precision)
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


def export_run(folder: Path, out: Path, options: ExportOptions) -> Exported:
    """Write the weights of a run of either stage to `out`. Errors as of `weights.export.export` and `stage2.export.export`."""
    if read_manifest(folder, RUN)["stage"] == 2:
        from ..trainer.stage2.export import export as export_stage2

        return export_stage2(folder, out, options.to, options.with_llm, options.overwrite)
    if options.with_llm:
        raise ArtifactError(f"{folder} is a run of stage 1 and has no language model; leave --with-llm out")
    return export(folder, out, options.to, options.overwrite)
