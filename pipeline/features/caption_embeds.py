"""Text embeddings of the captions of a features folder, cached beside its shards: one file a shard and text model.

A file holds `embeds` (n, P) float16 for the n captions of its shard, in their order, with its own checksum. It is derived:
whoever needs embeddings that are missing makes them (`extract/captions.py`)."""

from pathlib import Path

import numpy as np
import torch

from ..errors import ArtifactError
from ..tensor_files import check_tensors, open_tensors, read_info, save_tensors
from .manifest import TEXTS
from .reader import Features


def embeds_path(features: Features, shard: int, model: str) -> Path:
    """The file with the embeddings of a shard's captions; `model` is the SHA-256 of the text model."""
    return features.folder / f"{TEXTS}{model[:12]}-{shard:05d}.safetensors"


def _origin(features: Features, shard: int, model: str) -> dict[str, str]:
    """The shard and the text model, by their checksums: the JSON value in a file."""
    return {"shard": features.manifest["shards"][shard]["sha256"], "model": model}


def save_embeds(features: Features, shard: int, model: str, embeds: np.ndarray) -> None:
    """Write the embeddings (n, P) of a shard's captions, as float16."""
    tensors = {"embeds": torch.from_numpy(embeds.astype(np.float16))}
    save_tensors(embeds_path(features, shard, model), tensors, _origin(features, shard, model))


def has_embeds(features: Features, shard: int, model: str) -> bool:
    """Whether the embeddings of a shard are there and sound. Reads the whole file."""
    path = embeds_path(features, shard, model)
    try:
        check_tensors(path)
        return read_info(path) == _origin(features, shard, model)
    except (FileNotFoundError, ArtifactError):
        return False


class CaptionEmbeds:
    """The embeddings of all captions under one text model, memory-mapped. Captions are numbered image by image."""

    def __init__(self, features: Features, model: str) -> None:
        """`model` is the SHA-256 of the text model; `has_embeds` must hold for every shard."""
        parts = [_mapped(embeds_path(features, n, model)) for n in range(len(features.manifest["shards"]))]
        self._parts, self.width = parts, parts[0].shape[1]
        self._starts = np.cumsum([0, *map(len, parts)])
        counts = [len(captions) for captions in features.captions]
        self.firsts = np.cumsum([0, *counts])  # the number of each row's first caption

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of captions (m,) -> (m, P) float32, unit length."""
        out = np.empty((len(numbers), self.width), np.float32)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            out[here] = self._parts[shard][numbers[here] - self._starts[shard]]
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def _mapped(path: Path) -> np.ndarray:
    with open_tensors(path) as file:
        shape = tuple(file.get_slice("embeds").get_shape())
    with open(path, "rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if 0 in shape:  # a shard without captions
        return np.empty(shape, np.float16)
    return np.memmap(path, np.float16, "r", 8 + header, shape)
