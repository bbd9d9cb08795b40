"""What does each codec cost, and how exact is it? Measures bytes, cosines and speed on given features; no encoder runs.

    python benchmarks/codecs.py qf-out/features                  # features made with --codec float32
    python benchmarks/codecs.py synthetic                        # 257 x 1024 with massive activations, made here
    python benchmarks/codecs.py qf-out/features --train codecs   # also a workspace a codec: qf train -w codecs/int8 …

Prints one JSON object with a field a codec. Each cosine compares decoded with exact tokens: mean, 1st percentile, minimum.
`cosine` takes the tokens as they are. `layer_norm` takes them after the LayerNorm that the Q-Former applies first. `standardised`
also divides each channel by its standard deviation, so that small channels count as much as large ones. Speeds are GB/s of
float32 values, the best of several runs, on one thread unless OMP_NUM_THREADS is set."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from qf.pipeline.artifacts import described, has_manifest, write_manifest
from qf.pipeline.features.arrow_shards import Block, schema, write_arrow_shard
from qf.pipeline.features.codecs import CODECS, columns, decode, encode
from qf.pipeline.features.manifest import FEATURES, REJECTS
from qf.pipeline.features.reader import Features
from qf.pipeline.files import atomic_file
from qf.pipeline.schema import RECORD_COLUMNS
from torch import Tensor
from torch.nn import functional as F

BATCH = 32  # images encoded or decoded at once


def synthetic(images: int, seed: int = 0) -> Tensor:
    """Returns (images, 257, 1024) values like those of the second-last layer of a large vision transformer.

    Each channel has its own mean (normal, 0.5) and deviation (log-normal about 0.6). Half of the deviation is a mixture of 48
    directions. Six channels lie 8 to 40 from zero in every token. In the class token and 2 to 6 other tokens of an image all
    values are three times as large, and two channels are near -900 and 400."""
    draw = np.random.default_rng(seed)
    tokens, width = 257, 1024
    mean, deviation = draw.normal(size=width) * 0.5, np.exp(draw.normal(size=width) * 0.5) * 0.6
    mixture = draw.normal(size=(images, tokens, 48)) @ draw.normal(size=(48, width)) / 48**0.5
    values = (mixture * 0.7 + draw.normal(size=mixture.shape) * 0.7) * deviation + mean
    large = draw.choice(width, 6, replace=False)
    far = np.array([-40, 25, 15, -12, 10, 8])
    values[:, :, large] += far * (1 + 0.1 * draw.normal(size=(images, tokens, 6)))
    for image in range(images):
        massive = [0, *draw.choice(np.arange(1, tokens), draw.integers(2, 7), replace=False)]
        values[image, massive] *= 3
        for channel, value in zip(large[:2], (-900, 400), strict=True):
            values[image, massive, channel] = value * (1 + 0.2 * draw.normal(size=len(massive)))
    return torch.from_numpy(values.astype(np.float32))


def cosines(exact: Tensor, decoded: Tensor) -> dict[str, dict[str, float]]:
    """Returns statistics of the cosines between the tokens of two (N, T, W) tensors. Tokens that are all zero are skipped."""
    exact, decoded = exact.flatten(0, 1), decoded.flatten(0, 1)
    some = exact.abs().amax(1) > 0
    exact, decoded = exact[some], decoded[some]
    found = {"cosine": (exact, decoded)}
    normed = [F.layer_norm(values, values.shape[1:]) for values in (exact, decoded)]
    found["layer_norm"] = (normed[0], normed[1])
    mean, deviation = normed[0].mean(0), normed[0].std(0) + 1e-3
    found["standardised"] = ((normed[0] - mean) / deviation, (normed[1] - mean) / deviation)
    result = {}
    for name, (a, b) in found.items():
        values = np.sort(F.cosine_similarity(a.double(), b.double(), dim=1).numpy())
        first = values[len(values) // 100]
        result[name] = {k: round(float(v), 6) for k, v in (("mean", values.mean()), ("p1", first), ("min", values[0]))}
    return result


def gigabytes_per_second(values: Tensor, run: Callable[[], Any], times: int = 5) -> float:
    """Returns the best rate of `times` calls of `run`, which encodes to or decodes from `values`."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return round(values.numel() * 4 / best / 1e9, 2)


