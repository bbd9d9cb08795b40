"""The rows of an index: what each vector shows. A few are read by number, memory-mapped, without pyarrow.

`rows.bin` holds the rows end to end: for each its JSON, then its thumbnail. `rows.starts` holds (N + 1, 3) little-endian int64:
where the row's JSON and its thumbnail begin, and how many captions come before it."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec
import numpy as np

from ...pipeline.files import atomic_file
from .manifest import ROWS, STARTS

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]  # INDEX_COLUMNS
KIND = np.dtype("<i8")


class StoredRow(TypedDict):
    """The JSON of a row."""

    key: str
    split: str
    image: str | None
    captions: list[str]


@dataclass(frozen=True)
class Rows:
    """N rows, and the M captions that they have in all."""

    starts: np.ndarray  # (N + 1,) how many captions come before those of a row
    read: Callable[[int], Row]  # the row of a number

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def captions(self) -> int:
        """M."""
        return int(self.starts[-1])

    def column(self, name: str) -> list[Any]:
        """One field of all rows. It reads them all."""
        return [self.read(item)[name] for item in range(len(self))]

    def owners(self, captions: np.ndarray) -> np.ndarray:
        """Numbers of captions (n,) -> the row (n,) of each."""
        owners: np.ndarray = np.searchsorted(self.starts, captions, side="right") - 1
        return owners

    def texts(self, captions: np.ndarray) -> list[str]:
        """Numbers of captions (n,) -> the captions."""
        owners = self.owners(captions)
        places = (captions - self.starts[owners]).tolist()
        return [self.read(owner)["captions"][place] for owner, place in zip(owners.tolist(), places, strict=True)]


def rows_of_table(table: "pa.Table") -> Rows:
    """The rows of a table with INDEX_COLUMNS. pyarrow's own `take` would join its chunks, and fail at 2 GiB of thumbnails."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(table.column("captions")).to_numpy()
    batches = table.to_batches()
    ends = np.cumsum([len(batch) for batch in batches]).tolist()

    def read(item: int) -> Row:
        number = bisect_right(ends, item)
        row: Row = batches[number].slice(item - ends[number] + len(batches[number]), 1).to_pylist()[0]
        return row

    return Rows(np.concatenate([[0], np.cumsum(counts)]), read)


def save_rows(rows: Rows, folder: Path) -> None:
    """Write both files, each whole or not at all."""
    starts = np.empty((len(rows) + 1, 3), KIND)
    starts[:, 2] = rows.starts
    end = 0
    with atomic_file(folder / ROWS) as file:
        for number in range(len(rows)):
            row = dict(rows.read(number))
            thumbnail = row.pop("thumbnail") or b""
            about = msgspec.json.encode(row)
            starts[number, :2] = end, end + len(about)
            file.write(about)
            file.write(thumbnail)
            end += len(about) + len(thumbnail)
    starts[-1, :2] = end
    with atomic_file(folder / STARTS) as file:
        file.write(starts.tobytes())


def open_rows(folder: Path) -> Rows:
    """The rows of an index, memory-mapped. ValueError if the files are not of one length. OSError if one cannot be opened."""
    memory, starts = np.memmap(folder / ROWS, np.uint8, "r"), np.memmap(folder / STARTS, KIND, "r").reshape(-1, 3)
    if starts[0, 0] or starts[0, 2] or starts[-1, 0] != len(memory):
        raise ValueError(f"{ROWS} has {len(memory):,} bytes, not {starts[-1, 0]:,}")

    def read(item: int) -> Row:
        first, middle, last = int(starts[item, 0]), int(starts[item, 1]), int(starts[item + 1, 0])
        row: Row = msgspec.json.decode(memory[first:middle].data)
        return {**row, "thumbnail": memory[middle:last].tobytes()}

    return Rows(starts[:, 2], read)


def check_rows(folder: Path) -> None:
    """ValueError if any row is not as `save_rows` writes it. Reads both files whole."""
    memory, starts = np.memmap(folder / ROWS, np.uint8, "r"), np.memmap(folder / STARTS, KIND, "r").reshape(-1, 3)
    ordered = (np.diff(starts, axis=0) >= 0).all() and (starts[:-1, 0] <= starts[:-1, 1]).all()
    if not ordered or (starts[:-1, 1] > starts[1:, 0]).any():
        raise ValueError(f"{STARTS} is not in order")
    decoder = msgspec.json.Decoder(StoredRow)
    for number, (first, middle, _) in enumerate(starts[:-1].tolist()):
        count = starts[number + 1, 2] - starts[number, 2]
        if len(decoder.decode(memory[first:middle].data)["captions"]) != count:
            raise ValueError(f"row {number} has not {count} captions")
