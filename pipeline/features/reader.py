"""Features on disk: one reader for the shards of either format, memory-mapped.

Token features lie in the columns of their codec (codecs.py); the reader gives them as they are on disk."""

from collections.abc import Callable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..artifacts import check_files, difference, read_manifest, remember
from ..errors import ArtifactError
from ..schema import OPTIONAL_COLUMNS, RECORD_COLUMNS, VIEW, Conversation, Question
from .arrow_shards import ArrowShard
from .codecs import Encoded, TokenColumns, columns
from .manifest import FEATURES, identity_of
from .tar_shards import TarShard


class Shard(Protocol):
    """A shard that has been opened."""

    table: pa.Table  # RECORD_COLUMNS, OPTIONAL_COLUMNS and `views` where there are some; maybe more
    memory: np.ndarray  # (bytes of the file,) uint8, memory-mapped
    offsets: dict[str, np.ndarray]  # column -> (n,) int64: where in `memory` a row's values begin, or its views' (VIEW)
    joint: int | None  # width of `pooled`, if there is one

    def validate(self) -> None:
        """ArtifactError if the shard is damaged in a way that opening it does not show."""


AGAIN = "extract again with --overwrite"
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # memory for a shape and a type
READERS: dict[str, Callable[[Path, TokenColumns], Shard]] = {
    ".arrow": ArrowShard,
    ".tar": TarShard,
}  # by the file's suffix


