"""How much do features lose in bfloat16, and how much speed does it gain?

    OMP_NUM_THREADS=1 python benchmarks/precision.py

Encodes scenes of the sample in float32 and in three bfloat16 ways. `qf` is `--precision bfloat16`: it casts the weights of linear
layers once and runs the rest under autocast. `autocast` casts weights in every forward pass. `whole` runs the whole model in
bfloat16, with its residual stream and norms. Prints two JSON lines: the builtin CLIP, then a CLIP of ViT-B/32 size with random
weights. Each way has its images/s and, for tokens and `pooled`, one minus the cosine with float32: mean, 99th percentile, maximum."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import random_clip
from qf.data.scenes import make_scene, render
from qf.pipeline.device import resolve_device
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.transformers import TransformersEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5, help="of the timing; the best counts")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        random = random_clip("vit-b32", Path(folder))
        for name, encoder in (("builtin", "builtin"), ("ViT-B/32 size, random", random)):
            compare(name, encoder, device, arguments)


def compare(name: str, encoder: str, device: torch.device, arguments: argparse.Namespace) -> None:
    """Prints the figures of one encoder as one JSON line."""
    exact, qf, autocast, whole = (
        load_encoder(encoder, device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    )
    autocast.dtype = torch.bfloat16  # the weights stay float32
    whole.model.to(torch.bfloat16)
    pixels = np.stack([exact.preprocessing(render(make_scene(0, "test", n))) for n in range(arguments.images)])
    batches = np.array_split(pixels, -(-len(pixels) // arguments.batch_size))
    ways = {"float32": exact, "qf": qf, "autocast": autocast, "whole": whole}
    outputs = {way: [encoded(one, batch) for batch in batches] for way, one in ways.items()}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.repetitions):  # in turns: other load slows all of them alike
        for way, one in ways.items():
            seconds[way] = min(seconds[way], timed(one, batches[0]))
    result = {"encoder": name, "images": len(pixels), "batch_size": len(batches[0]), "threads": torch.get_num_threads()}
    for way in ways:
        result[way] = {"images_per_second": round(len(batches[0]) / seconds[way], 1)}
        if way != "float32":
            for n, part in enumerate(("tokens", "pooled")):
                pairs = zip(outputs[way], outputs["float32"], strict=True)
                result[way][part] = described(np.concatenate([cosine(a[n], b[n]).ravel() for a, b in pairs]))
    print(json.dumps(result))


def encoded(encoder: TransformersEncoder, batch: np.ndarray) -> list[np.ndarray]:
    """Returns the tokens and, if the encoder has one, the joint embedding."""
    return [values.cpu().numpy() for values in encoder.encode(batch) if values is not None]


def timed(encoder: TransformersEncoder, batch: np.ndarray) -> float:
    started = time.perf_counter()
    encoded(encoder, batch)
    return time.perf_counter() - started


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosines over the last axis: (..., W), (..., W) -> (...)."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def described(values: np.ndarray) -> dict[str, float]:
    """Returns the mean, the 99th percentile and the maximum of one minus the cosines in `values`."""
    loss = 1 - values.astype(np.float64)
    return {"mean": float(loss.mean()), "p99": float(np.percentile(loss, 99)), "max": float(loss.max())}


if __name__ == "__main__":
    main()
