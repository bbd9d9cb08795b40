"""A shard as an uncompressed Arrow IPC file, which plain pyarrow memory-maps.

Every column of token features (codecs.py) is an `arrow.fixed_shape_tensor`. Augmented views of a record lie in lists beside it:
`views` holds how each was cut out, `view_tokens` and the like hold their features."""

from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ArtifactError
from ..files import Sink, mapped
from ..schema import LEADING, TRAILING, VIEW, VIEWS, optional_columns
from .codecs import TokenColumns

# Rows in columns: a list, or an array (n, *shape). `views` holds a list of dicts a row; the columns `view_*` are arrays
# (views of all rows, *shape), in the order of the rows.
Block = Mapping[str, Any]


def schema(encoded: TokenColumns, joint: int | None, views: bool, optional: Collection[str] = ()) -> pa.Schema:
    """The columns of a shard: `encoded` are the codec's, `joint` is the width of `pooled`, if there is one; `optional` names
    those that only some datasets have."""
    tensors = {name: pa.fixed_shape_tensor(_arrow_type(dtype), shape) for name, (dtype, shape) in encoded.items()}
    fields = [
        *(column.field for column in LEADING),
        *(pa.field(name, tensor) for name, tensor in tensors.items()),
        *([pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), [joint]))] if joint else []),
        *(column.field for column in (*TRAILING, *optional_columns(optional))),
    ]
    if views:
        fields += [VIEWS.field, *(pa.field(VIEW + name, pa.list_(t)) for name, t in tensors.items())]
    return pa.schema(fields)


def _arrow_type(dtype: Any) -> pa.DataType:
    return pa.from_numpy_dtype(np.dtype(str(dtype).removeprefix("torch.")))


def write_arrow_shard(file: Sink, schema: pa.Schema, blocks: Iterable[Block]) -> int:
    """Write one shard, a record batch a block; returns the number of records."""
    count = 0
    with pa.ipc.new_file(file, schema) as writer:
        for block in blocks:
            arrays = [_array(field, block) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            count += len(block["key"])
    return count


def _array(field: pa.Field, block: Block) -> pa.Array:
    values = block[field.name]
    if isinstance(field.type, pa.FixedShapeTensorType):
        return _tensors(values, field.type)
    if field.name.startswith(VIEW):
        ends = np.cumsum([0, *map(len, block["views"])], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), _tensors(values, field.type.value_type), type=field.type)
    return pa.array(values, field.type)


def _tensors(values: np.ndarray, type_: pa.FixedShapeTensorType) -> pa.ExtensionArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), type_.value_type)
    storage = pa.FixedSizeListArray.from_arrays(flat, type=type_.storage_type)
    return pa.ExtensionArray.from_storage(type_, storage)


class ArrowShard:
    """A shard, memory-mapped: `table`, and where in `memory` (bytes of the file,) uint8 the values of each row begin.

    `offsets`: column -> (n,) int64; of the column VIEW + name where the first of a row's views does. `joint` is the width of
    `pooled`, None without one."""

    def __init__(self, path: Path, encoded: TokenColumns) -> None:
        """ArtifactError if it is no Arrow file with these columns, or a compressed one. OSError if it cannot be opened."""
        buffer = mapped(path)
        self.path = path
        try:
            self.table = pa.ipc.open_file(buffer).read_all()
            self.table.validate()
            self.memory = np.frombuffer(buffer, np.uint8)
            names = self.table.column_names
            pooled = self.table.schema.field("pooled").type if "pooled" in names else None
            self.joint: int | None = pooled and pooled.shape[0]
            expected = schema(encoded, self.joint, any(name.startswith(VIEW) for name in names), names)
            wrong = [field.name for field in expected if self.table.schema.field(field.name).type != field.type]
            columns = [name for name in names if name in encoded or name == "pooled" or name.startswith(VIEW)]
            self.offsets = {} if wrong else {name: self._rows(self.table.column(name)) for name in columns}
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged("it is no Arrow file of features") from error
        if wrong:
            raise self._damaged(f"its column {wrong[0]} is not what the manifest says")
        if any((rows < 0).any() for rows in self.offsets.values()):
            raise ArtifactError(f"{path} is compressed and cannot be memory-mapped; extract again with --overwrite")

    def validate(self) -> None:
        """ArtifactError if offsets in the file lead anywhere else than to the rows' own values. Reads the texts."""
        try:
            self.table.validate(full=True)
            nested = [self.table.column(name) for name in self.table.column_names if name.startswith("view")]
            counts = [pc.list_value_length(column).to_pylist() for column in nested]
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._damaged("its offsets are wrong") from error
        if any(count != counts[0] for count in counts):
            raise self._damaged("its views differ in number")

    def _damaged(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is damaged: {reason}; extract again with --overwrite")

    def _rows(self, column: pa.ChunkedArray) -> np.ndarray:
        """(n,): the byte of the file where the values of each row begin, or -1 if the file does not hold them."""
        nested = isinstance(column.type, pa.ListType)  # views
        tensor = column.type.value_type if nested else column.type
        size = tensor.value_type.byte_width * prod(tensor.shape)
        parts = [np.empty(0, np.int64)]
        for chunk in column.chunks:  # one a record batch
            values = (chunk.values if nested else chunk).storage.flatten().to_numpy()
            start = values.ctypes.data - self.memory.ctypes.data if len(values) else 0
            numbers = chunk.offsets.to_numpy()[:-1] if nested else np.arange(len(chunk))
            inside = 0 <= start <= len(self.memory) - values.nbytes
            parts.append(start + numbers * np.int64(size) if inside else np.full(len(chunk), -1))
        return np.concatenate(parts)
