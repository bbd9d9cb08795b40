"""Where an image's bytes are. A source is small, so that ten million of them fit a catalogue and reading starts anywhere.

ImageFile       a file in the folder that was named, or below it
FileSlice       bytes inside a file: a member of an uncompressed tar, a cell of an Arrow file
ParquetCell     a cell of a Parquet file, as Hugging Face `{bytes, path}` structs are
SpooledSlice    bytes in a temporary file: a picture that a text table holds

`load` returns what `images.load_image` takes; `fetch` does the part of it that must go in order. Any failure on the way is an
UnreadableImage, so a reject.
"""

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ..images import MAX_BYTES, PASSING, UnreadableImage
from .spool import PictureSpool

CELLS, SHARED_CELLS = 64, 4  # of a Parquet column, read at once


# What may not lead out of a folder: nothing is bound; names are, links are followed; or names and links are.
Bounds = Literal["", "names", "links"]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """`name` relative to `folder`, or absolute."""

    folder: str
    name: str
    bounds: Bounds = ""


@dataclass(frozen=True, slots=True)
class FileSlice:
    """`size` bytes from byte `offset` of a file."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Row `row` of row group `group` of a column of bytes, or of structs that have a field `bytes`."""

    file: str
    column: str  # as in the file's leaves: `image.bytes`, or `jpg`
    group: int
    row: int


@dataclass(frozen=True, slots=True)
class SpooledSlice:
    """`size` bytes from byte `offset` of a temporary file: a picture that a text table holds, decoded."""

    spool: PictureSpool
    offset: int
    size: int


ImageSource = ImageFile | FileSlice | ParquetCell | SpooledSlice
Fetched = ImageSource | Path | bytes | UnreadableImage | None


def fetch(source: ImageSource | None) -> Fetched:
    """The source in a form that `load` takes in any thread, at any time.

    Cells of Parquet files are read here: their pages can only be read forwards, so one thread must ask for them in order."""
    if not isinstance(source, ParquetCell):
        return source
    try:
        return load(source)
    except UnreadableImage as error:
        return error


def load(source: Fetched) -> Path | bytes:
    """The image's file, or its bytes. UnreadableImage with the reason if they cannot be had.

    Holds, for all threads together, CELLS images of one Parquet file, which stays open. Cells are read in any order, but
    going back in a row group reads it from its first row."""
    try:
        match source:
            case ImageFile(folder, name, bounds):
                return _file(folder, name, bounds)
            case FileSlice(file, offset, size):
                return _slice(file, offset, size)
            case SpooledSlice(spool, offset, size):
                return spool.read(offset, size)
            case ParquetCell():
                return _CELLS.read(source)
            case Path() | bytes():
                return source
            case UnreadableImage():
                raise source
            case None:
                raise UnreadableImage("no image")
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except MemoryError:  # Arrow's own is an ArrowException, too
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        if getattr(error, "errno", None) in PASSING:
            raise
        damaged = "the file is damaged there" if isinstance(source, ParquetCell) else "its name is that of no file"
        raise UnreadableImage(f"cannot be read: {getattr(error, 'strerror', None) or damaged}") from error


def _file(folder: str, name: str, bounds: Bounds) -> Path:
    """The file after all links. It is checked when it is used, because a link may change."""
    path = os.path.join(folder, name)
    if bounds == "names":
        path = os.path.normpath(path)
        if not os.path.join(os.path.abspath(path), "").startswith(os.path.join(os.path.abspath(folder), "")):
            raise UnreadableImage(f"its name leads out of {folder}, which names in a folder's metadata may not")
    real = os.path.realpath(path)
    if bounds == "links" and not os.path.join(real, "").startswith(_root(folder)):
        where = f"it lies outside {folder}, in {os.path.dirname(real)}"
        raise UnreadableImage(f"{where}; leave out --confine, or give --images DIR that holds it")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise UnreadableImage("not a regular file")
    return Path(real)


@lru_cache
def _root(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), "")


def leads_out(source: ImageFile) -> bool:
    """Whether the file lies outside its folder: by its name, by its own link, or by that of a folder on the way."""
    path = os.path.join(source.folder, source.name)
    try:
        real = os.path.join(_root(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(path):
            real = os.path.realpath(path)
    except (OSError, ValueError):
        return False
    return not real.startswith(_root(source.folder))


def _slice(path: str, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise UnreadableImage(f"{size} bytes, the limit is {MAX_BYTES} bytes")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise UnreadableImage(f"{os.path.basename(path)} is truncated or has changed since it was listed")
    return data


def open_parquet(file: str | Path, shared: Sequence[str] = ()) -> pq.ParquetFile:
    """An open Parquet file. It reads a page when it needs one, so that large row groups take little memory. A value of the
    leaves `shared` is read once, no matter how many rows hold it."""
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20, read_dictionary=list(shared) or None)


def chunks_of(file: pq.ParquetFile, group: int) -> list[pq.ColumnChunkMetaData]:
    """The metadata of a row group's columns. An Arrow error or OSError if they are damaged."""
    for _ in file.reader.iter_batches(0, [group], None, False):  # no row, but an error where the next line would abort
        pass
    part = file.metadata.row_group(group)
    return [part.column(number) for number in range(part.num_columns)]


def column_cells(file: pq.ParquetFile, column: str, group: int) -> Iterator[pa.Array]:
    """The bytes in a row group's column, CELLS rows at a time; null where there are none. Only SHARED_CELLS rows are read at
    once where rows may share a value, which takes no room in the file but for each row in memory."""
    chunks = [chunk for chunk in chunks_of(file, group) if chunk.path_in_schema == column]
    shared = any("DICTIONARY" in " ".join(chunk.encodings) for chunk in chunks)
    count = SHARED_CELLS if shared else CELLS
    for batch in file.iter_batches(count, row_groups=[group], columns=[column], use_threads=False):
        cells = batch.column(0)
        while pa.types.is_struct(cells.type):  # {"bytes": ...}
            (cells,) = cells.flatten()
        yield cells


class _Column:
    """A column of a Parquet file and the place where it is being read."""

    def __init__(self, file: str, column: str) -> None:
        self._file, self._column = open_parquet(file), column
        self._group, self._start = -1, 0
        self._cells: pa.Array = pa.nulls(0)  # cells from row `_start` on
        self._rest: Iterator[pa.Array] = iter(())
        self._error: Exception | None = None

    def cell(self, group: int, row: int) -> bytes:
        if group != self._group or row < self._start:
            self._group, self._start, self._error = group, 0, None
            self._cells, self._rest = pa.nulls(0), column_cells(self._file, self._column, group)
        while row >= self._start + len(self._cells):
            if self._error:  # all rows after the damage in a row group are lost
                raise self._error.with_traceback(None)
            try:
                cells = next(self._rest)
            except Exception as error:
                self._error = error
                raise
            self._start, self._cells = self._start + len(self._cells), cells
        return self._cells[row - self._start].as_py() or b""


class _Cells:
    """The one column that is open at a time, shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[object, ...] = ()

    def read(self, cell: ParquetCell) -> bytes:
        with self._lock:
            now = os.stat(cell.file)  # the file may have changed since it was opened
            key = (cell.file, cell.column, now.st_ino, now.st_size, now.st_mtime_ns)
            if key != self._key:
                self._key = ()
                self._open = _Column(cell.file, cell.column)
                self._key = key
            try:
                return self._open.cell(cell.group, cell.row)
            except (StopIteration, IndexError):  # no such row; no such group or column
                raise UnreadableImage(f"{os.path.basename(cell.file)} has changed since it was listed") from None


_CELLS = _Cells()