def empty_array(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """NumPy's memory, in huge pages where the kernel has them: filled three times as fast as PyTorch's, page by page."""
    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Features:
    """A finished features folder, memory-mapped. Rows are numbered through all shards, in the order of the dataset."""

    def __init__(self, folder: Path) -> None:
        """ArtifactError if the folder is unfinished, or if a shard is missing, has changed or is not as the manifest says."""
        self.folder = folder
        self.manifest = read_manifest(folder, FEATURES)
        self.columns = columns(self.manifest["codec"], self.encoder["tokens"], self.encoder["width"])
        self._shards: list[Shard] = []
        if not self.manifest["shards"]:
            raise ArtifactError(f"{folder} holds no images; extract again with --overwrite")
        unknown = check_files(folder, self.manifest["shards"], AGAIN)
        for entry in self.manifest["shards"]:
            path = folder / entry["file"]
            shard = READERS[path.suffix](path, self.columns)
            if path.name in unknown:
                shard.validate()
            self._check(path, shard, entry["records"])
            self._shards.append(shard)
        if unknown:
            remember(folder, self.manifest["shards"])
        about = [*RECORD_COLUMNS, *self.optional, *(["views"] if self.views else [])]
        self.table = pa.concat_tables([shard.table.select(about) for shard in self._shards])
        self._starts = np.cumsum([0, *(len(shard.table) for shard in self._shards)])
        names = [*self.columns, *["pooled"] * bool(self.encoder["joint"])]
        names += [VIEW + name for name in self.columns if self.views]
        self._offsets = {name: np.concatenate([shard.offsets[name] for shard in self._shards]) for name in names}

    def _check(self, path: Path, shard: Shard, records: int) -> None:
        """ArtifactError if the shard has other rows than the manifest says."""
        found: dict[str, Any] = {"records": len(shard.table), "width of pooled": shard.joint}
        wanted: dict[str, Any] = {"records": records, "width of pooled": self.encoder["joint"]}
        if "views" in shard.table.column_names:
            trained = shard.table.filter(pc.equal(shard.table.column("split"), "train")).column("views")
            viewed = pc.equal(pc.list_value_length(trained), self.views)
            found["training images with all views"] = pc.sum(viewed).as_py() or 0
            wanted["training images with all views"] = len(trained)
        elif self.views:
            found["views"], wanted["views"] = 0, self.views
        for name in OPTIONAL_COLUMNS:
            found[f"column {name}"] = name in shard.table.column_names
            wanted[f"column {name}"] = name in self.manifest
        if changed := difference(wanted, found):
            raise ArtifactError(f"{path} is not as the manifest says: {changed}; {AGAIN}")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def encoder(self) -> dict[str, Any]:
        """The identity of the encoder that made the features."""
        encoder: dict[str, Any] = self.manifest["encoder"]
        return encoder

    @property
    def views(self) -> int:
        """The number of augmented views of each training image, without the plain picture."""
        views: int = self.manifest["views"]
        return views

    @property
    def optional(self) -> list[str]:
        """The columns that only some datasets have, and this one has."""
        return [name for name in OPTIONAL_COLUMNS if name in self.manifest]

    @property
    def identity(self) -> str:
        """A hash that differs for other features. The place of their encoder does not change it."""
        return identity_of(self.manifest)

    @cached_property
    def keys(self) -> list[str]:
        return self.table.column("key").to_pylist()

    @cached_property
    def captions(self) -> list[list[str]]:
        return self.table.column("captions").to_pylist()

    @cached_property
    def questions(self) -> list[list[Question]]:
        """The questions of each row, with their answers."""
        return [[Question.from_row(one) for one in row] for row in self._optional("questions")]

    @cached_property
    def conversations(self) -> list[list[Conversation]]:
        """The conversations of each row: turns, the person's first, then alternating."""
        return [[tuple(turns) for turns in row] for row in self._optional("conversations")]

    def _optional(self, name: str) -> list[list[Any]]:
        return self.table.column(name).to_pylist() if name in self.optional else [[] for _ in range(len(self))]

    @cached_property
    def pooled(self) -> np.ndarray | None:
        """(N, P) float32, unit length, or None if the encoder has no joint space."""
        if not self.encoder["joint"]:
            return None
        pooled = np.empty((len(self), self.encoder["joint"]), np.float32)
        self._copy(self.shard_numbers(np.arange(len(self))), self._offsets["pooled"], pooled)
        return pooled

    def rows(
        self, split: str | None = None, captioned: bool = False, asked: bool = False, conversing: bool = False
    ) -> np.ndarray:
        """The row numbers (n,) of a split, or all; with `captioned` only those of images that have a caption, with `asked` a
        question, with `conversing` a conversation."""
        wanted = np.ones(len(self), bool)
        if split is not None:
            wanted &= self.table.column("split").to_numpy(zero_copy_only=False) == split
        for name, needed in (("captions", captioned), ("questions", asked), ("conversations", conversing)):
            if needed and name in self.table.column_names:
                wanted &= pc.list_value_length(self.table.column(name)).to_numpy() > 0
            elif needed:
                wanted[:] = False
        return np.flatnonzero(wanted)

    def rows_of_shard(self, number: int) -> range:
        """The row numbers of a shard."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def shard_numbers(self, rows: np.ndarray) -> np.ndarray:
        """(n,): which shard holds each of the rows."""
        numbers: np.ndarray = np.searchsorted(self._starts, rows, side="right") - 1
        return numbers

    def read(self, rows: np.ndarray, views: np.ndarray | None = None, empty: Empty = empty_array) -> Encoded:
        """The codec's columns of the given rows, in their order, as on disk; `codecs.decode` makes (n, T, W) of them.

        `views` (n,) picks an augmented view, 1 to `self.views`, of training images; 0 is the plain picture. `empty` gives
        the memory that they are copied to."""
        numbers = self.shard_numbers(rows)
        views = np.zeros_like(rows) if views is None else views
        seen = np.flatnonzero(views)
        out = {}
        for name, (dtype, shape) in self.columns.items():
            out[name] = empty((len(rows), *shape), dtype)
            offsets = self._offsets[name][rows]
            if len(seen):
                size = dtype.itemsize * prod(shape)
                offsets[seen] = self._offsets[VIEW + name][rows[seen]] + (views[seen] - 1) * size
            self._copy(numbers, offsets, out[name].numpy())
        return out

    def _copy(self, numbers: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` (n, …): row i is read at `offsets[i]` of shard `numbers[i]`. Adjacent rows are copied together."""
        if not out.size:
            return
        flat = out.reshape(-1).view(np.uint8)
        size = flat.size // len(out)
        follows = (np.diff(offsets) == size) & (np.diff(numbers) == 0)
        firsts = np.flatnonzero(np.concatenate([[True], ~follows]))
        starts = firsts * size
        ends = [*starts[1:].tolist(), flat.size]
        for start, end, number, at in zip(
            starts.tolist(), ends, numbers[firsts].tolist(), offsets[firsts].tolist(), strict=True
        ):
            flat[start:end] = self._shards[number].memory[at : at + end - start]
