"""Which device computes, in which precision, and how many batches at once."""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch

from .errors import QfError

MAX_STREAMS = 4
PROBE = (128, 768)  # rows and width of the product that is measured
REPEATS = 4  # products in each precision, at least; the fastest counts
BUDGET = 0.04  # seconds of products, at least: other processes may disturb a shorter measurement as a whole
MARGIN = 1.2  # bfloat16 must be this many times as fast, because it costs accuracy
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of that name: auto (CUDA where there is one), cpu, cuda or cuda:N. QfError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QfError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise QfError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QfError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; QfError if there is none.

    "auto" is bfloat16 on GPUs that have it (Ampere and later). On a CPU `bfloat16_pays` decides."""
    if name != "auto":
        if name not in DTYPES:
            raise QfError(f"--precision {name}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if bfloat16_pays() else torch.float32


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 clearly faster than float32: a short measurement, once a process.

    The processor's flags do not tell. With AVX-512 BF16 but without AMX, one processor multiplied bfloat16 at 0.6 times the
    speed of float32, another at twice the speed. Without either flag the answer is no, and nothing is measured."""
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")):
        return False
    product_seconds(torch.float32), product_seconds(torch.bfloat16)  # warm-up
    float32: list[float] = []
    bfloat16: list[float] = []
    while len(float32) < REPEATS or sum(float32) + sum(bfloat16) < BUDGET:
        float32.append(product_seconds(torch.float32))
        bfloat16.append(product_seconds(torch.bfloat16))
    return min(float32) > MARGIN * min(bfloat16)


def product_seconds(dtype: torch.dtype) -> float:
    """The seconds of one matrix product. Its size is that of a linear layer in an encoder or a Q-Former."""
    rows, width = PROBE
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    began = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - began


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context in which a forward pass runs in mixed precision. For float32 it changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def free_memory(device: torch.device) -> int:
    """The free bytes on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes that Linux counts as available, within a container's limit (cgroup v2). Other systems: all memory."""
    if not (proc / "meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _figures(proc / "meminfo")["MemAvailable:"] * 1024
    limit = group / "memory.max"  # absent outside containers; "max" where there is none
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        taken = int((group / "memory.current").read_text())
        cache = _figures(group / "memory.stat")["inactive_file"]  # the kernel drops it when memory runs short
        free = min(free, int(most) - taken + cache)
    return max(0, free)


def _figures(file: Path) -> dict[str, int]:
    """The numbers in a file whose lines are a name and a number."""
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}


class EncoderStreams:
    """Threads that each encode a batch at the same time: two CUDA streams on a GPU, cores on a CPU.

    At most MAX_STREAMS, because each holds the activations of a batch. Every thread calls `enter`, then `fetch` and `wait` for
    its results."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.threads = device, torch.get_num_threads()
        self.count = 2 if device.type == "cuda" else min(MAX_STREAMS, self.threads)

    def enter(self) -> None:
        """Set up the calling thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        else:
            torch.set_num_threads(max(1, self.threads // self.count))

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """Start to copy a result to CPU memory; `wait` waits for the copy. A CPU tensor is returned as it is."""
        if values.device.type == "cpu":
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies that the calling thread started are complete."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def leave(self) -> None:
        """Restore the number of cores that PyTorch uses. Call it after the threads have ended."""
        torch.set_num_threads(self.threads)
