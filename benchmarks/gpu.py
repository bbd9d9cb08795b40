"""How fast and how right is qf on this GPU? One command, at most eight minutes, nothing but the repository and its packages.

    python benchmarks/gpu.py                  # on a machine with a GPU
    python benchmarks/gpu.py --toy            # everything at toy size, also on a CPU

Models have the real sizes and random weights; pictures are made. Prints one JSON object with a field a section:

correctness   losses, gradients and encoder tokens on the device against the CPU: the largest relative differences
extraction    images/s from JPEG files to shards, and its share of the bare encoder on ready pixels: ViT-B/32, ViT-L/14
step          a stage-1 step of `base` size on features of ViT-L/14 against transformers' modules (see stage1_step.py), with
              FLOP/s beside the peak that one large product reaches, and on a GPU peak memory
loader        images/s and GB/s from shards to batches on the device, from disk and with the features cached on the device
compile       the step with `--compile` against the step without

A section starts only if its allowance (seconds, in SECTIONS) still fits into --minutes; otherwise it is listed under `skipped`. A
section that fails has its message under `errors`, and the others still run. The exit code is 1 if a section failed or if
`correct` is false. Without a GPU the sections run on the CPU, at toy size only in reasonable time."""

import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import date
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import free, machine, random_clip, seconds_a_call, wait
from extract import bare
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
from stage1_step import VOCABULARY, compare, make_batch, make_step, matmul_flops, model_config, peak_memory, qf_losses
from torch.utils.flop_counter import FlopCounterMode

# the largest relative differences that count as correct. Tokens: CUDA convolves float32 in TF32 unless told otherwise.
TOLERANCES = {
    "losses": 1e-4,
    "gradients": 1e-3,
    "worst_gradient": 1e-2,
    "tokens": 1e-2,
    "bfloat16_losses": 5e-2,
    "bfloat16_gradients": 0.2,
}
PICTURE = (500, 375)  # pixels, as photographs of Flickr8k have them
PICTURES = 256  # different pictures; the other files are copies of them
MOST_PICTURES = 8192  # to extract


def step_arguments(a: Namespace, images: int) -> Namespace:
    """The arguments of stage1_step.py for a batch of `images`, at real or at toy size."""
    base = {"preset": "base", "tokens": 257, "width": 1024, "vocab_size": VOCABULARY}
    toy = {"preset": "tiny", "tokens": 9, "width": 16, "vocab_size": 2000}
    common = {"captions_file": None, "device": a.device, "precision": a.precision}
    return Namespace(**common, **(toy if a.toy else base), batch_size=images)


def extraction(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Images/s of `qf extract` and of its encoder alone, for each size of encoder."""
    found = {}
    for size in ("toy",) if a.toy else ("vit-b32", "vit-l14"):
        encoder = load_encoder(random_clip(size, folder / size), device, resolve_precision(a.precision, device))
        assert isinstance(encoder, TransformersEncoder)
        options = ExtractOptions(overwrite=True)
        pictures, most = (8, 16) if a.toy else (PICTURES, MOST_PICTURES)
        source = make_photos(folder / f"photos-{size}", pictures)
        some = [load_image(source.parent / record.image) for record in read(source).records[: options.batch_size]]
        alone = bare(encoder, np.stack([encoder.preprocessing(image) for image in some]), a.seconds)
        wanted = most if a.toy else min(most, alone * a.seconds)  # as many files as take a few seconds
        copy_photos(source, max(1, round(wanted / pictures)))
        features = folder / "features"  # the second run replaces the first
        runs = [extract(read(source), str(source), encoder, features, options) for _ in range(2)]
        best = max(runs, key=lambda run: run.images_per_second)
        found[size] = {
            "images": best.records,
            "batch_size": options.batch_size,
            "images_per_second": best.images_per_second,
            "bare_images_per_second": round(alone, 1),
            "share_of_bare": round(best.images_per_second / alone, 3),
            "encoder_waited": best.waited,
        }
        shutil.rmtree(features)
    return found


def make_photos(folder: Path, images: int) -> Path:
    """JPEG files of soft random patterns, which take as long to decode as photographs; returns their CSV."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize(PICTURE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,a pattern")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


