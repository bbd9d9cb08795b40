"""The records of a dataset, ten million as well as ten: kept as Arrow in an unnamed temporary file, mapped into memory.

Splits, captions and a checksum are counted while the records stream in. Memory:
a batch of records, and 8 bytes a record while keys are compared; the file (in TMPDIR, gone with the process) takes
about what the texts take, and 100 bytes a record.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import cast, overload

import numpy as np
import polars as pl
import pyarrow as pa

from ..errors import DatasetError
from ..formatting import encodable
from ..schema import OPTIONAL_COLUMNS, SPLITS, TYPES, Question
from .captions import MAX_CAPTIONS, TOO_LONG, TOO_MANY, usable
from .records import Record
from .sources import Bounds, FileSlice, ImageFile, ImageSource, ParquetCell, SpooledSlice
from .spool import PictureSpool, spool

BATCH = 4096  # records in a batch of the file, the last one excepted
CATALOGUE = pa.schema(
    [
        *((name, TYPES[name]) for name in ("key", "image", "captions")),
        ("split", pa.int8()),
        ("problem", pa.string()),
        ("place", pa.int32()),  # folder, tar or Parquet column; -1: nowhere
        ("name", pa.string()),  # null: the same as image
        ("start", pa.int64()),
        ("extent", pa.int64()),
        ("lacking", pa.string()),
        *((name, TYPES[name]) for name in OPTIONAL_COLUMNS),
    ]
)
Place = tuple[type, str | PictureSpool, str]


class Catalogue(Sequence[Record]):
    """Records in their order, counted and checked: DatasetError if two have one key.

    `sha256` is that of the JSON list of `[key, image, captions, split]`, with null for the captions of an image that is
    used without any; questions and conversations follow, where an image has some. `splits`, `captions`, `questions` and
    `conversations` count, split by split, the records without a problem and their texts; `optional` names the columns of
    texts that any record has; `left_out` counts things of records that are not used. Where all these
    records are of `train`, `draw` gives every key its split."""

    def __init__(self, records: Iterable[Record], draw: Callable[[str], str] | None = None) -> None:
        self._places: dict[Place, int] = {}
        self._draw: Callable[[str], str] | None = None
        tally = _Tally()
        hashes: list[np.ndarray] = []  # a uint64 for each key

        def batches() -> Iterator[pa.RecordBatch]:
            every = iter(records)
            while rows := list(islice(every, BATCH)):
                rows = [_bounded(row) for row in rows]
                try:
                    batch = self._batch(rows)
                except UnicodeEncodeError:
                    rows = [_encodable(row) for row in rows]
                    batch = self._batch(rows)
                hashes.append(pl.Series(batch["key"]).hash().to_numpy())
                tally.add(rows)
                yield batch

        self._reader = spool(CATALOGUE, batches())
        self._length = tally.length
        self._places_by_number = list(self._places)
        self._check_unique(hashes)
        left_out = tally.left_out
        if draw and tally.splits["train"] == sum(tally.splits.values()):
            self._draw, tally = draw, _Tally()
            for start in range(0, len(self), BATCH):
                tally.add(self[start : start + BATCH])
        self.splits, self.first_problem = tally.splits, tally.first_problem
        self.captions, self.questions, self.conversations = tally.captions, tally.questions, tally.conversations
        self.optional = tally.optional
        self.left_out = left_out
        self.sha256 = tally.sha256

    def _batch(self, rows: list[Record]) -> pa.RecordBatch:
        packed = [_pack(row) for row in rows]
        columns = [
            [row.key for row in rows],
            [row.image for row in rows],
            [row.captions for row in rows],
            [SPLITS.index(row.split) for row in rows],
            [row.problem for row in rows],
            [-1 if place is None else self._places.setdefault(place, len(self._places)) for place, _, _, _ in packed],
            [name for _, name, _, _ in packed],
            [start for _, _, start, _ in packed],
            [extent for _, _, _, extent in packed],
            [row.lacking for row in rows],
            [[question.to_row() for question in row.questions] for row in rows],
            [row.conversations for row in rows],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, CATALOGUE, strict=True)]
        return pa.record_batch(arrays, schema=CATALOGUE)

    def _check_unique(self, hashes: list[np.ndarray]) -> None:
        """DatasetError if a key repeats. Only keys whose hashes are equal are compared."""
        ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
        meeting = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(meeting):
            return
        seen: Counter[str] = Counter()
        for number, values in enumerate(hashes):
            rows = np.flatnonzero(np.isin(values, meeting))
            if len(rows):
                seen.update(self._reader.get_batch(number)["key"].take(pa.array(rows)).to_pylist())
            if seen and seen.most_common(1)[0][1] > 1:
                key = seen.most_common(1)[0][0]
                raise DatasetError(f"two images have the key {key!r}; keys must be unique (--key-column names others)")

    @property
    def drawn(self) -> bool:
        """Whether `draw` gave the splits."""
        return self._draw is not None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        return self._range(0, self._length)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        """One record, or a slice as a list. Only the list is held in memory."""
        if isinstance(at, slice):
            start, stop, step = at.indices(self._length)
            return list(self._range(start, stop)) if step == 1 else [self[i] for i in range(start, stop, step)]
        if not -self._length <= at < self._length:
            raise IndexError(at)
        return next(self._range(at % self._length, at % self._length + 1))

    def _range(self, start: int, stop: int) -> Iterator[Record]:
        while start < stop:
            number, first = divmod(start, BATCH)
            batch = self._reader.get_batch(number).slice(first, min(BATCH - first, stop - start))
            columns = [column.to_pylist() for column in batch.columns]
            for values in zip(*columns, strict=True):
                key, image, captions, split, problem, place, name, offset, extent, lacking, asked, talked = values
                source = None
                if place >= 0:
                    source = _unpack(self._places_by_number[place], image if name is None else name, offset, extent)
                named = SPLITS[split] if self._draw is None else self._draw(key)
                questions, conversations = tuple(map(Question.from_row, asked)), tuple(map(tuple, talked))
                yield Record(key, image, source, tuple(captions), named, problem, (), lacking, questions, conversations)
            start += len(batch)


class _Tally:
    """Counts and a checksum over all records, in their order."""

    def __init__(self) -> None:
        self.length = 0
        self.splits = dict.fromkeys(SPLITS, 0)
        self.captions, self.questions, self.conversations = (dict.fromkeys(SPLITS, 0) for _ in range(3))
        self.optional: set[str] = set()
        self.first_problem = ""
        self.left_out: Counter[str] = Counter()
        self._digest = hashlib.sha256(b"[")

    def add(self, rows: list[Record]) -> None:
        listed = json.dumps([_identity(row) for row in rows])
        self._digest.update((b", " if self.length else b"") + listed[1:-1].encode())
        self.length += len(rows)
        for row in rows:
            if row.problem:
                self.first_problem = self.first_problem or f"{row.image or row.key}: {row.problem}"
            else:
                self.splits[row.split] += 1
                self.captions[row.split] += len(row.captions)
                self.questions[row.split] += len(row.questions)
                self.conversations[row.split] += len(row.conversations)
            self.optional.update(name for name in OPTIONAL_COLUMNS if getattr(row, name))
            self.left_out.update(row.left_out)

    @property
    def sha256(self) -> str:
        whole = self._digest.copy()
        whole.update(b"]")
        return whole.hexdigest()


def _identity(record: Record) -> tuple[object, ...]:
    """The part of a record that decides the features."""
    captions = record.captions if record.captions or record.problem else None
    known = (record.key, record.image, captions, record.split)
    if not (record.questions or record.conversations):
        return known
    return *known, [(one.question, one.answers, one.type) for one in record.questions], record.conversations


def _pack(record: Record) -> tuple[Place | None, str | None, int, int]:
    source = record.source
    if isinstance(source, ImageFile):
        return (ImageFile, source.folder, source.bounds), None if source.name == record.image else source.name, 0, 0
    if isinstance(source, FileSlice):
        return (FileSlice, source.file, ""), None, source.offset, source.size
    if isinstance(source, SpooledSlice):
        return (SpooledSlice, source.spool, ""), None, source.offset, source.size
    if isinstance(source, ParquetCell):
        return (ParquetCell, source.file, source.column), None, source.group, source.row
    return None, None, 0, 0


def _unpack(place: Place, name: str, start: int, extent: int) -> ImageSource:
    kind, path, column = place  # of a file: folder and bounds
    if isinstance(path, PictureSpool):
        return SpooledSlice(path, start, extent)
    if kind is ImageFile:
        return ImageFile(path, name, cast(Bounds, column))
    return FileSlice(path, start, extent) if kind is FileSlice else ParquetCell(path, column, start, extent)


def _bounded(record: Record) -> Record:
    """The record without captions that are too long, or too many."""
    captions, problem = usable(record.captions)
    more = len(captions) - MAX_CAPTIONS
    if not problem and more <= 0:
        return record
    if not captions:
        return replace(record, captions=(), problem=record.problem or problem)
    left_out = (*record.left_out, *[TOO_LONG] * (len(record.captions) - len(captions)), *[TOO_MANY] * more)
    return replace(record, captions=tuple(captions[:MAX_CAPTIONS]), left_out=left_out)


def _encodable(record: Record) -> Record:
    """The record with question marks in place of characters that UTF-8 cannot hold. An image with such a name becomes a reject."""
    key, image, problem, lacking, *captions = (
        encodable(text) for text in (record.key, record.image, record.problem, record.lacking, *record.captions)
    )
    source = record.source
    if image != record.image or (isinstance(source, ImageFile) and source.name != encodable(source.name)):
        source, problem = None, problem or "its name is no valid Unicode"
    texts = tuple(captions)
    return replace(record, key=key, image=image, source=source, captions=texts, problem=problem, lacking=lacking)
