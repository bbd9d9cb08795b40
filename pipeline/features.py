"""Features on disk: one reader for the shards of either format, memory-mapped.

Token features lie in the columns of their codec (codecs.py); the reader gives them as they are on disk."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from .arrow_shards import ArrowShard
from .artifacts import read_manifest, sha256_json
from .codecs import Columns, Encoded, columns
from .errors import ArtifactError
from .tar_shards import TarShard

SPLITS = ("train", "val", "test")
ABOUT = ("key", "split", "image", "captions", "thumbnail", "width", "height")


class Shard(Protocol):
    """A shard that has been opened."""

    table: pa.Table  # ABOUT, and `views` where there are some; maybe more

    def record(self, column: str, row: int, view: int) -> np.ndarray:
        """A column of the codec for one row: of the plain picture (view 0), or of one of its views."""
        ...

    def pooled(self) -> np.ndarray:
        """(n, P) float32."""
        ...


READERS: dict[str, Callable[[Path, Columns], Shard]] = {".arrow": ArrowShard, ".tar": TarShard}  # by the file's suffix


class Features:
    """A finished features folder, memory-mapped. Rows are numbered through all shards, in the order of the dataset."""

    def __init__(self, folder: Path) -> None:
        """ArtifactError if the folder is unfinished, or a shard is missing or has another size than the manifest says."""
        self.folder = folder
        self.manifest = read_manifest(folder, "features")
        self._columns = columns(self.manifest["codec"], self.encoder["tokens"], self.encoder["width"])
        self._shards: list[Shard] = []
        if not self.manifest["shards"]:
            raise ArtifactError(f"{folder} holds no images; extract again with --overwrite")
        for shard in self.manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ArtifactError(f"{path} is missing or damaged; extract again with --overwrite")
            self._shards.append(READERS[path.suffix](path, self._columns))
        about = [*ABOUT, "views"] if self.views else ABOUT
        self.table = pa.concat_tables([shard.table.select(about) for shard in self._shards])
        self._starts = np.cumsum([0, *(len(shard.table) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def encoder(self) -> dict[str, Any]:
        """The identity of the encoder that made the features."""
        encoder: dict[str, Any] = self.manifest["encoder"]
        return encoder

    @property
    def views(self) -> int:
        """How many augmented views each training image has, besides the plain picture."""
        views: int = self.manifest["views"]
        return views

    @property
    def identity(self) -> str:
        """One hash that tells these features from any other."""
        return sha256_json({key: self.manifest[key] for key in ("encoder", "codec", "shards")})

    @cached_property
    def keys(self) -> list[str]:
        return self.table.column("key").to_pylist()

    @cached_property
    def captions(self) -> list[list[str]]:
        return self.table.column("captions").to_pylist()

    @cached_property
    def pooled(self) -> np.ndarray | None:
        """(N, P) float32, unit length, or None if the encoder has no joint space."""
        return np.concatenate([shard.pooled() for shard in self._shards]) if self.encoder["joint"] else None

    def rows(self, split: str | None = None) -> np.ndarray:
        """The row numbers (n,) of a split, or all."""
        if split is None:
            return np.arange(len(self))
        splits = self.table.column("split").to_numpy(zero_copy_only=False)
        return np.flatnonzero(splits == split)

    def encoded(self, rows: np.ndarray, views: np.ndarray | None = None) -> Encoded:
        """The codec's columns of the given rows, in their order, as on disk; `codecs.decode` makes (n, T, W) of them.

        `views` (n,) picks an augmented view, 1 to `self.views`, of training images; 0 is the plain picture."""
        out = {name: torch.empty((len(rows), *shape), dtype=dtype) for name, (dtype, shape) in self._columns.items()}
        arrays = [(name, tensor.numpy()) for name, tensor in out.items()]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            view = 0 if views is None else int(views[i])
            for name, array in arrays:
                array[i] = self._shards[number].record(name, int(row - self._starts[number]), view)
        return out
