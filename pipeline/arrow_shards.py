"""A shard as an uncompressed Arrow IPC file, which plain pyarrow memory-maps.

Every column of token features (codecs.py) is an `arrow.fixed_shape_tensor`. Augmented views of a record, where there are some,
lie in lists beside it: `views` says how each was cut out, `view_tokens` and the like hold what the encoder made of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .artifacts import Sink
from .codecs import Columns
from .errors import ArtifactError

# Rows in columns: a list, or an array (n, *shape). `views` holds a list of dicts a row; the columns `view_*` are arrays
# (views of all rows, *shape), in the order of the rows.
Block = Mapping[str, Any]

VIEW = "view_"  # what the column of a codec is called for views
VIEWS = pa.list_(
    pa.struct(
        [
            *((name, pa.int32()) for name in ("left", "top", "right", "bottom")),  # pixels of the upright original
            ("flip", pa.bool_()),
        ]
    )
)


def schema(encoded: Columns, joint: int | None, views: bool) -> pa.Schema:
    """The columns of a shard: `encoded` are the codec's, `joint` is the width of `pooled`, if there is one."""
    tensors = {name: pa.fixed_shape_tensor(_arrow_type(dtype), shape) for name, (dtype, shape) in encoded.items()}
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        *(pa.field(name, tensor) for name, tensor in tensors.items()),
        *([pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), [joint]))] if joint else []),
        pa.field("thumbnail", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
    if views:
        fields += [pa.field("views", VIEWS), *(pa.field(VIEW + name, pa.list_(t)) for name, t in tensors.items())]
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
    """A shard, memory-mapped."""

    def __init__(self, path: Path, encoded: Columns) -> None:
        """ArtifactError if it is no Arrow file."""
        try:
            with pa.memory_map(str(path)) as source:
                self.table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{path} is damaged; extract again with --overwrite") from error
        self._tokens = {name: self._chunks(name) for name in encoded}
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._tokens["tokens"])])
        self._views: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        if "views" in self.table.column_names:
            self._views = {name: self._view_chunks(VIEW + name) for name in encoded}

    def _chunks(self, column: str) -> list[np.ndarray]:
        """Memory-mapped arrays (n, …), one a record batch."""
        return [chunk.to_numpy_ndarray() for chunk in self.table.column(column).chunks if len(chunk)]

    def _view_chunks(self, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where each row's views begin (n + 1,), and all views (v, …), one pair a record batch."""
        chunks = [chunk for chunk in self.table.column(column).chunks if len(chunk)]
        return [(chunk.offsets.to_numpy(), _ndarray(chunk.values)) for chunk in chunks]

    def pooled(self) -> np.ndarray:
        """(n, P) float32."""
        return np.concatenate(self._chunks("pooled"))

    def record(self, column: str, row: int, view: int) -> np.ndarray:
        """A column of the codec for one row: of the plain picture (view 0), or of one of its views."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        within = row - self._starts[number]
        if view == 0:
            found: np.ndarray = self._tokens[column][number][within]
            return found
        starts, views = self._views[column][number]
        found = views[starts[within] + view - 1]
        return found


def _ndarray(values: pa.ExtensionArray) -> np.ndarray:
    shape = tuple(values.type.shape)
    if not len(values):
        return np.empty((0, *shape), values.type.value_type.to_pandas_dtype())
    array: np.ndarray = values.to_numpy_ndarray()
    return array