def copy_photos(source: Path, copies: int) -> None:
    """Add copies to the CSV and its folder until there are `copies` files of each picture."""
    _, *lines = source.read_text().splitlines()
    with open(source, "a") as table:
        for copy in range(1, copies):
            for line in lines:
                name = line.split(",")[0]
                shutil.copyfile(source.parent / name, source.parent / f"{copy}-{name}")
                table.write(f"{copy}-{line}\n")


def step(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Seconds, FLOP/s and memory of a step on about --pairs image-text pairs, with one and with five captions an image."""
    peak = matmul_flops(device, resolve_precision(a.precision, device)) / 1e12
    found: dict[str, Any] = {"matmul_TFLOP_per_second": round(peak, 2)}
    for captions in (1, 5):
        arguments = step_arguments(a, a.pairs // captions)
        difference = compare(arguments, captions)  # raises unless both compute the same
        measured = {name: measure_step(name, arguments, captions, device, a.seconds) for name in ("plain", "qf")}
        plain, ours = measured["plain"], measured["qf"]
        found[f"captions_{captions}"] = {
            "images": arguments.batch_size,
            "relative_difference": difference,
            "plain": plain,
            "qf": ours,
            "times_faster": round(plain["seconds"] / ours["seconds"], 2),
            "share_of_peak": round(ours["TFLOP_per_second"] / peak, 3),
        }
    return found


def measure_step(
    name: str, arguments: Namespace, captions: int, device: torch.device, seconds: float, compiled: bool = False
) -> dict[str, Any]:
    """Seconds, pairs/s, FLOP/s and on CUDA peak memory of one kind of step, alone on the device."""
    free(device)
    run = make_step(name, arguments, captions, device, compiled)
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    first = time.perf_counter() - began
    each = seconds_a_call(run, device, seconds)
    memory = round(peak_memory(device)) if device.type == "cuda" else None  # a CPU's is that of the whole process
    found = {
        "first_step_seconds": round(first, 2),
        "seconds": round(each, 5),
        "pairs_per_second": round(arguments.batch_size * captions / each, 1),
        "peak_memory_MB": memory,
    }
    if not compiled:
        with FlopCounterMode(display=False) as counter:  # last: it takes time and memory
            run()
        found["TFLOP_per_second"] = round(counter.get_total_flops() / each / 1e12, 4)
    return found


def compile(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The step with and without `--compile`. Its first step compiles."""
    ways = {"plain": False, "compiled": True}
    found: dict[str, Any] = {
        name: measure_step("qf", step_arguments(a, a.pairs), 1, device, a.seconds, compiled)
        for name, compiled in ways.items()
    }
    return {**found, "times_faster": round(found["plain"]["seconds"] / found["compiled"]["seconds"], 3)}


def loader(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Rates of the training loader alone: shards in the page cache to batches on the device."""
    images, tokens, width, batch_size = (64, 9, 16, 8) if a.toy else (2048, 257, 1024, 128)
    features = make_features(folder, images, 256, tokens, width, "float16", "arrow")
    vocabulary = Tokens.train([caption for captions in features.captions[:200] for caption in captions], 500)
    weight = sum(dtype.itemsize * prod(shape) for dtype, shape in features.columns.values())  # bytes of an image
    found: dict[str, Any] = {"images": images, "batch_size": batch_size, "bytes_per_image": weight}
    for name in ("disk", "cached_on_device"):
        source = Cache(features, features.rows(), device) if name == "cached_on_device" else None
        batches = Batches(
            features, features.rows(), vocabulary, batch_size=batch_size, captions_per_image=0, matched_captions=1,
            max_text_length=32, seed=0, device=device, source=source,
        )  # fmt: skip
        numbers = count()

        def epoch(batches: Batches = batches, numbers: "count[int]" = numbers) -> None:
            start = next(numbers) * batches.per_epoch
            for _ in batches.between(start, start + batches.per_epoch):
                pass

        epoch()  # warm-up: the shards are in the page cache afterwards
        rate = batches.per_epoch * batch_size / seconds_a_call(epoch, device, a.seconds)
        found[name] = {"images_per_second": round(rate, 1), "GB_per_second": round(rate * weight / 1e9, 2)}
    return found


def correctness(a: Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The largest relative differences between the device and the CPU in float32, and whether they are small enough."""
    cpu, captions = torch.device("cpu"), 2
    arguments = step_arguments(a, 4)
    torch.manual_seed(0)
    model = QFormer(model_config(arguments, 0.0))
    exact = losses_on(model, arguments, captions, cpu, torch.float32)
    same = losses_on(model, arguments, captions, device, torch.float32)
    short = losses_on(model, arguments, captions, device, torch.bfloat16)
    clip = random_clip("toy" if a.toy else "vit-b32", folder / "clip")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 224, 224), np.uint8)
    tokens = [load_encoder(clip, place, torch.float32).encode(pixels)[0].cpu() for place in (cpu, device)]
    found = {
        "losses": max(abs(same[0][name] / loss - 1) for name, loss in exact[0].items()),
        "gradients": apart(same[1], exact[1]),
        "worst_gradient": worst_apart(same[1], exact[1]),
        "tokens": ((tokens[1] - tokens[0]).norm(dim=-1) / tokens[0].norm(dim=-1)).max().item(),
        "bfloat16_losses": max(abs(short[0][name] / loss - 1) for name, loss in exact[0].items()),
        "bfloat16_gradients": apart(short[1], exact[1]),
    }
    return {
        "relative_differences": {name: float(f"{v:.1e}") if math.isfinite(v) else None for name, v in found.items()},
        "tolerances": TOLERANCES,
        "correct": all(found[name] <= allowed for name, allowed in TOLERANCES.items()),
    }


Gradients = dict[str, torch.Tensor]  # by the parameter's name, on the CPU


def losses_on(
    model: QFormer, arguments: Namespace, captions: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], Gradients]:
    """The losses of one batch with fixed negatives, and the gradients of their sum. Moves the model to `device`."""
    model = model.to(device).train()
    batch = make_batch(arguments, arguments.batch_size, captions, device)
    rows = torch.arange(len(batch[3]), device=device)
    pairs = len(rows)
    negatives = (batch[3][(rows + captions) % pairs], (rows + 2 * captions) % pairs)
    with autocast(device, dtype):
        losses = qf_losses(model, batch, negatives)
    model.zero_grad()
    torch.stack([*losses.values()]).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def norm(gradients: Gradients) -> float:
    """The norm of all gradients as one vector."""
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def apart(some: Gradients, exact: Gradients) -> float:
    """The relative difference of all gradients as one vector."""
    return norm({name: some[name] - gradient for name, gradient in exact.items()}) / norm(exact)


def worst_apart(some: Gradients, exact: Gradients) -> float:
    """The largest relative difference of one parameter's gradient.

    A gradient below a thousandth of the whole counts as that thousandth: biases of keys have none but rounding."""
    least = norm(exact) / 1000
    return max(((some[name] - g).norm() / max(g.norm().item(), least)).item() for name, g in exact.items())


SECTIONS: dict[Callable[[Namespace, torch.device, Path], dict[str, Any]], int] = {  # allowances in seconds
    correctness: 60,
    extraction: 150,
    step: 120,
    loader: 75,
    compile: 60,
}


def main(arguments: list[str] | None = None) -> int:
    """Print the JSON object; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="everything at toy size")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--pairs", type=int, help="image-text pairs of a step; 60 unless given, with --toy 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    a = parser.parse_args(arguments)
    a.pairs = a.pairs or (10 if a.toy else 60)
    if a.pairs < 10:
        parser.error("--pairs must be at least 10: two images with five captions each")
    a.seconds = 0.0 if a.toy else 5.0  # of each measurement
    device, began = resolve_device(a.device), time.perf_counter()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(device),
        "precision": str(resolve_precision(a.precision, device)).removeprefix("torch."),
        "toy": a.toy,
        "skipped": [],
        "errors": {},
        "seconds": {},
    }
    for section, allowance in SECTIONS.items():
        name, started = section.__name__, time.perf_counter()
        if started - began + allowance > a.minutes * 60:
            result["skipped"].append(name)
            continue
        try:
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
                result[name] = section(a, device, Path(folder))
        except Exception as error:  # any failure is a finding; the other sections still run
            result["errors"][name] = f"{type(error).__name__}: {error}"
        result["seconds"][name] = round(time.perf_counter() - started, 1)
        gc.collect()
    print(json.dumps(result, indent=2))
    return 1 if result["errors"] or not result.get("correctness", {}).get("correct", True) else 0


if __name__ == "__main__":
    sys.exit(main())
