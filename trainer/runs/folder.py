"""The folder of a run, for any stage. It holds config.json from the start, and manifest.json once it is finished."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipeline.artifacts import (
    LOCK,
    MANIFEST,
    atomic_file,
    described,
    difference,
    has_manifest,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from ...pipeline.device import DTYPES
from ...pipeline.errors import ArtifactError
from ...pipeline.features.reader import Features
from ...pipeline.formatting import counted, duration
from ...pipeline.results import Result
from ..config import LoopConfig
from ..manifest import RUN
from .checkpoints import FOLDER, TrainState, load_best, save_tensors, steps
from .curves import draw_curves
from .log import METRICS, TENSORBOARD, read_log
from .panel import recalls_of

CONFIG, TOKENIZER, WEIGHTS, CURVES = "config.json", "tokenizer.json", "model.safetensors", "loss.png"


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
        checked = f"; validation R@1 in % of the weights that are kept: {recalls_of(self.best)}" if self.best else ""
        steps = counted(self.steps, "step")
        if self.stopped:
            steps += f" of {self.planned_steps:,} ({self.stopped})"
        trained = f"{steps}, loss {self.loss:.3f}{checked}" if self.steps else "no steps, the weights as they came"
        return f"run       {self.run}: {trained}  ({duration(self.seconds)})"


def _has_progress(folder: Path) -> bool:
    """Whether the run is finished or has a checkpoint to resume from."""
    return has_manifest(folder) or bool(steps(folder / FOLDER))


def recorded_precision(folder: Path) -> torch.dtype | None:
    """The precision in which a finished or unfinished run computes; None if there is nothing to resume."""
    if not _has_progress(folder):
        return None
    settings = read_json(folder / CONFIG)
    name = settings.get("precision") if isinstance(settings, dict) else None
    return DTYPES.get(str(name).removeprefix("torch."))


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the run is finished. ArtifactError if the folder holds a run with other settings that would be lost."""
    if _has_progress(folder):
        changed = difference(read_json(folder / CONFIG), json.loads(json.dumps(settings)))  # both as JSON has them
        if changed:
            if changed.startswith("features "):
                changed = "the features have changed"
            onward = f" (add --init {folder.name} to go on from its weights)" if has_manifest(folder) else ""
            raise ArtifactError(
                f"run {folder} was made with other settings: {changed}; choose another --name{onward}, or replace it with --overwrite"
            )
    return has_manifest(folder)


def begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Record the settings of a run. An earlier run is removed with `overwrite`, or if it has no checkpoint."""
    if overwrite or not steps(folder / FOLDER):
        _clear(folder)
    write_json(folder / CONFIG, settings)


def _clear(folder: Path) -> None:
    """Remove a run: the manifest first and the settings last, so that an interrupt leaves an unfinished run."""
    config, insides = folder / CONFIG, [*folder.glob(f"{FOLDER}/*"), *folder.glob(f"{TENSORBOARD}/*")]
    others = [path for path in folder.glob("*.*") if path.name != LOCK and path != config]
    for path in [folder / MANIFEST, *insides, *others, config]:
        path.unlink(missing_ok=True)


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
) -> None:
    """Save the best weights as those of the run, draw the curves, and write the manifest.

    `sizes` is the configuration of the model; `stopped` tells why there are fewer steps than `total`. Without a validation the
    weights are saved as they are."""
    best = load_best(folder / FOLDER, model)
    save_tensors(folder / WEIGHTS, model.state_dict(), best)
    lines = list(read_log(folder / METRICS))
    with atomic_file(folder / CURVES) as file:
        draw_curves(lines, file)
    files = [described(folder / name) for name in (WEIGHTS, TOKENIZER, CONFIG, METRICS)]
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
        },
    )


def result(folder: Path) -> Trained:
    """The result of a finished run. ArtifactError if it is unfinished."""
    manifest = read_manifest(folder, RUN)
    names = ("steps", "planned_steps", "stopped", "epochs", "pairs_per_second", "seconds", "wait_share", "loss", "best")
    return Trained(**{name: manifest[name] for name in names}, run=str(folder))
