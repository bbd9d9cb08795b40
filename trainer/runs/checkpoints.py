"""Checkpoints: one safetensors file each, written atomically, that holds all that training needs to go on to the bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...pipeline.artifacts import atomic_file
from ..qformer import QFormer

BEST = "best.safetensors"


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Tensors and a JSON value in one safetensors file, atomically."""
    data = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, {"info": json.dumps(info)})
    with atomic_file(path) as file:
        file.write(data)


def load_info(path: Path) -> dict[str, Any]:
    """The JSON value beside the tensors of a file that `save_tensors` wrote."""
    with safe_open(path, "pt") as file:
        info: dict[str, Any] = json.loads(file.metadata()["info"])
        return info


def save_checkpoint(
    folder: Path, model: QFormer, optimizer: torch.optim.Optimizer, info: dict[str, Any], keep: int
) -> None:
    """Weights and optimiser as `step-N.safetensors`; of older ones `keep - 1` stay. `info` holds the step, of which all that
    is random is a function."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    save_tensors(folder / f"step-{info['step']:08d}.safetensors", tensors, info)
    for old in steps(folder)[:-keep]:
        old.unlink()


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Put everything back as it was; returns the info."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        model.load_state_dict({k.removeprefix("model."): file.get_tensor(k) for k in names if k.startswith("model.")})
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {k.removeprefix(prefix): file.get_tensor(k) for k in names if k.startswith(prefix)}
            # fused AdamW keeps its step count on the parameters' device
            optimizer.state[parameter] = {k: v.to(device) for k, v in state.items()}
        info: dict[str, Any] = json.loads(file.metadata()["info"])
        return info
