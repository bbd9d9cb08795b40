"""Pieces that several benchmarks share: a random CLIP of a real size, the time of a call, what the machine is."""

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES: dict[str, dict[str, int]] = {
    "vit-b32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32},
    "vit-l14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
    "toy": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56},
}  # fmt: skip


def random_clip(size: str, folder: Path) -> str:
    """Save a CLIP vision model with random weights and its preprocessor in `folder`; returns the folder's name."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES[size], image_size=224, projection_dim=512)  # type: ignore[arg-type]
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return str(folder)


def wait(device: torch.device) -> None:
    """Block until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean seconds of one call, over about `seconds` of calls. A first call tells how many; one that takes that long is enough.

    The clock waits for the device before the first call and after the last one, and never in between. The caller warms up."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    first = time.perf_counter() - began
    if first >= seconds:
        return first
    count = max(1, int(seconds / first))
    began = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return (time.perf_counter() - began) / count


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used, and forget the peak of the device's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and its software in words and numbers. Memory is in GB."""
    described: dict[str, Any] = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["device_memory_GB"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        described["cuda"] = torch.version.cuda
    return described
