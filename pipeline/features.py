"""Features on disk: the Arrow contract, its writer and its memory-mapped reader.

A shard is an uncompressed Arrow IPC file that plain pyarrow reads; token features are `arrow.fixed_shape_tensor` [T, W]."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .artifacts import atomic_file, read_manifest, sha256_json
from .errors import ArtifactError

CODECS = {"float16": pa.float16(), "float32": pa.float32()}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """What a shard says of one image. `tokens` (T, W), `pooled` (P,) or None, `thumbnail` a small JPEG."""

    key: str
    split: str
    image: str
    captions: Sequence[str]
    tokens: np.ndarray
    pooled: np.ndarray | None
    thumbnail: bytes
    width: int
    height: int


def schema(tokens: int, width: int, joint: int | None, codec: str) -> pa.Schema:
    """The columns of a shard."""
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("tokens", pa.fixed_shape_tensor(CODECS[codec], [tokens, width])),
        *([pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), [joint]))] if joint else []),
        pa.field("thumbnail", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
    return pa.schema(fields)


def write_shard(path: Path, schema: pa.Schema, batches: Iterable[Sequence[Row]]) -> int:
    """Write one shard, atomically, a record batch per element of `batches`. Returns the number of records."""
    count = 0
    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for rows in batches:
            if rows:
                writer.write_batch(_record_batch(rows, schema))
                count += len(rows)
    return count


def _record_batch(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in rows]
        if isinstance(field.type, pa.FixedShapeTensorType):
            stacked = np.stack(values).astype(field.type.value_type.to_pandas_dtype(), copy=False)
            columns.append(_tensor_array(stacked, field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _tensor_array(values: np.ndarray, type_: pa.FixedShapeTensorType) -> pa.ExtensionArray:
    flat = pa.array(values.reshape(-1), type_.value_type)
    storage = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    return pa.ExtensionArray.from_storage(type_, storage)


class Features:
    """A finished features folder, memory-mapped. Rows are numbered through all shards, in the order of the dataset."""

    def __init__(self, folder: Path) -> None:
        """ArtifactError if the folder is unfinished, or a shard is missing or has another size than the manifest says."""
        self.folder = folder
        self.manifest = read_manifest(folder, "features")
        tables = []
        for shard in self.manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ArtifactError(f"{path} is missing or damaged; extract again with --overwrite")
            with pa.memory_map(str(path)) as source:
                tables.append(pa.ipc.open_file(source).read_all())
        self.table = pa.concat_tables(tables)
        self._tokens = self._chunks("tokens")
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._tokens])

    def _chunks(self, column: str) -> list[np.ndarray]:
        """The column's memory-mapped arrays (n, …), one a record batch."""
        return [chunk.to_numpy_ndarray() for chunk in self.table.column(column).chunks if len(chunk)]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def encoder(self) -> dict[str, Any]:
        """The identity of the encoder that made the features."""
        encoder: dict[str, Any] = self.manifest["encoder"]
        return encoder

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
        return np.concatenate(self._chunks("pooled")) if "pooled" in self.table.column_names else None

    def rows(self, split: str | None = None) -> np.ndarray:
        """The row numbers (n,) of a split, or all."""
        if split is None:
            return np.arange(len(self))
        splits = self.table.column("split").to_numpy(zero_copy_only=False)
        return np.flatnonzero(splits == split)

    def tokens(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Token features (n, T, W) of the given rows, in their order, in the type on disk; into `out` if given."""
        if out is None:
            out = np.empty((len(rows), *self._tokens[0].shape[1:]), self._tokens[0].dtype)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            out[i] = self._tokens[chunk][row - self._starts[chunk]]
        return out
