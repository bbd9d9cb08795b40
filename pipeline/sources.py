"""Where an image's bytes are: a small value, so that ten million of them fit a catalogue and reading starts anywhere.

ImageFile       a file in the folder that was named, or below it
TarSlice        a regular member of an uncompressed tar
ParquetCell     a cell of a Parquet file, as Hugging Face `{bytes, path}` structs are

`load` gives what `images.load_image` takes. Whatever fails on the way is an UnreadableImage, so a reject.
"""

import os
import stat
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .images import MAX_BYTES, PASSING, UnreadableImage

CELLS = 64  # cells of a Parquet column read at once
KEPT = 4  # such reads that stay, for the threads that are a little behind
OPEN_GROUPS = 2  # row groups read at once: threads at work on the end of one are joined by those at the next


@dataclass(frozen=True, slots=True)
class ImageFile:
    """`name` relative to `folder`, or absolute inside it. Links are followed, but never out of the folder."""

    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class TarSlice:
    """`size` bytes from byte `offset` of the file `tar`."""

    tar: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Row `row` of row group `group` of a column of bytes, or of structs that have a field `bytes`."""

    file: str
    column: str  # as in the file's leaves: `image.bytes`, or `jpg`
    group: int
    row: int


Source = ImageFile | TarSlice | ParquetCell


def load(source: Source | None) -> Path | bytes:
    """The image's file, or its bytes. UnreadableImage with the reason if they cannot be had.

    Holds, for all threads together, at most OPEN_GROUPS x KEPT x CELLS images of Parquet files."""
    try:
        match source:
            case ImageFile(folder, name):
                return _inside(folder, name)
            case TarSlice(tar, offset, size):
                return _slice(tar, offset, size)
            case ParquetCell():
                return _CELLS.read(source)
            case None:
                raise UnreadableImage("no image")
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if getattr(error, "errno", None) in PASSING:
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UnreadableImage(f"cannot be read: {reason}") from error


def _inside(folder: str, name: str) -> Path:
    """The file after all links, checked at the moment of use: what a dataset links to may change."""
    path = os.path.realpath(os.path.join(folder, name))
    if not os.path.join(path, "").startswith(_root(folder)):
        raise UnreadableImage(f"it lies outside {folder}, in {os.path.dirname(path)}; give --images DIR that holds it")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImage("no regular file")
    return Path(path)


@lru_cache
def _root(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), "")


def _slice(tar: str, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise UnreadableImage(f"{size} bytes, the limit is {MAX_BYTES}")
    with open(tar, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise UnreadableImage(f"{os.path.basename(tar)} has been cut short or changed since it was listed")
    return data


class _Group:
    """A column of one row group, read forwards a few cells at a time: row groups of any size take little memory."""

    def __init__(self, file: str, column: str, group: int) -> None:
        self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        self._batches = self._file.iter_batches(CELLS, row_groups=[group], columns=[column], use_threads=False)
        self._kept: deque[tuple[int, pa.Array]] = deque(maxlen=KEPT)
        self._end = 0

    def has_left(self, row: int) -> bool:
        """Whether the row has been read and is kept no more."""
        return bool(self._kept) and row < self._kept[0][0]

    def cell(self, row: int) -> bytes:
        while row >= self._end:
            column = next(self._batches).column(0)
            self._kept.append((self._end, column))
            self._end += len(column)
        start, column = next((start, column) for start, column in self._kept if start <= row < start + len(column))
        value = column[row - start].as_py()
        while isinstance(value, dict):  # {"bytes": ...}
            value = next(iter(value.values()))
        return value or b""


class _Cells:
    """The row groups that are being read, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, str, int], _Group] = OrderedDict()

    def read(self, cell: ParquetCell) -> bytes:
        key = (cell.file, cell.column, cell.group)
        with self._lock:
            group = self._groups.pop(key, None)
            try:
                if group is None or group.has_left(cell.row):
                    group = _Group(*key)
                value = group.cell(cell.row)
            except (StopIteration, IndexError):  # no such row; no such group or column
                raise UnreadableImage(f"{os.path.basename(cell.file)} has changed since it was listed") from None
            self._groups[key] = group  # not after an error: the next read starts anew
            while len(self._groups) > OPEN_GROUPS:
                self._groups.popitem(last=False)
            return value


_CELLS = _Cells()
