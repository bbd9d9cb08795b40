"""The processes that train together, one a device, as torchrun starts them; alone where it has started none."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...pipeline.device import resolve_device

PATIENCE = timedelta(hours=12)  # the others wait while the first validates and writes


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> tuple["Processes", torch.device]:
        """Meet the others that torchrun (or `qf train --nproc`) has started; of GPUs each takes that of its local rank."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return ALONE, device
        if device.type == "cuda":
            device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        processes = cls(dist.get_rank(), count)
        if not processes.first:  # what there is to say of a run is said once
            logging.getLogger("qf").setLevel(logging.ERROR)
        return processes, device

    def leave(self) -> None:
        """The end of working together."""
        if self.count > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module, all_used: bool) -> nn.Module:
        """`module`, with gradients averaged over the processes; `all_used`: each backward pass reaches all parameters."""
        if self.count == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=not all_used)

    def gather(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """Everyone's rows (counts[rank], ·), one after the other. No gradient flows."""
        if self.count == 1:
            return tensor
        padding = (0, 0) * (tensor.ndim - 1) + (0, max(counts) - len(tensor))
        padded = F.pad(tensor.detach(), padding).contiguous()
        rows = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(rows, padded)
        return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, for all."""
        if self.count > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def number(self, value: int, device: torch.device) -> int:
        """The first process's number, for all. Waits for it."""
        return int(self.from_first(torch.tensor(value, device=device))) if self.count > 1 else value

    def agree(self, answer: bool, device: torch.device) -> bool:
        """The first process's answer, for all. Waits for it."""
        return bool(self.number(int(answer), device))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = Processes()
