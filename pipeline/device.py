"""Which device computes, in which precision, and how many batches at once."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from .errors import QfError

MAX_STREAMS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
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
    """`auto` is bfloat16 where the processor multiplies it natively (CUDA since Ampere, x86 with AMX or AVX-512 BF16),
    else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise QfError(f"--precision {name}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision for a forward pass; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """What Linux counts as available, within a container's limit (cgroup v2); elsewhere all the memory there is."""
    if not (proc / "meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _figures(proc / "meminfo")["MemAvailable:"] * 1024
    limit = group / "memory.max"  # absent outside containers; "max" where there is none
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        taken = int((group / "memory.current").read_text())
        cache = _figures(group / "memory.stat")["inactive_file"]  # would give way
        free = min(free, int(most) - taken + cache)
    return max(0, free)


def _figures(file: Path) -> dict[str, int]:
    """Of a file with a name and a number a line."""
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}


class EncoderStreams:
    """Threads that compute a batch each at the same time: two streams on a GPU, cores on a CPU (at most MAX_STREAMS, since
    each holds the activations of a batch). Enter from each thread; fetch results, then wait, on it."""

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
        """Begin to copy a result to memory."""
        if values.device.type == "cpu":
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def wait(self) -> None:
        """Until everything that the calling thread fetched is there."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def leave(self) -> None:
        """After the threads have ended: others start with as many cores as before."""
        torch.set_num_threads(self.threads)