def measure(values: Tensor, codec: str) -> dict[str, Any]:
    """Returns the bytes, cosines and speeds of a codec on (N, T, W) values."""
    parts = [encode(codec, part) for part in values.split(BATCH)]
    few, encoded = values[:BATCH], parts[0]
    return {
        "bytes_per_image": sum(a[0].numel() * a.element_size() for a in encoded.values()),
        **cosines(values, torch.cat([decode(part) for part in parts])),
        "encode_GB_per_second": gigabytes_per_second(few, lambda: encode(codec, few)),
        "decode_GB_per_second": None if codec == "float32" else gigabytes_per_second(few, lambda: decode(encoded)),
    }


def encode_again(features: Features, codec: str, folder: Path) -> None:
    """Writes `features` to `folder` in another codec: same records, shards and thumbnails, without augmented views."""
    identity = features.encoder
    shard_schema = schema(columns(codec, identity["tokens"], identity["width"]), identity["joint"], views=False)
    folder.mkdir(parents=True, exist_ok=True)
    shards, start = [], 0

    def blocks(start: int, stop: int) -> Iterator[Block]:
        for first in range(start, stop, BATCH):
            numbers = np.arange(first, min(first + BATCH, stop))
            some = features.table.slice(first, len(numbers)).select(RECORD_COLUMNS)
            encoded = encode(codec, decode(features.read(numbers)))
            pooled = {} if features.pooled is None else {"pooled": features.pooled[numbers]}
            yield some.to_pydict() | {name: column.numpy() for name, column in encoded.items()} | pooled

    for shard in features.manifest["shards"]:
        path = (folder / shard["file"]).with_suffix(".arrow")
        with atomic_file(path) as file:
            count = write_arrow_shard(file, shard_schema, blocks(start, start + shard["records"]))
        start += count
        shards.append({**described(path), "records": count})
    with atomic_file(folder / REJECTS) as file:
        file.write((features.folder / REJECTS).read_bytes())
    manifest = {key: value for key, value in features.manifest.items() if key not in ("kind", "version")}
    files = [described(folder / REJECTS)]
    changed = {"codec": codec, "format": "arrow", "views": 0, "augmentation": None, "shards": shards, "files": files}
    write_manifest(folder, FEATURES, manifest | changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", help="a features folder, made with --codec float32; or: synthetic")
    parser.add_argument("--images", type=int, default=256, help="how many to measure, spread over the features")
    parser.add_argument("--train", type=Path, help="write a workspace with all the features for each codec in here")
    arguments = parser.parse_args()
    if arguments.features == "synthetic":
        if arguments.train:
            parser.error("--train needs a features folder")
        values, source = synthetic(min(arguments.images, 32)), None
    else:
        source = Features(Path(arguments.features))
        values = decode(source.read(np.unique(np.linspace(0, len(source) - 1, arguments.images).astype(int))))
    result = {
        "features": arguments.features,
        "stored": source.manifest["codec"] if source else "float32",
        "images": len(values),
        "tokens": values.shape[1],
        "width": values.shape[2],
        "largest": round(values.abs().max().item(), 3),
        "threads": torch.get_num_threads(),
        "codecs": {codec: measure(values, codec) for codec in CODECS},
    }
    if arguments.train:
        assert source is not None
        for codec in CODECS:
            folder = arguments.train / codec / "features"
            if not has_manifest(folder):
                encode_again(source, codec, folder)
        result["workspaces"] = [str(arguments.train / codec) for codec in CODECS]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
