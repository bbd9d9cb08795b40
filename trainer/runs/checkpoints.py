"""Checkpoints of training: one safetensors file each, written atomically, from which training resumes to the bit.

Each holds its own checksum. A damaged checkpoint is passed over, with a warning, for the one before."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, ValidationError, convert
from torch import Tensor, nn

from ...pipeline.artifacts import Count
from ...pipeline.errors import ArtifactError
from ...pipeline.tensor_files import check_tensors, open_tensors, read_info, save_tensors

log = logging.getLogger(__name__)
BEST = "best.safetensors"  # weights alone, of the best validation so far
Seconds = Annotated[float, Meta(ge=0)]


@dataclass
class TrainState:
    """How far training is. A checkpoint holds it beside the tensors."""

    step: Count = 0  # steps done
    seconds: Seconds = 0.0
    waited: Seconds = 0.0  # seconds spent waiting for data
    pairs: Count = 0  # image-text pairs seen
    best: float = -1.0  # the highest score of a validation; scores are 0 or more
    stale: Count = 0  # validations since the best one
    losses: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # sum and weight since the last line of the log


def save_best(folder: Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Write the weights as the best so far; `info` holds their step and their metrics."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder / BEST, model.state_dict(), info)


def load_best(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the best weights into the model, if there are any. Returns the info that `save_best` wrote, or {}.

    ArtifactError if they cannot be read."""
    path = folder / BEST
    if not path.is_file():
        return {}
    check_tensors(path)
    load_model(path, model)
    return read_info(path)


def drop_damaged_best(folder: Path, state: TrainState) -> None:
    """Delete best weights that are damaged, with a warning: the next validation chooses the best anew."""
    path = folder / BEST
    if not path.is_file():
        return
    try:
        check_tensors(path)
    except ArtifactError as error:
        log.warning("%s; the next validation writes it anew", error)
        path.unlink()
        state.best, state.stale = -1.0, 0


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, keep: int
) -> None:
    """Write weights, optimiser and state as `step-N.safetensors`, and delete all but the last `keep` checkpoints.

    A checkpoint needs no state of a random generator: all random numbers of training depend on the step alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    save_tensors(folder / f"step-{state.step:08d}.safetensors", tensors, asdict(state))
    for old in steps(folder)[:-keep]:
        old.unlink()


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def last_step(folder: Path) -> int:
    """The number of steps done at the last checkpoint in `folder`; 0 without one."""
    saved = steps(folder)
    return int(saved[-1].stem.removeprefix("step-")) if saved else 0


def load_last_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainState:
    """Restore weights and optimiser from the last checkpoint that is sound. Returns the state; a fresh one without any.

    Damaged checkpoints are passed over with a warning."""
    for path in reversed(steps(folder)):
        try:
            check_tensors(path)
            return load_checkpoint(path, model, optimizer, device)
        except ArtifactError as error:
            log.warning("%s; training goes on from the checkpoint before, or from its start", error)
    return TrainState()


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> TrainState:
    """Restore weights and optimiser. Returns the state. ArtifactError if the file holds those of another model."""
    try:
        state = convert(read_info(path), TrainState)
    except ValidationError as error:
        raise ArtifactError(f"{path} is no checkpoint of this version of qf: {error}") from error
    load_model(path, model, "model.")
    with open_tensors(path) as file:
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            values = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            # fused AdamW keeps its step count on the device of the parameters
            optimizer.state[parameter] = {k: v.to(device) for k, v in values.items()}
    return state


def load_model(path: Path, model: nn.Module, prefix: str = "") -> None:
    """Load the tensors whose names begin with `prefix`. ArtifactError unless they are all of the model's, and no others."""
    own = model.state_dict()
    with open_tensors(path) as file:
        found: dict[str, Tensor] = {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }
    if found.keys() != own.keys() or any(found[name].shape != own[name].shape for name in own):
        raise ArtifactError(f"{path} holds the weights of another model")
    model.load_state_dict(found)
