"""Tables to records: CSV, TSV, JSON lines, JSON arrays of objects, Parquet. The content of the file decides which it is."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import Rows, TableColumns, grouped_records
from .parquet import read_parquet
from .records import Record
from .rows import csv_rows, json_lines

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
CHUNK = 8192  # rows that are Python objects at one time


def read_table(path: Path, options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records. `split` is their split where no column has one."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return read_parquet([path], options, split)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return read_rows(path, json_lines(path), options, split)
    rows = csv_rows(path)
    return read_rows(path, rows, options, split, next(rows))


def read_rows(
    path: Path, rows: Iterator[Any], options: ReadOptions, split: str | None = None, header: list[str] | None = None
) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of a table whose rows are objects.

    Without a header, the columns are the names in the first rows."""
    first = list(islice(rows, 1000))
    if not first:
        raise DatasetError(f"{path} holds no records; a dataset needs at least one image with a caption")
    names = header or list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
    columns = TableColumns.choose(names, options, path)

    def batches() -> Iterator[pa.RecordBatch]:
        every = chain(first, rows)
        while chunk := list(islice(every, CHUNK)):
            more = {} if columns.split is not None else {"split": [split] * len(chunk)}
            yield columns.batch(chunk, path, **more)

    def records() -> Iterator[Record]:
        yield from grouped_records(Rows(batches()), [path], None, options)

    return str(columns), records()
