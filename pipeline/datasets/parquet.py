"""Parquet tables, one file or the shards of a Hugging Face dataset. Pictures inside them are left where they are.

Memory: at most READ bytes of text columns at a time. A text that many rows share is read once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import TableColumns
from .records import Record
from .shards import Part, Place, ShardFormat, pylist, read_shards
from .sources import ParquetCell, chunks_of, column_cells, open_parquet

READ = 32 * 2**20  # bytes of text columns, unpacked, that are read at once
ROWS = 8192  # rows that are Python objects at one time
MAX_TEXTS = 16 * 2**20  # bytes a row in the text columns, unpacked, on average


def read_parquet(paths: Sequence[Path], options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the files of one table; see `read_shards`."""
    return read_shards(PARQUET, paths, options, split)


def _picture(path: Path, leaf: str, place: Place) -> ParquetCell:
    return ParquetCell(str(path), leaf, *place)


def _parts(path: Path, columns: TableColumns, leaf: str) -> Iterator[Part]:
    """The rows of a file. The place of a picture is its row group, and its row there."""
    with open_parquet(path) as file:
        kind = file.schema_arrow.field(columns.image).type
        wanted = [column for column in columns.used if column != columns.image]
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            wanted.append(f"{columns.image}.path")
        elif not leaf:
            wanted.append(columns.image)
        leaves = [file.schema.column(n) for n in range(len(file.schema))]
        used = [part for part in leaves if f"{part.path}.".startswith(tuple(f"{name}." for name in wanted))]
        texts = [part.path for part in used if part.physical_type == "BYTE_ARRAY"]
        with open_parquet(path, texts) as shared:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                inside = _inside(file, group, leaf) if leaf else [False] * count
                at = 0
                for rows in _rows(shared, path, group, wanted):
                    there = inside[at : at + len(rows)]
                    yield rows, [(group, at + n) if here else None for n, here in enumerate(there)]
                    at += len(rows)


def _rows(file: pq.ParquetFile, path: Path, group: int, wanted: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a row group as objects with the columns `wanted`, some at a time."""
    count = file.metadata.row_group(group).num_rows
    if not count or not wanted:
        yield [{} for _ in range(count)]
        return
    starts = tuple(f"{name}." for name in wanted)
    used = [chunk for chunk in chunks_of(file, group) if f"{chunk.path_in_schema}.".startswith(starts)]
    each = sum(chunk.total_uncompressed_size for chunk in used) // count
    if each > MAX_TEXTS:
        names = ", ".join(wanted)
        raise DatasetError(f"{path}: row group {group} holds {each:,} bytes a row in {names}; these are no captions")
    size = max(1, min(ROWS, READ // max(1, each)))
    for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
        yield pylist(batch.to_struct_array())


def _inside(file: pq.ParquetFile, group: int, leaf: str) -> list[bool]:
    """Whether each row of a row group holds a picture. The file's statistics mostly tell; otherwise its pages are read."""
    count = file.metadata.row_group(group).num_rows
    chunk = next((chunk for chunk in chunks_of(file, group) if chunk.path_in_schema == leaf), None)
    if chunk is None:
        raise pa.ArrowInvalid(f"row group {group} has no column {leaf}")
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, count):
        return [statistics.null_count == 0] * count
    return [bool(data) for cells in column_cells(file, leaf, group) for data in cells.to_pylist()]


PARQUET = ShardFormat("parquet", "get it again", pq.read_schema, _parts, _picture)
