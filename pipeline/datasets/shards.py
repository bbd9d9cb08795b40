"""A table in one or several columnar files, Parquet or Arrow, perhaps with pictures inside: all that the two formats share.

A format gives the schema of a file, and its rows as objects, each with the place of its picture, if it holds one."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import printable
from .columns import TableColumns, image_name
from .grouping import Rows, grouped_records, picture_digests
from .records import Record, splits_in_names
from .sources import ImageSource, SpooledSlice
from .spool import PictureSpool

Place = tuple[int, int]  # of a picture in its file, as the format counts
Part = tuple[list[dict[str, Any]], list[Place | None]]  # some rows, and where the picture of each is


@dataclass(frozen=True)
class ShardFormat:
    """How files of one format are read. `leaf` is the column that holds pictures, or nothing.

    `name` and `cure` are words of messages; `parts(path, columns, leaf)` are the rows of a
    file; `picture(path, leaf, place)` is a picture in it."""

    name: str
    cure: str
    schema: Callable[[Path], pa.Schema]
    parts: Callable[[Path, TableColumns, str], Iterator[Part]]
    picture: Callable[[Path, str, Place], ImageSource]

    @contextmanager
    def readable(self, path: Path) -> Iterator[None]:
        """Arrow's errors about a file as a DatasetError."""
        try:
            yield
        except MemoryError:  # Arrow's own is an ArrowException, too
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"it is damaged, truncated or something else; {self.cure}"
            raise DatasetError(f"{path} cannot be read as {self.name}: {reason}") from error


def read_shards(
    form: ShardFormat, paths: Sequence[Path], options: ReadOptions, split: str | None = None
) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the files of one table.

    Where no column has the splits, they are `split`, or come from the files' names below their common folder
    (`train-00000-of-00002.parquet`, `train/0000.parquet`)."""
    columns, leaf = _columns(form, paths[0], options)
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

    pictures = PictureSpool()

    def picture(number: int, *place: int) -> ImageSource:
        if not leaf:
            return SpooledSlice(pictures, place[1], place[0])
        return form.picture(paths[number], leaf, (place[0], place[1]))

    def records() -> Iterator[Record]:
        numbered = enumerate(zip(paths, names, splits, strict=True))
        rows = Rows(
            batch for number, each in numbered for batch in _batches(form, number, *each, columns, leaf, pictures)
        )
        digests = picture_digests(rows, picture) if leaf or pictures.size else None
        yield from grouped_records(rows, paths, picture, options, digests)

    return found, records()


def asked_batches(form: ShardFormat, path: Path, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """The rows of a file of questions, in batches of the columns ROWS."""
    columns, leaf = _columns(form, path, options)
    yield from _batches(form, 0, path, path.name, None, columns, leaf, PictureSpool())


def _columns(form: ShardFormat, path: Path, options: ReadOptions) -> tuple[TableColumns, str]:
    """The columns of a file that are used, and the leaf that holds pictures."""
    with form.readable(path):
        schema = form.schema(path)
        columns = TableColumns.choose(schema.names, options, path)
        leaf = picture_leaf(schema, columns.image, path)
        return columns.looking_at(next(form.parts(path, columns, leaf), ([], []))[0][:1000]), leaf


def picture_leaf(schema: pa.Schema, column: str, path: Path) -> str:
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
    form: ShardFormat,
    number: int,
    path: Path,
    name: str,
    split: str | None,
    columns: TableColumns,
    leaf: str,
    pictures: PictureSpool,
) -> Iterator[pa.RecordBatch]:
    with form.readable(path):
        schema = form.schema(path)
        for column in columns.used:
            if column not in schema.names:
                raise DatasetError(
                    f"{path} has no column {column!r}, which the files beside it have; name one table's files"
                )
        if picture_leaf(schema, columns.image, path) != leaf:
            kind = schema.field(columns.image).type
            raise DatasetError(
                f"{path}: column {columns.image!r} is {kind}, unlike that of the files beside it; name one table's files"
            )
        row = 0
        for rows, places in form.parts(path, columns, leaf):
            more: dict[str, Sequence[Any]] = {}
            if leaf:
                more = {
                    "image": [
                        image_name(each.get(columns.image)) or (f"{name}:{row + at}" if place else None)
                        for at, (each, place) in enumerate(zip(rows, places, strict=True))
                    ],
                    "file": [number if place else None for place in places],
                    "group": [place[0] if place else None for place in places],
                    "at": [place[1] if place else None for place in places],
                }
            if columns.split is None:
                more["split"] = [split] * len(rows)
            yield columns.batch(rows, path, None if leaf else pictures, **more)
            row += len(rows)


def pylist(array: pa.Array) -> list[Any]:
    """The values of an array as Python objects, as `to_pylist` gives them. A value of a dictionary is one object, no
    matter how many rows hold it."""
    if pa.types.is_dictionary(array.type):
        values = pylist(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if pa.types.is_struct(array.type):
        names = [array.type.field(n).name for n in range(array.type.num_fields)]
        fields = zip(*map(pylist, array.flatten()), strict=True) if names else iter(() for _ in array)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if there else None for row, there in zip(fields, valid, strict=True)]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        values, ends = pylist(array.flatten()), 0
        rows: list[Any] = []
        for length in array.value_lengths().to_pylist():
            rows.append(None if length is None else values[ends : ends + length])
            ends += length or 0
        return rows
    return array.to_pylist()
