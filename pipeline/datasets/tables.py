"""Tables to records: CSV, TSV, JSON lines, JSON arrays of objects, Parquet; one file, or several of one dataset."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import Rows, TableColumns, grouped_records
from .parquet import read_parquet
from .records import Record, splits_in_names
from .rows import csv_rows, json_lines

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
CHUNK = 8192  # rows that are Python objects at one time


@dataclass(frozen=True)
class Table:
    """A file of rows. `open` gives the names in its header, or None, and its rows as objects. `split` is that of rows
    which name none."""

    path: Path
    open: Callable[[], tuple[list[str] | None, Iterator[Any]]]
    split: str | None = None


def read_table(path: Path, options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records. `split` is their split where no column has one."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return read_parquet([path], options, split)
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    return read_joined([Table(path, partial(_lines if lines else _cells, path), split)], options)


def read_tables(paths: Sequence[Path], lines: bool, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of text tables: JSON `lines`, or CSV. The names of several files
    may tell their splits."""
    tables = [
        Table(path, partial(_lines if lines else _cells, path), split)
        for path, split in zip(paths, splits_of_files(paths), strict=True)
    ]
    return read_joined(tables, options)


def splits_of_files(paths: Sequence[Path]) -> list[str | None]:
    """The split that the name of each of several files tells, or else its folder below the one that holds all."""
    if len(paths) == 1:
        return [None]
    splits = splits_in_names([path.name for path in paths])
    if splits[0] is None:
        top = os.path.commonpath([path.absolute().parent for path in paths])
        splits = splits_in_names([os.path.relpath(path.absolute(), top) for path in paths])
    return splits


def read_joined(tables: Sequence[Table], options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the tables, one image a record.

    Without a header, the columns are the names in a table's first rows. The tables of one folder are one table: the rows
    of an image may stand in several. Each table but the first is opened when its turn comes."""
    begun = _begin(tables[0], options)
    parts: dict[Path, list[Table]] = {}
    for table in tables:
        parts.setdefault(Path() if options.images else table.path.parent, []).append(table)
    top = os.path.commonpath(list(parts)) if len(parts) > 1 else ""

    def records() -> Iterator[Record]:
        for folder, some in parts.items():
            rows = Rows(_batches(some, begun if some[0] is tables[0] else None, options))
            name = os.path.relpath(folder, top) if top and str(folder) != top else ""
            for record in grouped_records(rows, [table.path for table in some], None, options):
                yield renamed(name, record)

    found = str(begun[0])
    if len(tables) > 1:
        found += f", {len(tables)} files" + (" whose names tell the split" if tables[0].split is not None else "")
    return found, records()


def renamed(folder: str, record: Record) -> Record:
    """The same record with the folder in its names, so that two folders may use one name."""
    return replace(record, key=f"{folder}/{record.key}", image=f"{folder}/{record.image}") if folder else record


def _lines(path: Path) -> tuple[None, Iterator[Any]]:
    return None, json_lines(path)


def _cells(path: Path) -> tuple[list[str], Iterator[Any]]:
    rows = csv_rows(path)
    return next(rows), rows


def _begin(table: Table, options: ReadOptions) -> tuple[TableColumns, Iterator[Any]]:
    """The columns of a table that are used, and all its rows. DatasetError if it has none."""
    header, rows = table.open()
    first = list(islice(rows, 1000))
    if not first:
        raise DatasetError(f"{table.path} holds no records; a dataset needs at least one image with a caption")
    names = header or list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
    return TableColumns.choose(names, options, table.path).looking_at(first), chain(first, rows)


def _batches(
    tables: Sequence[Table], begun: tuple[TableColumns, Iterator[Any]] | None, options: ReadOptions
) -> Iterator[pa.RecordBatch]:
    """The rows of the tables in batches of the columns ROWS. `begun` is the first table, if it is open already."""
    for number, table in enumerate(tables):
        columns, rows = begun if begun and number == 0 else _begin(table, options)
        while chunk := list(islice(rows, CHUNK)):
            more = {} if columns.split is not None else {"split": [table.split] * len(chunk)}
            yield columns.batch(chunk, table.path, **more)
