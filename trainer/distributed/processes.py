"""The processes that train together, one for each device, as torchrun or `qf train --nproc` starts them; or a single one."""

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
from ...pipeline.errors import TrainingError
from .place import place

TIMEOUT = timedelta(hours=12)  # for the other ranks, which wait while rank 0 validates and writes


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> tuple["Processes", torch.device]:
        """Connect to the other processes. Returns the group and this process's device: on CUDA the GPU of its local rank.

        TrainingError if the environment is incomplete, or if the other processes are not there."""
        here = place()
        if here.count == 1:
            return ALONE, device
        if device.type == "cuda":
            device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise TrainingError(
                f"process {here.rank} cannot connect to the others at {address}; start them all at once with the same "
                "MASTER_ADDR and MASTER_PORT, or use `qf train --nproc N`"
            ) from error
        processes = cls(here.rank, here.count)
        if not processes.first:  # rank 0 logs for all
            logging.getLogger("qf").setLevel(logging.ERROR)
        return processes, device

    def leave(self) -> None:
        """Disconnect from the other processes."""
        if self.count > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module, all_used: bool) -> nn.Module:
        """`module`, with gradients averaged over the processes. `all_used`: every backward pass reaches all parameters."""
        if self.count == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=not all_used)

    def gather(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """The rows (counts[rank], ·) of all ranks, one after the other, without gradients."""
        if self.count == 1:
            return tensor
        padding = (0, 0) * (tensor.ndim - 1) + (0, max(counts) - len(tensor))
        padded = F.pad(tensor.detach(), padding).contiguous()
        rows = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(rows, padded)
        return torch.cat([some[:count] for some, count in zip(rows, counts, strict=True)])

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on all ranks."""
        if self.count > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def number(self, value: int, device: torch.device) -> int:
        """Rank 0's number, on all ranks. Waits for it."""
        return int(self.from_first(torch.tensor(value, device=device))) if self.count > 1 else value

    def agree(self, answer: bool, device: torch.device) -> bool:
        """Rank 0's answer, on all ranks. Waits for it."""
        return bool(self.number(int(answer), device))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = Processes()
