"""How fast and how right is qf on this GPU? One command, at most eight minutes, nothing but the repository and its packages.

    python benchmarks/gpu.py                  # on a machine with a GPU
    python benchmarks/gpu.py --toy            # everything at toy size, also on a CPU

Models have the real sizes and random weights; pictures are made. Prints one JSON object with a field a section:

extraction    images/s from JPEG files to shards, and its share of the bare encoder on ready pixels: ViT-B/32, ViT-L/14
step          a stage-1 step of `base` size on features of ViT-L/14 against transformers' modules (see stage1_step.py), with
              FLOP/s beside the peak that one large product reaches, and peak memory
loader        images/s from shards to batches on the device, from disk and with the features cached on the device
compile       the step with `--compile` against the step without
correctness   losses, gradients and encoder tokens on the device against the CPU: the largest relative differences

A section that cannot start within --minutes is listed under `skipped`. One that fails has its message under `errors`, the others
still run, and the exit code is 1."""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract import SIZES, bare, random_clip
from loader import make_features
from PIL import Image
from qf.pipeline.config import ExtractOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.device import autocast, resolve_device, resolve_precision
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.transformers import TransformersEncoder
from qf.pipeline.extract.extract import extract
from qf.pipeline.images import load_image
from qf.trainer.loader.batches import Batches
from qf.trainer.loader.cache import Cache
from qf.trainer.qformer import QFormer
from qf.trainer.tokens import Tokens
from stage1_step import VOCABULARY, make_batch, make_step, matmul_flops, model_config, peak_memory, qf_losses
from torch.utils.flop_counter import FlopCounterMode

# the largest relative differences that count as correct
TOLERANCES = {"losses": 1e-4, "gradients": 1e-3, "tokens": 1e-2, "bfloat16_losses": 5e-2}
PICTURE = (500, 375)  # pixels, as photographs of Flickr8k have them
SIZES["toy"] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56,
}  # fmt: skip


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - began


def sizes_of(a: Namespace, **changed: Any) -> Namespace:
    """The arguments of stage1_step.py at the size that is asked for."""
    base: dict[str, Any] = {"preset": "base", "tokens": 257, "width": 1024, "batch_size": 64, "vocab_size": VOCABULARY}
    toy: dict[str, Any] = {"preset": "tiny", "tokens": 9, "width": 16, "batch_size": 4, "vocab_size": 2000}
    common = {"captions_file": None, "device": a.device, "precision": a.precision}
    return Namespace(**common, **{**(toy if a.toy else base), **changed})


