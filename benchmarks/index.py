"""How many bytes does an index need, and what does that cost in recall?

    OMP_NUM_THREADS=1 python benchmarks/index.py WORKSPACE               # the run's embeddings of its features
    OMP_NUM_THREADS=1 python benchmarks/index.py --images 20000          # random images, of whose 32 queries 12 ever win

For each type of number, with all query slots and with those that ever win: bytes as a share of float32's, recall@10 against the exact
ranking, and milliseconds of a search for the 10 best images by FAISS. Captions of every second image choose the slots, those of the
others are the queries. Prints one JSON object."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from qf.pipeline.config import ComputeOptions
from qf.pipeline.features.reader import Features
from qf.pipeline.workspace import Workspace
from qf.retrieval.encode.qformer import Run
from qf.retrieval.index.compact import MOST_TEXTS, TOP, Form, best_images, recall_of, winning_slots
from qf.retrieval.index.vectors import BYTES, make_vectors
from qf.retrieval.search import Part, best_distinct

SLOTS, ALIVE, WIDTH, EACH = 32, 12, 256, 2  # of random images: queries, those that win, numbers of a query, captions


def of_workspace(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the images (N, Q, E), the texts (M, E) and the image (M,) of each text of a workspace's latest run."""
    workspace = Workspace(folder)
    features = Features(workspace.features)
    latest = workspace.latest_run()
    if latest is None:
        raise SystemExit(f"{folder} has no finished run of stage 1; train one first")
    run = Run(latest, torch.device("cpu"), ComputeOptions().precision)
    owners = np.repeat(np.arange(len(features)), [len(captions) for captions in features.captions])
    return np.concatenate(list(run.images(features))), run.captions(features), owners


def at_random(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random images whose texts lie near one of the first ALIVE queries of an image; the other queries are all alike."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((images, SLOTS, WIDTH), np.float32)
    vectors[:, ALIVE:] = draw.standard_normal(WIDTH, np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    owners = np.repeat(np.arange(images), EACH)
    near = vectors[owners, draw.integers(ALIVE, size=len(owners))]
    texts = near + 1.5 / WIDTH**0.5 * draw.standard_normal(near.shape, np.float32)
    return vectors, texts / np.linalg.norm(texts, axis=1, keepdims=True), owners


def measured(images: np.ndarray, held_out: np.ndarray, wanted: np.ndarray, form: Form) -> dict[str, Any]:
    """Returns the figures of one form."""
    kept = images[:, list(form.slots)]
    index = make_vectors(kept.reshape(-1, kept.shape[-1]), form.type)
    decoded = index.reconstruct_n(0, index.ntotal).reshape(kept.shape)
    times = []
    for text in held_out[:50]:
        began = time.perf_counter()
        best_distinct([Part(index, text[None], len(form.slots))], TOP)
        times.append(time.perf_counter() - began)
    return {
        "type": form.type,
        "slots": len(form.slots),
        "share_of_bytes": round(form.bytes / (4 * images.shape[1]), 4),
        "recall@10": round(recall_of(best_images(decoded, held_out), wanted), 4),
        "milliseconds": round(1000 * float(np.median(times)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path, nargs="?")
    parser.add_argument("--images", type=int, help="random images instead of a workspace")
    arguments = parser.parse_args()
    if (arguments.workspace is None) == (arguments.images is None):
        parser.error("give a workspace or --images")
    images, texts, owners = of_workspace(arguments.workspace) if arguments.workspace else at_random(arguments.images)
    chooses = owners % 2 == 0
    kept = winning_slots(images, texts[chooses], owners[chooses])
    held_out = texts[~chooses][:MOST_TEXTS]
    wanted = best_images(images, held_out)
    every = Form("flat", tuple(range(images.shape[1])), None, "")
    forms = [replace(every, type=type, slots=slots) for slots in (every.slots, kept) for type in BYTES]
    result = {
        **machine(torch.device("cpu")),
        "images": len(images),
        "slots": images.shape[1],
        "width": images.shape[2],
        "winning_slots": len(kept),
        "queries": len(held_out),
        "forms": [measured(images, held_out, wanted, form) for form in forms],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
