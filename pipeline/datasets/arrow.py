"""Arrow files as Hugging Face `datasets` keeps them (save_to_disk, its cache): IPC streams or files, one or several.

A file is mapped into memory. Pictures inside it stay there: a record has their place. Every batch is validated before it is
used, because Arrow itself trusts the offsets in a file. Memory: ROWS rows of the text columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import TableColumns
from .records import Record
from .shards import Part, Place, ShardFormat, pylist, read_shards
from .sources import FileSlice

MAGIC = b"ARROW1"  # begins an IPC file
STREAM = b"\xff\xff\xff\xff"  # begins an IPC stream
ROWS = 1024  # rows that are Python objects at one time


def read_arrow(paths: Sequence[Path], options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the files of one table; see `read_shards`. DatasetError if qf
    wrote them, as features or as an index."""
    return read_shards(ARROW, paths, options, split)


def is_arrow(start: bytes) -> bool:
    """Whether the first bytes of a file are those of Arrow."""
    return start.startswith((MAGIC, STREAM))


def _picture(path: Path, leaf: str, place: Place) -> FileSlice:
    return FileSlice(str(path), place[1], place[0])


def _schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as file:
        schema = _open(file.read_buffer()).schema
    if {"key", "captions"} <= set(schema.names) and {"tokens", "thumbnail"} & set(schema.names):
        raise DatasetError(f"{path} was written by qf; give the dataset that it was made from")
    return schema


def _open(data: pa.Buffer) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    return (pa.ipc.open_file if data[: len(MAGIC)].to_pybytes() == MAGIC else pa.ipc.open_stream)(data)


def _record_batches(reader: pa.RecordBatchStreamReader | pa.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from reader


def _parts(path: Path, columns: TableColumns, leaf: str) -> Iterator[Part]:
    """The rows of a file. The place of a picture is its size, and the byte where it begins."""
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    texts = [name for name in columns.used if name != columns.image]
    for batch in _record_batches(_open(data)):
        used = batch.select(columns.used)
        used.validate(full=True)
        for at in range(0, len(used), ROWS):
            some = used.slice(at, ROWS)
            rows = pylist(some.select(texts).to_struct_array()) if texts else [{} for _ in range(len(some))]
            image = some.column(columns.image)
            names, cells = image, image if leaf else None
            if pa.types.is_struct(image.type):
                fields = dict(zip((field.name for field in image.type), image.flatten(), strict=True))
                names, cells = fields.get("path"), fields["bytes"] if leaf else None
            if names is not None and names is not cells:
                for row, name in zip(rows, pylist(names), strict=True):
                    row[columns.image] = name
            yield rows, [None] * len(rows) if cells is None else _places(cells, data, path)


def _places(cells: pa.Array, data: pa.Buffer, path: Path) -> list[Place | None]:
    """The size and the first byte in the file of each cell; None for an empty one."""
    if pa.types.is_null(cells.type):
        return [None] * len(cells)
    wide = pa.types.is_large_binary(cells.type)
    if not wide and not pa.types.is_binary(cells.type):
        raise DatasetError(f"{path} holds pictures as {cells.type}; save the dataset with to_parquet instead")
    _, ends, values = cells.buffers()
    if values is None or ends is None:
        return [None] * len(cells)
    begin = values.address - data.address
    if not 0 <= begin <= begin + values.size <= data.size:
        raise DatasetError(f"{path} is compressed; qf reads pictures at their place: save the dataset with to_parquet")
    offsets = np.frombuffer(ends, np.int64 if wide else np.int32, cells.offset + len(cells) + 1)[cells.offset :]
    sizes = np.diff(offsets).tolist()
    return [(size, begin + at) if size else None for size, at in zip(sizes, offsets.tolist(), strict=False)]


ARROW = ShardFormat("Arrow", "save the dataset again", _schema, _parts, _picture)