def extraction(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    found = {}
    for size, count in {"toy": 16}.items() if a.toy else {"vit-b32": 4096, "vit-l14": 1024}.items():
        encoder = load_encoder(random_clip(size, folder / size), device, resolve_precision(a.precision, device))
        assert isinstance(encoder, TransformersEncoder)
        source = make_photos(folder / f"photos-{size}", count)
        records = read(source).records
        some = [load_image(source.parent / record.image) for record in records[:64]]
        pixels = np.stack([encoder.preprocessing(image) for image in some])
        bare(encoder, pixels, 0.1 if a.toy else 1.0)  # warm-up
        alone = bare(encoder, pixels, 0.2 if a.toy else 5.0)
        extracted = extract(read(source), str(source), encoder, folder / f"features-{size}", ExtractOptions())
        rate = extracted.images_per_second
        found[size] = {
            "images": count,
            "images_per_second": rate,
            "bare_images_per_second": round(alone, 1),
            "share_of_bare": round(rate / alone, 3),
            "encoder_waited": extracted.waited,
        }
    return found


def make_photos(folder: Path, count: int) -> Path:
    """JPEG files of soft random patterns, which take as long to decode as photographs; returns their CSV."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize(PICTURE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,a pattern")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


def step(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    peak = matmul_flops(device, resolve_precision(a.precision, device)) / 1e12
    found["matmul_TFLOP_per_second"] = round(peak, 2)
    for captions in (1, 5):
        arguments = sizes_of(a)
        memory, steps = {}, {}
        for name in ("plain", "qf"):  # the memory of one is not that of both
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            steps[name] = make_step(name, arguments, captions, device)
            seconds_of(steps[name], device)  # warm-up
            memory[name] = round(peak_memory(device))
        turns = [{name: seconds_of(run, device) for name, run in steps.items()} for _ in range(2 if a.toy else 10)]
        with FlopCounterMode(display=False) as counter:
            steps["qf"]()
        seconds = {name: statistics.median(turn[name] for turn in turns) for name in steps}
        rate = counter.get_total_flops() / seconds["qf"] / 1e12
        found[f"captions_{captions}"] = {
            "batch_size": arguments.batch_size,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "times_faster": round(statistics.median(turn["plain"] / turn["qf"] for turn in turns), 2),
            "pairs_per_second": round(arguments.batch_size * captions / seconds["qf"], 1),
            "qf_TFLOP_per_second": round(rate, 3),
            "share_of_peak": round(rate / peak, 3),
            "memory_MB_after_warm_up": memory,  # plain alone, then both
        }
    return found


def loader(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    images, tokens, width, batch_size = (64, 9, 16, 8) if a.toy else (4096, 257, 1024, 128)
    (folder / "loader").mkdir()
    features = make_features(folder / "loader", images, 256, tokens, width, "float16", "arrow")
    vocabulary = Tokens.train([caption for captions in features.captions[:200] for caption in captions], 500)
    found = {"gigabytes": round(sum(shard["bytes"] for shard in features.manifest["shards"]) / 1e9, 3)}
    for name in ("disk", "cached_on_device"):
        source = Cache(features, features.rows(), device) if name == "cached_on_device" else None
        batches = Batches(
            features, features.rows(), vocabulary, batch_size=batch_size, captions_per_image=0, matched_captions=1,
            max_text_length=32, seed=0, device=device, source=source,
        )  # fmt: skip
        count = batches.per_epoch

        def epoch(number: int, batches: Batches = batches, count: int = count) -> None:
            for _ in batches.between(number * count, (number + 1) * count):
                pass

        epoch(0)  # warm-up: the shards are in the page cache afterwards
        seconds = min(seconds_of(lambda number=number: epoch(number), device) for number in (1, 2, 3))  # type: ignore[misc]
        found[f"{name}_images_per_second"] = round(count * batch_size / seconds, 1)
    return found


def compile(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    plain, compiled = (make_step("qf", sizes_of(a), 1, device, compiled=value) for value in (False, True))
    warm_up = seconds_of(compiled, device)
    seconds_of(plain, device)
    turns = [(seconds_of(plain, device), seconds_of(compiled, device)) for _ in range(2 if a.toy else 10)]
    return {
        "seconds": {
            "plain": statistics.median(t[0] for t in turns),
            "compiled": statistics.median(t[1] for t in turns),
        },
        "times_faster": round(statistics.median(without / with_ for without, with_ in turns), 3),
        "warm_up_seconds": round(warm_up, 1),
    }


def correctness(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    cpu, captions = torch.device("cpu"), 2
    arguments = sizes_of(a, batch_size=4)
    torch.manual_seed(0)
    model = QFormer(model_config(arguments, 0.0))
    runs = {
        "cpu": losses_on(model, arguments, captions, cpu, torch.float32),
        "device": losses_on(model, arguments, captions, device, torch.float32),
        "bfloat16": losses_on(model, arguments, captions, device, torch.bfloat16),
    }
    losses, gradients = runs["cpu"]
    found = {
        "losses": max(abs(runs["device"][0][name] / value - 1) for name, value in losses.items()),
        "gradients": ((runs["device"][1] - gradients).norm() / gradients.norm()).item(),
        "bfloat16_losses": max(abs(runs["bfloat16"][0][name] / value - 1) for name, value in losses.items()),
    }
    clip = random_clip("toy" if a.toy else "vit-b32", folder / "clip")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 224, 224), np.uint8)
    tokens = [load_encoder(clip, place, torch.float32).encode(pixels)[0].cpu() for place in (cpu, device)]
    found["tokens"] = ((tokens[1] - tokens[0]).norm() / tokens[0].norm()).item()
    return {
        "relative_differences": {name: float(f"{value:.1e}") for name, value in found.items()},
        "tolerances": TOLERANCES,
        "correct": all(found[name] <= allowed for name, allowed in TOLERANCES.items()),
    }


def losses_on(
    model: QFormer, arguments: Namespace, captions: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], torch.Tensor]:
    """The losses of one batch with fixed negatives, and all gradients in one vector on the CPU."""
    model = model.to(device).train()
    batch = make_batch(arguments, arguments.batch_size, captions, device)
    rows = torch.arange(len(batch[3]), device=device)
    count = len(rows)
    negatives = (batch[3][(rows + captions) % count], (rows + 2 * captions) % count)
    with autocast(device, dtype):
        losses = qf_losses(model, batch, negatives)
    model.zero_grad()
    torch.stack([*losses.values()]).sum().backward()
    gradients = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    return {name: loss.item() for name, loss in losses.items()}, gradients


SECTIONS = (correctness, extraction, step, loader, compile)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="everything at toy size")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further section begins")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    a = parser.parse_args()
    device, began = resolve_device(a.device), time.perf_counter()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "precision": str(resolve_precision(a.precision, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "toy": a.toy,
        "skipped": [],
        "errors": {},
        "seconds": {},
    }
    for section in SECTIONS:
        name = section.__name__
        if time.perf_counter() - began > a.minutes * 60:
            result["skipped"].append(name)
            continue
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                result[name] = section(a, device, Path(folder))
        except Exception as error:  # any failure is a finding; the other sections still run
            result["errors"][name] = f"{type(error).__name__}: {error}"
        result["seconds"][name] = round(time.perf_counter() - started, 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(result, indent=2))
    return 1 if result["errors"] or not result.get("correctness", {}).get("correct", True) else 0


if __name__ == "__main__":
    sys.exit(main())
