"""Checkpoints of training: one safetensors file each, written atomically, from which training resumes to the bit."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...pipeline.artifacts import atomic_file
from ...pipeline.errors import ArtifactError, first_line

FOLDER = "checkpoints"  # in the folder of a run
BEST = "best.safetensors"  # weights alone, of the best validation so far


@dataclass
class TrainState:
    """How far training is. A checkpoint holds it beside the tensors."""

    step: int = 0  # steps done
    seconds: float = 0.0
    waited: float = 0.0  # seconds spent waiting for data
    pairs: int = 0  # image-text pairs seen
    best: float = -1.0  # the highest score of a validation; scores are 0 or more
    stale: int = 0  # validations since the best one


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and a JSON value into one safetensors file, atomically."""
    data = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, {"info": json.dumps(info)})
    with atomic_file(path) as file:
        file.write(data)


def load_info(path: Path) -> dict[str, Any]:
    """The JSON value beside the tensors of a file that `save_tensors` wrote."""
    with safe_open(path, "pt") as file:
        info: dict[str, Any] = json.loads(file.metadata()["info"])
        return info


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
    try:
        model.load_state_dict(load_file(path))
        return load_info(path)
    except Exception as error:  # safetensors and PyTorch raise errors of many kinds
        raise ArtifactError(f"{path} cannot be read as weights: {first_line(error)}; train with --overwrite") from error


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


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> TrainState:
    """Restore weights and optimiser. Returns the state."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        model.load_state_dict({k.removeprefix("model."): file.get_tensor(k) for k in names if k.startswith("model.")})
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {k.removeprefix(prefix): file.get_tensor(k) for k in names if k.startswith(prefix)}
            # fused AdamW keeps its step count on the device of the parameters
            optimizer.state[parameter] = {k: v.to(device) for k, v in state.items()}
        return TrainState(**json.loads(file.metadata()["info"]))
