"""The folder of a run, for any stage. It holds config.json from the start, and manifest.json once it is finished."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipeline.artifacts import (
    CONFIG,
    described,
    difference,
    has_manifest,
    read_manifest,
    read_sealed,
    remember,
    write_manifest,
    write_sealed,
)
from ...pipeline.device import DTYPES
from ...pipeline.errors import ArtifactError
from ...pipeline.features.reader import Features
from ...pipeline.files import atomic_file
from ...pipeline.formatting import counted, duration
from ...pipeline.replacement import clear, replacement_of
from ...pipeline.results import Result
from ...pipeline.tensor_files import save_tensors
from ..config import LoopConfig
from ..manifest import CHECKPOINTS, CURVES, METRICS, RUN, TOKENIZER, WEIGHTS, RunSettings
from .checkpoints import TrainState, load_best, steps
from .curves import draw_curves
from .log import read_log
from .panel import recalls_of, validation_of

AGAIN = "train again with --overwrite"


@dataclass(frozen=True)
class Trained(Result):
    """A finished run: figures of its training, and the validation metrics of the weights that it kept."""

    steps: int
    planned_steps: int
    stopped: str | None  # why it has fewer steps than planned
    epochs: float
    pairs_per_second: float
    seconds: float
    wait_share: float  # share of the seconds spent waiting for data
    loss: float | None  # of the last line of the log; None without a step
    best: dict[str, Any]  # {"step", metrics …}; empty without validation
    run: str
    index: str | None = None  # the index built from it

    def to_json(self) -> dict[str, Any]:
        """The fields; `index` only if there is one."""
        fields = asdict(self)
        return fields if self.index is not None else {name: fields[name] for name in fields if name != "index"}

    def __str__(self) -> str:
        recalls = recalls_of(self.best)
        kept = "of the weights that are kept"
        named = f" R@1 in % {kept}: {recalls}" if recalls else f" {kept}: {validation_of(self.best)}"
        checked = f"; validation{named}" if self.best else ""
        steps = counted(self.steps, "step")
        if self.stopped:
            steps += f" of {self.planned_steps:,} ({self.stopped})"
        trained = f"{steps}, loss {self.loss:.3f}{checked}" if self.steps else "no steps, the weights as they came"
        return f"run       {self.run}: {trained}  ({duration(self.seconds)})"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the run in `folder` began with. ArtifactError if they are damaged, OSError if they are missing."""
    return read_sealed(folder / CONFIG, RunSettings, AGAIN)


def _has_progress(folder: Path) -> bool:
    """Whether the run is finished or has a checkpoint to resume from."""
    return has_manifest(folder) or bool(steps(folder / CHECKPOINTS))


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a file gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def resumes(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` holds an unfinished run with these settings."""
    if has_manifest(folder) or not (folder / CONFIG).is_file():
        return False
    try:
        return not difference(read_settings(folder), _as_json(settings))
    except ArtifactError:
        return False


def recorded_precision(folder: Path, overwrite: bool) -> torch.dtype | None:
    """The precision in which the run in `folder` computes, finished or not; None if there is nothing to resume.

    With `overwrite` a finished run is replaced whole: the precision is that of an unfinished replacement."""
    if overwrite and has_manifest(folder):
        folder = replacement_of(folder)
    if not _has_progress(folder):
        return None
    try:
        return DTYPES.get(str(read_settings(folder)["precision"]).removeprefix("torch."))
    except ArtifactError:
        if overwrite:
            return None
        raise


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the run is finished. ArtifactError if the folder holds a run with other settings that would be lost."""
    if _has_progress(folder):
        changed = difference(read_settings(folder), _as_json(settings))
        if changed:
            if changed.startswith("features "):
                changed = "the features have changed"
            onward = f" (add --init {folder.name} to go on from its weights)" if has_manifest(folder) else ""
            raise ArtifactError(
                f"run {folder} was made with other settings: {changed}; choose another --name{onward}, or replace it with --overwrite"
            )
    return has_manifest(folder)


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a run, unless the folder holds one with these settings, to resume. Anything else there is cleared."""
    if resumes(folder, settings) and steps(folder / CHECKPOINTS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, RUN)
    write_sealed(folder / CONFIG, settings)


def finish(
    folder: Path,
    stage: int,
    model: nn.Module,
    sizes: dict[str, Any],
    config: LoopConfig,
    features: Features,
    state: TrainState,
    total: int,
    steps_per_epoch: float,
    stopped: str | None,
    more: dict[str, Any] | None = None,
) -> None:
    """Save the best weights as those of the run, draw the curves, and write the manifest.

    `sizes` is the configuration of the model; `stopped` tells why there are fewer steps than `total`; `more` has further fields of
    the manifest. Without a validation the weights are saved as they are."""
    best = load_best(folder / CHECKPOINTS, model)
    save_tensors(folder / WEIGHTS, model.state_dict(), best)
    lines = list(read_log(folder / METRICS))
    with atomic_file(folder / CURVES) as file:
        draw_curves(lines, file)
    names = (WEIGHTS, TOKENIZER, CONFIG, METRICS, CURVES)  # a tokenizer only where the model reads text
    files = [described(folder / name) for name in names if (folder / name).is_file()]
    seconds = max(state.seconds, 1e-9)
    write_manifest(
        folder,
        RUN,
        {
            "stage": stage,
            "model": sizes,
            "train": asdict(config),
            "encoder": features.encoder,
            "features": {"path": str(features.folder.resolve()), "identity": features.identity},
            "sha256": files[0]["sha256"],
            "files": files,
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "steps": state.step,
            "planned_steps": total,
            "stopped": stopped,
            "epochs": round(state.step / steps_per_epoch, 3),
            "pairs_per_second": round(state.pairs / seconds, 1),
            "seconds": round(state.seconds, 2),
            "wait_share": round(state.waited / seconds, 4),
            "loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
            "best": best,
            **(more or {}),
        },
    )
    remember(folder, files)


def result(folder: Path) -> Trained:
    """The result of a finished run. ArtifactError if it is unfinished."""
    manifest = read_manifest(folder, RUN)
    names = ("steps", "planned_steps", "stopped", "epochs", "pairs_per_second", "seconds", "wait_share", "loss", "best")
    return Trained(**{name: manifest[name] for name in names}, run=str(folder))
