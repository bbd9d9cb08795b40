"""Features on disk: the Arrow contract, its writer and its memory-mapped reader.

A shard is an uncompressed Arrow IPC file that plain pyarrow reads. Token features lie in the columns of their codec (codecs.py),
each an `arrow.fixed_shape_tensor`; the writer takes and the reader gives them as they are on disk."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .artifacts import atomic_file, read_manifest, sha256_json
from .codecs import Encoded, columns
from .errors import ArtifactError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """What a shard says of one image. `encoded`: the codec's columns; `pooled` (P,) or None; `thumbnail` a small JPEG."""

    key: str
    split: str
    image: str
    captions: Sequence[str]
    encoded: Mapping[str, np.ndarray]
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
        *(
            pa.field(name, pa.fixed_shape_tensor(_arrow_type(dtype), shape))
            for name, (dtype, shape) in columns(codec, tokens, width).items()
        ),
        *([pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), [joint]))] if joint else []),
        pa.field("thumbnail", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
    return pa.schema(fields)


def _arrow_type(dtype: torch.dtype) -> pa.DataType:
    return pa.from_numpy_dtype(torch.empty(0, dtype=dtype).numpy().dtype)


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
    arrays = []
    contents = [{**vars(row), **row.encoded} for row in rows]
    for field in schema:
        values = [content[field.name] for content in contents]
        tensor = isinstance(field.type, pa.FixedShapeTensorType)
        arrays.append(_tensor_array(np.stack(values), field.type) if tensor else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


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
        sizes = self.manifest["encoder"]["tokens"], self.manifest["encoder"]["width"]
        self._encoded = {name: self._chunks(name) for name in columns(self.manifest["codec"], *sizes)}
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._encoded["tokens"]])

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

    def encoded(self, rows: np.ndarray) -> Encoded:
        """The codec's columns of the given rows, in their order, as on disk; `codecs.decode` makes (n, T, W) of them."""
        out = {
            name: np.empty((len(rows), *chunks[0].shape[1:]), chunks[0].dtype) for name, chunks in self._encoded.items()
        }
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            for name, chunks in self._encoded.items():
                out[name][i] = chunks[number][row - self._starts[number]]
        return {name: torch.from_numpy(values) for name, values in out.items()}
