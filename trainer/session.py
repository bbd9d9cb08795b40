"""A training from its lock to its manifest, for every stage: where the run is written, and whether it is finished already."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..pipeline.device import DTYPES, resolve_precision
from ..pipeline.errors import TrainingError
from ..pipeline.files import locked
from ..pipeline.replacement import place_to_write, replacement_of, settle
from .config import LoopConfig
from .distributed.processes import Processes
from .loop import Stage, planned_steps, train_stage
from .manifest import CHECKPOINTS, RUN
from .runs.checkpoints import TrainState, last_step
from .runs.folder import Trained, is_finished, recorded_precision, result, resumes
from .runs.log import Log, Report

AnyStage = TypeVar("AnyStage", bound=Stage)


def run_lock(folder: Path, processes: Processes) -> AbstractContextManager[object]:
    """The lock of a run's folder, which rank 0 holds for all."""
    return locked(folder) if processes.first else nullcontext()


def training_precision(
    config: LoopConfig, folder: Path, overwrite: bool, processes: Processes, device: torch.device
) -> torch.dtype:
    """The precision to train in, on all ranks: that of `config`, or with `auto` the one that the run began in.

    TrainingError for float16."""
    if config.precision == "float16":
        raise TrainingError("--precision float16 cannot train (its gradients underflow); use bfloat16 or float32")
    dtype = resolve_precision(config.precision, device)
    if processes.first and config.precision == "auto":
        dtype = recorded_precision(folder, overwrite) or dtype
    dtypes = list(DTYPES.values())  # ranks measure one by one, and could choose differently
    return dtypes[processes.number(dtypes.index(dtype), device)]


def trained(
    stage: AnyStage | None,
    outlook: Callable[[AnyStage, int], str],
    place: Path,
    config: LoopConfig,
    device: torch.device,
    processes: Processes,
    say: Callable[[str], None],
    report: Report,
    writer: type | None,
) -> tuple[TrainState, int, float]:
    """Train a stage in `place`, after saying its `outlook` on the steps that are done; without a stage the weights stay as they came,
    with an empty log. Returns where training ended, the planned steps, and the steps of an epoch."""
    if stage is None:
        if processes.first:
            Log(place, 0, 0.0, 0, report, writer).close()
        return TrainState(), 0, 1.0
    say(outlook(stage, last_step(place / CHECKPOINTS)))
    state = train_stage(stage, place, config, device, processes, report, writer)
    return state, planned_steps(stage.batches_per_epoch, config), stage.batches_per_epoch / config.accumulate


def conduct(
    folder: Path,
    settings: dict[str, Any],
    overwrite: bool,
    processes: Processes,
    device: torch.device,
    say: Callable[[str], None],
    train: Callable[[Path], None],
) -> Trained:
    """Call `train` with the folder to write the run into, unless it is finished. Returns the result.

    All processes call it, within `run_lock`. With `overwrite` the run that is there stays until the new one is finished. ArtifactError
    if the folder holds a run with other settings."""
    place = folder
    if processes.first:
        place = place_to_write(folder, overwrite, lambda there: resumes(there, settings))
    if processes.agree(place != folder, device):
        place = replacement_of(folder)
    finished = processes.first and not overwrite and is_finished(folder, settings)
    if finished:
        say(f"{folder} is finished: nothing to train; --overwrite trains it anew")
    if not processes.agree(finished, device):
        train(place)
        if processes.first:
            settle(place, folder, RUN)
    processes.agree(True, device)  # all ranks wait for the manifest
    return result(folder)
