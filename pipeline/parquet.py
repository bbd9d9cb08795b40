"""Parquet tables, one file or the shards of a Hugging Face dataset. Pictures inside them are left where they are.

Read a row group of the text columns at a time, into the columns of `FRAME`."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import FRAME, Columns, grouped_records, image_name
from .errors import DatasetError
from .records import ReadOptions, Record, splits_in_names


def read_parquet(paths: Sequence[Path], options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """What was found, and the records of the files of one table. Where no column tells splits, they are `split`, or what
    the files' names tell (`train-00000-of-00002.parquet`)."""
    with _readable(paths[0]):
        first = pq.read_schema(paths[0])
    columns = Columns.choose(first.names, options, paths[0])
    leaf = _leaf(first.field(columns.image).type, columns.image)
    splits: list[str | None] = [split] * len(paths)
    if len(paths) > 1 and columns.split is None:
        splits = splits_in_names([path.name for path in paths])
    found = str(columns)
    if leaf:
        found += f", pictures inside ({leaf})"
    if len(paths) > 1:
        found += f", {len(paths)} files" + (" whose names tell the split" if splits[0] is not None else "")

    def records() -> Iterator[Record]:
        frames: list[pl.DataFrame] = []
        for number, path in enumerate(paths):
            frames += _frames(number, path, splits[number], columns, leaf)
        frame = pl.concat(frames, rechunk=False) if frames else pl.DataFrame(schema=FRAME)
        if leaf:
            frame = _with_digests(frame, paths, leaf)
        yield from grouped_records(frame, paths, leaf, options)

    return found, records()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Arrow's errors about a file as a DatasetError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as parquet: {(str(error).splitlines() or [''])[0]}") from error


def _leaf(kind: pa.DataType, column: str) -> str:
    """The leaf that holds pictures, or nothing if the column holds their paths."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    return f"{column}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else ""


def _frames(number: int, path: Path, split: str | None, columns: Columns, leaf: str) -> Iterator[pl.DataFrame]:
    with _readable(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in columns.used:
            if name not in names:
                raise DatasetError(
                    f"{path} has no column {name!r}, which the files beside it have; name one table's files"
                )
        wanted = [name for name in columns.used if name != columns.image]
        kind = file.schema_arrow.field(columns.image).type
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
                    image_name(each.get(columns.image)) or (f"{path.name}:{row + at}" if here else None)
                    for at, (each, here) in enumerate(zip(rows, inside, strict=True))
                ],
                "file": [number if here else None for here in inside],
                "group": [group] * count,
                "at": range(count),
            }
            if columns.split is None:
                more["split"] = [split] * count
            yield columns.frame(rows, path, **more)
            row += count


def _inside(file: pq.ParquetFile, group: int, leaf: str) -> list[bool]:
    """Whether each row of a row group holds a picture. The file's statistics mostly tell; otherwise its pages are read."""
    part = file.metadata.row_group(group)
    at = next(n for n in range(part.num_columns) if part.column(n).path_in_schema == leaf)
    statistics = part.column(at).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, part.num_rows):
        return [statistics.null_count == 0] * part.num_rows
    return [len(value) > 0 for value in _cells(file, group, leaf)]


def _cells(file: pq.ParquetFile, group: int, leaf: str) -> Iterator[bytes]:
    for batch in file.iter_batches(64, row_groups=[group], columns=[leaf], use_threads=False):
        for value in batch.column(0).to_pylist():
            yield (value.get("bytes") if isinstance(value, dict) else value) or b""


def _with_digests(frame: pl.DataFrame, paths: Sequence[Path], leaf: str) -> pl.DataFrame:
    """With the digest of the pictures inside whose name repeats: rows of one picture, or pictures of one name?"""
    repeated = frame.select(pl.col("image").is_duplicated() & pl.col("file").is_not_null()).to_series()
    if not repeated.any():
        return frame
    wanted = frame.filter(repeated).select("file", "group", "at")
    digests = []
    for (number, group), rows in wanted.group_by("file", "group", maintain_order=True):
        there = set(rows["at"])
        path = paths[int(str(number))]
        with _readable(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            for at, data in enumerate(_cells(file, int(str(group)), leaf)):
                if at in there:
                    digests.append(hashlib.sha256(data).hexdigest()[:16])
    return frame.with_columns(
        digest=pl.Series(digests).gather((repeated.cast(pl.Int64).cum_sum() - 1).clip(lower_bound=0))
    ).with_columns(digest=pl.when(repeated).then("digest"))
