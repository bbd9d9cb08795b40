"""Parquet tables, one file or the shards of a Hugging Face dataset. Pictures inside them are left where they are.

Read a row group of the text columns at a time, into the columns `ROWS`."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import printable
from .columns import Rows, TableColumns, grouped_records, image_name
from .records import Record, splits_in_names
from .sources import column_cells, open_parquet


def read_parquet(paths: Sequence[Path], options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the files of one table.

    Where no column has the splits, they are `split`, or come from the files' names below their common folder
    (`train-00000-of-00002.parquet`, `train/0000.parquet`)."""
    with _readable(paths[0]):
        first = pq.read_schema(paths[0])
    columns = TableColumns.choose(first.names, options, paths[0])
    leaf = _leaf(first, columns.image, paths[0])
    top = os.path.commonpath([path.absolute().parent for path in paths])
    names = [printable(os.path.relpath(path, top)) for path in paths]
    splits: list[str | None] = [split] * len(paths)
    if split is None and columns.split is None:
        splits = splits_in_names(names)
    found = str(columns)
    if leaf:
        found += f", pictures inside ({leaf})"
    if len(paths) > 1:
        found += f", {len(paths)} files"
    if split is None and splits[0] is not None:
        found += " whose names tell the split" if len(paths) > 1 else ", the file's name tells the split"

    def records() -> Iterator[Record]:
        numbered = enumerate(zip(paths, names, splits, strict=True))
        rows = Rows(batch for number, each in numbered for batch in _batches(number, *each, columns, leaf))
        yield from grouped_records(rows, paths, leaf, options, _digests(rows, paths, leaf) if leaf else None)

    return found, records()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Arrow's errors about a file as a DatasetError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as parquet: {(str(error).splitlines() or [''])[0]}") from error


def _leaf(schema: pa.Schema, column: str, path: Path) -> str:
    """The leaf that holds pictures, or nothing if the column holds their paths. DatasetError if it can hold neither."""
    kind = schema.field(column).type
    if not pa.types.is_nested(kind):
        return column if _is_bytes(kind) else ""
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type, or_null=True):
            return f"{column}.bytes"
        if kind.get_field_index("path") >= 0 and kind.get_field_index("bytes") < 0:
            return ""
    raise DatasetError(
        f"{path}: column {column!r} is {kind}; qf reads pictures as binary or struct<bytes: binary, path: string>, or their "
        "paths; write it so, or name another column with --image-column"
    )


def _is_bytes(kind: pa.DataType, or_null: bool = False) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    views = pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)
    return views or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (or_null and pa.types.is_null(kind))


def _batches(
    number: int, path: Path, name: str, split: str | None, columns: TableColumns, leaf: str
) -> Iterator[pa.RecordBatch]:
    with _readable(path), open_parquet(path) as file:
        schema = file.schema_arrow
        for column in columns.used:
            if column not in schema.names:
                raise DatasetError(
                    f"{path} has no column {column!r}, which the files beside it have; name one table's files"
                )
        kind = schema.field(columns.image).type
        if _leaf(schema, columns.image, path) != leaf:
            raise DatasetError(
                f"{path}: column {columns.image!r} is {kind}, unlike that of the files beside it; name one table's files"
            )
        wanted = [column for column in columns.used if column != columns.image]
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            wanted.append(f"{columns.image}.path")
        elif not leaf:
            wanted.append(columns.image)
        row = 0
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=wanted).to_pylist()
            count = file.metadata.row_group(group).num_rows
            rows = rows or [{} for _ in range(count)]
            inside = _inside(file, group, leaf) if leaf else [False] * count
            more: dict[str, Sequence[Any]] = {
                "image": [
                    image_name(each.get(columns.image)) or (f"{name}:{row + at}" if here else None)
                    for at, (each, here) in enumerate(zip(rows, inside, strict=True))
                ],
                "file": [number if here else None for here in inside],
                "group": [group] * count,
                "at": range(count),
            }
            if columns.split is None:
                more["split"] = [split] * count
            yield columns.batch(rows, path, **more)
            row += count


def _inside(file: pq.ParquetFile, group: int, leaf: str) -> list[bool]:
    """Whether each row of a row group holds a picture. The file's statistics mostly tell; otherwise its pages are read."""
    part = file.metadata.row_group(group)
    at = next((n for n in range(part.num_columns) if part.column(n).path_in_schema == leaf), None)
    if at is None:
        raise pa.ArrowInvalid(f"row group {group} has no column {leaf}")
    statistics = part.column(at).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, part.num_rows):
        return [statistics.null_count == 0] * part.num_rows
    return [bool(data) for data in _pictures(file, group, leaf)]


def _pictures(file: pq.ParquetFile, group: int, leaf: str) -> Iterator[bytes | None]:
    for cells in column_cells(file, leaf, group):
        yield from cells.to_pylist()


def _digests(rows: Rows, paths: Sequence[Path], leaf: str) -> np.ndarray | None:
    """A digest (uint64) of each picture inside whose name repeats, 0 for others; None if no name of such a picture does:
    are they rows of one picture, or pictures of one name? Where all pictures of a name are equal, theirs is 0 too.

    Reads the row groups that hold such names once; about 100 bytes of memory for each such row."""
    order = np.sort(rows.names)
    repeated = np.flatnonzero(np.isin(rows.names, order[1:][order[1:] == order[:-1]]))
    if not len(repeated):
        return None
    digests = np.zeros(len(rows), np.uint64)
    wanted: dict[int, dict[int, dict[int, int]]] = {}  # file: row group: row in it: row of the table
    for start in range(0, len(repeated), 4096):
        part = repeated[start : start + 4096]
        for row, (*_, number, group, at) in zip(part.tolist(), rows.take(part), strict=True):
            if number is not None:
                wanted.setdefault(number, {}).setdefault(group, {})[at] = row
    for number, groups in wanted.items():
        with _readable(paths[number]), open_parquet(paths[number]) as file:
            for group, there in groups.items():
                for at, data in enumerate(_pictures(file, group, leaf)):
                    if at in there:
                        digests[there[at]] = int.from_bytes(hashlib.sha256(data or b"").digest()[:8])
    several = _several(rows.names[repeated], digests[repeated])
    digests[repeated[~several]] = 0
    return digests


def _several(names: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Whether each name is that of more than one digest."""
    pairs = np.unique(np.stack([names, digests]), axis=1)[0]
    return np.isin(names, pairs[1:][pairs[1:] == pairs[:-1]])
