"""Features and a run to an index."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.features.reader import Features
from ..encode.qformer import Run, check_features
from .store import make_index, origin, save_index


def build_index(run: Run, features: Features, folder: Path) -> dict[str, Any]:
    """Index all images and captions of the features under the run's model, in `folder`; a summary (fields of contract 2)."""
    started = time.perf_counter()
    check_features(run, features)
    config = run.embedder.model.config
    images = np.empty((len(features), config.num_query_tokens, config.embed_dim), np.float32)
    done = 0
    for batch in run.embedder.image_batches(features, features.rows()):  # a device may not have room for all
        images[done : done + len(batch)] = batch.cpu().numpy()
        done += len(batch)
    texts = run.embedder.texts([caption for captions in features.captions for caption in captions]).cpu().numpy()
    index = make_index(features, images, texts, origin(folder, run.folder, run.manifest["sha256"], features))
    manifest = save_index(index, folder)
    return {
        **{name: manifest[name] for name in ("images", "vectors", "texts", "type", "bytes")},
        "seconds": round(time.perf_counter() - started, 3),
        "index": str(folder),
    }
