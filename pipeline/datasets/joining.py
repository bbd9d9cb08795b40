"""Questions and conversations in files of their own, joined to the images of a source by name.

A name is that of the image itself, or else its end, or else its stem where that is an id: `COCO_train2014_000000000042.jpg`,
`000000000042.jpg` and 42 mean one image. The end and the stem decide only where one image and one name have them.
Memory: about 100 bytes a row of questions, and 40 bytes an image."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import counted, printable
from ..schema import OPTIONAL_COLUMNS, Question
from .arrow import ARROW
from .catalogue import BATCH, Catalogue
from .documents import document_rows
from .files import kind_of
from .grouping import Row, Rows
from .names import plain
from .parquet import PARQUET
from .questions import joined, usable
from .records import IMAGE_SUFFIXES, Record
from .rows import json_document
from .shards import asked_batches
from .tables import TABLES, Table, table_batches, text_table
from .vqa import asked_tables, is_asked

COCO_PREFIX = re.compile(r"COCO_[a-z]+\d{4}_", re.IGNORECASE)
NONE = -1  # the number of no image


@dataclass(frozen=True)
class AskedRows:
    """Rows of questions of one kind, and how many questions or conversations each has."""

    rows: Rows
    counts: np.ndarray


def read_questions(paths: Sequence[Path], options: ReadOptions) -> list[AskedRows]:
    """The questions and conversations in files, and in the files of a folder that hold some. DatasetError if one holds none."""
    options = replace(options, joined=True)
    found: list[AskedRows] = []
    documents, asked_paths = [], []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(
                each for each in path.iterdir() if each.suffix.lower() in (*TABLES, ".json") and each.is_file()
            )
        taken = 0
        for file in inside:
            try:
                if kind_of(file) == "json" and is_asked(document := json_document(file)):
                    documents.append(document)
                    asked_paths.append(file)
                else:
                    found.append(_gathered(_batches(file, options)))
                taken += 1
            except DatasetError:
                if file is path:
                    raise
        if not taken:
            raise DatasetError(f"{path} holds no file of questions; name the files themselves with --questions")
    if documents:
        found.append(_gathered(table_batches(asked_tables(documents, asked_paths), options)))
    return found


def _batches(path: Path, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    match kind_of(path):
        case "parquet":
            return asked_batches(PARQUET, path, options)
        case "arrow":
            return asked_batches(ARROW, path, options)
        case "json":
            rows = document_rows(json_document(path), path, options)
            return table_batches([Table(path, lambda: iter(rows))], options)
        case "csv" | "tsv" | "jsonl" as kind:
            return table_batches([text_table(path, kind == "jsonl", None, options)], options)
    raise DatasetError(f"{path} is no file of questions; give a table, or JSON of VQAv2, OK-VQA, GQA or LLaVA")


def _gathered(batches: Iterable[pa.RecordBatch]) -> AskedRows:
    counts: list[np.ndarray] = [np.empty(0, np.int64)]

    def watched() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            asked, talks = (pc.fill_null(pc.list_value_length(batch[name]), 0).to_numpy() for name in OPTIONAL_COLUMNS)
            counts.append(asked + talks)
            yield batch

    rows = Rows(watched())
    return AskedRows(rows, np.concatenate(counts))


class Joined:
    """The records of a source with the questions and conversations about their images. DatasetError if none is about one.

    `left_out` says how many are about other images, or nothing."""

    def __init__(self, records: Iterable[Record], asked: Sequence[AskedRows], source: Path) -> None:
        self._records = Catalogue(records)
        self.source_left_out = self._records.left_out
        self._asked = asked
        there = _names_of(self._records)
        self._images = [_images(each.rows, there) for each in asked]  # of each row
        total = sum(int(each.counts.sum()) for each in asked)
        other = sum(int(each.counts[images == NONE].sum()) for each, images in zip(asked, self._images, strict=True))
        self.left_out = f"; {counted(other, 'question')} about images that it does not have left out" if other else ""
        if len(self._records) and other == total:
            first = next((row.image for each in asked for row in each.rows.take(np.arange(len(each.rows))[:1])), None)
            raise DatasetError(
                f"none of {total:,} questions is about an image of {source}; the first one is about {printable(first or 'no image')}, "
                f"and the first image is {printable(self._records[0].image)}"
            )

    def __iter__(self) -> Iterator[Record]:
        orders = [np.argsort(images, kind="stable") for images in self._images]
        for start in range(0, len(self._records), BATCH):
            stop = min(start + BATCH, len(self._records))
            rows: dict[int, list[Row]] = {}
            for each, images, order in zip(self._asked, self._images, orders, strict=True):
                first, last = np.searchsorted(images, (start, stop), sorter=order)
                some = order[first:last]
                for image, row in zip(images[some].tolist(), each.rows.take(some), strict=True):
                    rows.setdefault(image, []).append(row)
            for number, record in enumerate(self._records[start:stop], start):
                yield _with(record, rows[number]) if number in rows else record


def _with(record: Record, rows: Sequence[Row]) -> Record:
    asked = (Question.from_row(one) for row in rows for one in row.questions or ())
    talks = (tuple(turns) for row in rows for turns in row.conversations or ())
    questions, conversations, left_out = usable([*record.questions, *joined(asked)], [*record.conversations, *talks])
    left_out = (*record.left_out, *left_out)
    return replace(record, questions=questions, conversations=conversations, left_out=left_out)


# ---- names -----------------------------------------------------------------------------------------------------------


def _end(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


def _stem(name: str) -> str:
    """The name without folders and suffix, an id without what COCO puts before it."""
    stem, suffix = os.path.splitext(_end(name))
    stem = COCO_PREFIX.sub("", stem if suffix[1:].lower() in IMAGE_SUFFIXES else stem + suffix)
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem


WAYS: tuple[Callable[[str], str], ...] = (plain, _end, _stem)


def _names_of(records: Catalogue) -> list[np.ndarray]:
    """Hashes (uint64) of each record's key, and of its image's name in all WAYS."""
    parts: list[list[np.ndarray]] = []
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        names = [record.image for record in some]
        parts.append([_hashes([record.key for record in some]), *(_hashes(list(map(way, names))) for way in WAYS)])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _hashes(names: list[str]) -> np.ndarray:
    return pl.Series(names, dtype=pl.String).hash().to_numpy()


def _images(rows: Rows, there: Sequence[np.ndarray]) -> np.ndarray:
    """The number of the image that each row is about, or NONE."""
    every, first, inverse = np.unique(rows.names, return_index=True, return_inverse=True)
    names: list[str | None] = []
    for start in range(0, len(first), BATCH):
        names += [row.image for row in rows.take(first[start : start + BATCH])]
    named = np.array([name is not None for name in names], bool)
    images = np.full(len(every), NONE, np.int64)
    if there:
        keys, *others = there
        for number, (way, hashes) in enumerate(zip((plain, *WAYS), (keys, *others), strict=True)):
            wanted = _hashes([way(name or "") for name in names])
            found = _only(hashes, wanted)
            if number > 1:  # by its end, or its stem
                _, back, counts = np.unique(wanted, return_inverse=True, return_counts=True)
                found[counts[back] > 1] = NONE
            images = np.where((images == NONE) & named, found, images)
    return images[inverse]


def _only(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of the wanted hashes stands, if it stands once; else NONE."""
    order = np.argsort(hashes, kind="stable")
    first, last = (np.searchsorted(hashes, wanted, side, sorter=order) for side in ("left", "right"))
    return np.where(last - first == 1, order[np.minimum(first, len(order) - 1)], NONE)
