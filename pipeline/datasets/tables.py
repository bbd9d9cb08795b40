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
from .columns import USUAL, TableColumns, image_name
from .grouping import Rows, grouped_records, picture_digests
from .header import asked_columns, find_header
from .names import image_folder
from .parquet import read_parquet
from .records import Record, splits_in_names
from .rows import csv_rows, json_lines
from .sources import ImageSource, SpooledSlice
from .spool import PictureSpool

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
CHUNK, CHUNK_TEXT = 8192, 2**25  # rows and their characters that are Python objects at one time


@dataclass(frozen=True)
class Table:
    """A file of rows. `open` gives its rows: objects, or lists of cells, of which the first one may hold the names.
    `split` is that of rows which name none."""

    path: Path
    open: Callable[[], Iterator[Any]]
    split: str | None = None


def read_table(path: Path, options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records. `split` is their split where no column has one."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return read_parquet([path], options, split)
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    return read_joined([text_table(path, lines, split, options)], options)


def read_tables(paths: Sequence[Path], lines: bool, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of text tables: JSON `lines`, or CSV. The names of several files
    may tell their splits."""
    every = zip(paths, splits_of_files(paths), strict=True)
    return read_joined([text_table(path, lines, split, options) for path, split in every], options)


def first_images(path: Path, lines: bool, options: ReadOptions) -> list[Any]:
    """The cells of the first 100 rows of a text table that name images. DatasetError if it is no table."""
    columns, rows = _begin(text_table(path, lines, None, options), options)
    return [row.get(columns.image) for row in islice(rows, 100) if isinstance(row, dict)]


def table_batches(tables: Sequence[Table], options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """The rows of tables in batches of the columns ROWS, without the pictures in their cells."""
    return _batches(tables, None, None, options)


def text_table(path: Path, lines: bool, split: str | None, options: ReadOptions) -> Table:
    """A file of JSON `lines`, or a CSV."""
    known = USUAL.union(name.strip().lower() for name in asked_columns(options) if name)
    return Table(path, partial(json_lines, path) if lines else partial(csv_rows, path, known), split)


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
    pictures = PictureSpool()
    parts: dict[Path, list[Table]] = {}
    for table in tables:
        parts.setdefault(_images_of(table, options) if len(tables) > 1 else table.path.parent, []).append(table)
    top = os.path.commonpath(list(parts)) if len(parts) > 1 else ""

    def picture(_: int, size: int, offset: int) -> ImageSource:
        return SpooledSlice(pictures, offset, size)

    def records() -> Iterator[Record]:
        for folder, some in parts.items():
            rows = Rows(_batches(some, begun if some[0] is tables[0] else None, pictures, options))
            name = os.path.relpath(folder, top) if top and str(folder) != top else ""
            digests = picture_digests(rows, picture) if pictures.size else None
            within = replace(options, images=options.images or (folder if len(tables) > 1 else None))
            for record in grouped_records(rows, [table.path for table in some], picture, within, digests):
                yield renamed(name, record)

    found = str(begun[0])
    if len(tables) > 1:
        found += f", {len(tables)} files" + (" whose names tell the split" if tables[0].split is not None else "")
    return found, records()


def _images_of(table: Table, options: ReadOptions) -> Path:
    """The folder of the images of one of several tables."""
    if options.images:
        return options.images
    columns, rows = _begin(table, options)
    names = [image_name(row.get(columns.image)) or "" for row in islice(rows, 100) if isinstance(row, dict)]
    return image_folder(table.path, names)


def renamed(folder: str, record: Record) -> Record:
    """The same record with the folder in its names, so that two folders may use one name."""
    return replace(record, key=f"{folder}/{record.key}", image=f"{folder}/{record.image}") if folder else record


def _begin(table: Table, options: ReadOptions) -> tuple[TableColumns, Iterator[Any]]:
    """The columns of a table that are used, and all its rows as objects. DatasetError if it has none."""
    rows = table.open()
    first = next(_chunks(rows, 1000), [])
    header = None
    if first and isinstance(first[0], list):
        header = find_header([row for row in first if isinstance(row, list)], options, table.path)
        first = [_named(header.names, row) for row in first[header.present :]]
        rows = map(partial(_named, header.names), rows)
    if not first:
        raise DatasetError(f"{table.path} holds no records; a dataset needs at least one image with a caption")
    names = (
        header.names if header else list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
    )
    columns = TableColumns.choose(names, header.options if header else options, table.path, first)
    columns = replace(columns, header=header is None or header.present)
    return columns.looking_at(first), chain(first, rows)


def _named(names: Sequence[str], row: Any) -> Any:
    return dict(zip(names, row, strict=False)) if isinstance(row, list) else row


def _batches(
    tables: Sequence[Table],
    begun: tuple[TableColumns, Iterator[Any]] | None,
    pictures: PictureSpool | None,
    options: ReadOptions,
) -> Iterator[pa.RecordBatch]:
    """The rows of the tables in batches of the columns ROWS. `begun` is the first table, if it is open already."""
    for number, table in enumerate(tables):
        columns, rows = begun if begun and number == 0 else _begin(table, options)
        for chunk in _chunks(rows, CHUNK):
            more = {} if columns.split is not None else {"split": [table.split] * len(chunk)}
            yield columns.batch(chunk, table.path, pictures, **more)


def _chunks(rows: Iterator[Any], count: int) -> Iterator[list[Any]]:
    """The rows in lists of at most `count`, and of about CHUNK_TEXT characters of text."""
    chunk: list[Any] = []
    weight = 0
    for row in rows:
        chunk.append(row)
        cells = row.values() if isinstance(row, dict) else row if isinstance(row, list) else ()
        weight += sum(len(cell) for cell in cells if isinstance(cell, str))
        if len(chunk) == count or weight > CHUNK_TEXT:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk
