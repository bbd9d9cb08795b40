"""How fast is the training loader? Compares it with NumPy on the same memory-mapped rows in the same order.

    python benchmarks/loader.py [--tokens 257 --width 1024] [--images 1024] [--batch-size 128] [--codec float16] [--format arrow]

Writes random features with five captions an image to a temporary folder. Each reader then reads one epoch, in turns, in one
process. The first turn is not counted: it brings the files into the page cache. Readers:

    numpy    copies rows one by one from the memory-mapped arrays to a new array a batch
    numpy+   the same, but all batches reuse one array, which a loader that returns its batches cannot do
    encoded  Features.read into the loader's memory, in the calling thread
    batch    Batches.batch, which adds captions, padding and masks, in the calling thread
    steps    Batches.between, which prefetches these batches in a thread for training; a training step takes no time here

Prints one JSON object: GB/s of feature bytes (median of the turns), and median ratios to numpy and numpy+ within a turn."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from qf.pipeline.artifacts import described, remember, write_manifest
from qf.pipeline.features.arrow_shards import Block, schema, write_arrow_shard
from qf.pipeline.features.codecs import CODECS, columns, encode
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.features.reader import Features
from qf.pipeline.features.tar_shards import TarShard, write_tar_shard
from qf.pipeline.files import Sink
from qf.trainer.loader.batches import Batches
from qf.trainer.tokens import Tokens

BLOCK = 64  # rows in a record batch, as extraction writes them
WORDS = ["a", "the", "two", "dog", "cat", "man", "woman", "runs", "sits", "on", "in", "under", "red", "blue", "grass"]


def make_features(
    folder: Path, images: int, shard_size: int, tokens: int, width: int, codec: str, format: str
) -> Features:
    """Writes random features with five captions an image to `folder` and opens them."""
    layout = columns(codec, tokens, width)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    shards = []
    for number, start in enumerate(range(0, images, shard_size)):
        stop = min(start + shard_size, images)

        def blocks(start: int = start, stop: int = stop) -> Any:
            for first in range(start, stop, BLOCK):
                rows = range(first, min(first + BLOCK, stop))
                captions = [[" ".join(rng.choice(WORDS, rng.integers(6, 16))) for _ in range(5)] for _ in rows]
                block: Block = {
                    "key": [str(row) for row in rows],
                    "split": ["train"] * len(rows),
                    "image": [""] * len(rows),
                    "captions": captions,
                    "thumbnail": [bytes(3000)] * len(rows),
                    "width": [1] * len(rows),
                    "height": [1] * len(rows),
                    **{n: c.numpy() for n, c in encode(codec, torch.randn(len(rows), tokens, width)).items()},
                }
                yield block

        path = folder / f"shard-{number:05d}.{'arrow' if format == 'arrow' else 'tar'}"
        with open(path, "wb") as file:
            sink: Sink = file  # type: ignore[assignment]
            arrow = schema(layout, None, False)
            count = write_arrow_shard(sink, arrow, blocks()) if format == "arrow" else write_tar_shard(sink, blocks())
        shards.append({**described(path), "records": count})
    remember(folder, shards)
    random = {"id": "random", "sha256": "0" * 64, "layer": -1, "precision": "float32", "preprocessing": {}}
    content = {
        "encoder": {**random, "tokens": tokens, "width": width, "joint": None},
        "codec": codec,
        "format": format,
        "views": 0,
        "augmentation": None,
        "source": {"path": "random", "kind": "random", "records": images, "sha256": "0" * 64},
        "shard_size": shard_size,
        "records": images,
        "captions": 5 * images,
        "splits": {"train": images, "val": 0, "test": 0},
        "rejected": 0,
        "shards": shards,
        "files": [],
    }
    write_manifest(folder, FEATURES, content)
    return Features(folder)


def mapped(features: Features) -> list[list[np.ndarray]]:
    """Returns one list for each column of the codec: the memory-mapped array of each row, in Arrow or tar shards."""
    paths = [features.folder / shard["file"] for shard in features.manifest["shards"]]
    if paths[0].suffix == ".arrow":
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        chunks = {name: [chunk for table in tables for chunk in table.column(name).chunks] for name in features.columns}
        return [[row for chunk in found for row in chunk.to_numpy_ndarray()] for found in chunks.values()]
    shards = [TarShard(path, features.columns) for path in paths]
    return [
        [
            np.ndarray(shape, str(dtype).removeprefix("torch."), shard.memory.data, at)
            for shard in shards
            for at in shard.offsets[name].tolist()
        ]
        for name, (dtype, shape) in features.columns.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--codec", default="float16", choices=CODECS)
    parser.add_argument("--format", default="arrow", choices=("arrow", "webdataset"))
    parser.add_argument("--turns", type=int, default=15)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        features = make_features(Path(temporary), a.images, a.shard_size, a.tokens, a.width, a.codec, a.format)
        vocabulary = Tokens.train([c for captions in features.captions[:200] for c in captions], 500)
        batches = Batches(
            features, features.rows(), vocabulary, batch_size=a.batch_size, captions_per_image=0, matched_captions=1,
            max_text_length=32, seed=0,
        )  # fmt: skip
        count, order = batches.per_epoch, batches.sampler.order(0)
        chosen = [np.sort(order[n * batches.batch_size :][: batches.batch_size]) for n in range(count)]
        nothing = np.zeros(batches.batch_size, np.int64)
        arrays = mapped(features)

        def new() -> list[np.ndarray]:
            return [np.empty((batches.batch_size, *rows[0].shape), rows[0].dtype) for rows in arrays]

        kept = new()

        def by_numpy(out: Callable[[], list[np.ndarray]]) -> None:
            for some in chosen:
                for rows, values in zip(arrays, out(), strict=True):
                    for n, row in enumerate(some.tolist()):
                        values[n] = rows[row]

        readers: dict[str, Callable[[], object]] = {
            "numpy": lambda: by_numpy(new),
            "numpy+": lambda: by_numpy(lambda: kept),
            "encoded": lambda: [None for some in chosen if not features.read(some, nothing, batches.empty)],
            "batch": lambda: [None for n in range(count) if not batches.batch(n)],
            "steps": lambda: [None for batch in batches.between(0, count) if not batch],
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(a.turns + 1):
            for name, read in readers.items():
                began = time.perf_counter()
                read()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
        weight = count * sum(array.nbytes for array in kept)
    rates = {name: weight / np.array(taken) / 1e9 for name, taken in seconds.items()}
    print(
        json.dumps(
            {
                **vars(a),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
                "gigabytes": round(weight / 1e9, 3),
                "gigabytes_per_second": {name: round(float(np.median(rate)), 2) for name, rate in rates.items()},
                **{
                    f"of_{by}": {
                        n: round(float(np.median(rates[n] / rates[by])), 3) for n in ("encoded", "batch", "steps")
                    }
                    for by in ("numpy", "numpy+")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
