"""Rows of one image to one record.

The rows of a table lie in a temporary file. Only a hash of each image's name stays in memory, to find the rows of one image.
Memory: about 60 bytes a row, and the rows of a batch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from ..config import ReadOptions
from ..images import UnreadableImage
from ..schema import Question
from .captions import TOO_LONG
from .columns import ROWS, is_url, urls_inside
from .names import image_folder, images_below, names_in
from .questions import joined, usable
from .records import SPLIT_ALIASES, Record, bounds_of, split_in_path, split_of
from .sources import ImageFile, ImageSource, load
from .spool import spool

BLANK = "rows without a caption that can be used"
BATCH = 4096  # images whose rows are joined at once
Picture = Callable[[int, int, int], ImageSource]  # the source of a picture inside, from the columns file, group, at


class Row(NamedTuple):
    """A row: the columns ROWS."""

    image: str | None
    captions: list[str] | None
    split: str | None
    key: str | None
    file: int | None
    group: int
    at: int
    problem: str | None
    questions: list[dict[str, Any]] | None
    conversations: list[list[str]] | None


class Rows:
    """The rows of a table, spooled: batches of the columns ROWS."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        hashes: list[np.ndarray] = [np.empty(0, np.uint64)]
        lengths: list[int] = []

        def watched() -> Iterator[pa.RecordBatch]:
            count = 0
            for batch in batches:
                unnamed = batch["image"].is_null().to_numpy(zero_copy_only=False)  # these rows belong to no group
                numbers = np.arange(count, count + len(batch), dtype=np.uint64)
                hashes.append(np.where(unnamed, numbers, pl.Series(batch["image"]).hash().to_numpy()))
                lengths.append(len(batch))
                count += len(batch)
                yield batch

        self._reader = spool(ROWS, watched())
        self.names: np.ndarray = np.concatenate(hashes)  # a hash of each row's image name
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> list[Row]:
        """These rows, in this order."""
        found: list[Any] = [None] * len(rows)
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(batches):
            places = np.flatnonzero(batches == number)
            part = self._reader.get_batch(number).take(pa.array(rows[places] - self._starts[number]))
            values = zip(*(column.to_pylist() for column in part.columns), strict=True)
            for place, row in zip(places, values, strict=True):
                found[place] = Row._make(row)
        return found


def picture_digests(rows: Rows, picture: Picture) -> np.ndarray | None:
    """A digest (uint64) of each picture inside whose name repeats, 0 for others; None if no name of such a picture does:
    are they rows of one picture, or pictures of one name? Where all pictures of a name are equal, theirs is 0 too.

    Reads the pictures of such names once, in their order; about 100 bytes of memory for each such row."""
    order = np.sort(rows.names)
    repeated = np.flatnonzero(np.isin(rows.names, order[1:][order[1:] == order[:-1]]))
    if not len(repeated):
        return None
    digests = np.zeros(len(rows), np.uint64)
    for start in range(0, len(repeated), BATCH):
        part = repeated[start : start + BATCH]
        for number, row in zip(part.tolist(), rows.take(part), strict=True):
            if row.file is not None:
                digests[number] = _digest(picture(row.file, row.group, row.at))
    several = _several(rows.names[repeated], digests[repeated])
    digests[repeated[~several]] = 0
    return digests


def _digest(source: ImageSource) -> int:
    """A hash of a picture inside; of its place if it cannot be read."""
    try:
        data = load(source)
    except UnreadableImage:
        data = repr(source).encode()
    assert isinstance(data, bytes)
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def _several(names: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Whether each name is that of more than one digest."""
    pairs = np.unique(np.stack([names, digests]), axis=1)[0]
    return np.isin(names, pairs[1:][pairs[1:] == pairs[:-1]])


def grouped_records(
    rows: Rows,
    paths: Sequence[Path],
    picture: Picture | None,
    options: ReadOptions,
    digests: np.ndarray | None = None,
) -> Iterator[Record]:
    """A table's rows as records, one an image, in the order of their first rows.

    `paths` are the table's files; `picture` gives a picture inside one; `digests` (uint64, 0: none) are those of the
    pictures whose name repeats. Rows that name no image are records with a problem."""
    first = [row.image for row in rows.take(np.arange(min(100, len(rows)))) if row.image and row.file is None]
    folder = str(images_below(options.images, first) if options.images else image_folder(paths[0], first))
    names = _files(rows, folder)
    same = names if digests is None else names ^ digests
    odd = names != rows.names  # rows whose image has another name on disk
    order = np.argsort(same, kind="stable")
    begins = np.flatnonzero(np.append(True, same[order][1:] != same[order][:-1])[: len(rows)])
    ends = np.append(begins[1:], len(rows))
    sequence = np.argsort(order[begins])  # groups by their first rows
    for start in range(0, len(sequence), BATCH):
        groups = [order[begins[g] : ends[g]] for g in sequence[start : start + BATCH]]
        taken = np.concatenate(groups)
        numbered = zip(taken.tolist(), rows.take(taken), strict=True)
        for group in groups:
            yield from _records([next(numbered) for _ in group], paths, picture, folder, options, digests, odd)


def _files(rows: Rows, folder: str) -> np.ndarray:
    """A hash (uint64) of each row's file: of the image's name, or of that which the file has if it is only nearly right."""
    every, first, inverse = np.unique(rows.names, return_index=True, return_inverse=True)
    files = every.copy()
    for start in range(0, len(first), BATCH):
        for number, row in enumerate(rows.take(first[start : start + BATCH]), start):
            if row.image is not None and row.file is None and not is_url(row.image):
                match = names_in(folder).find(row.image)
                if match.name != row.image:
                    files[number] = pl.Series([match.name]).hash()[0]
    return files[inverse]


def _records(
    group: list[tuple[int, Row]],
    paths: Sequence[Path],
    picture: Picture | None,
    folder: str,
    options: ReadOptions,
    digests: np.ndarray | None,
    odd: np.ndarray,
) -> Iterator[Record]:
    """Rows whose hashes are equal: one image, a row without one, or names whose hashes happen to meet."""
    images: dict[Any, list[tuple[int, Row]]] = {}
    for number, row in group:
        name = row.image if row.image is None or not odd[number] else names_in(folder).find(row.image).name
        images.setdefault(number if name is None else name, []).append((number, row))
    for every in images.values():
        number, begin = every[0]
        image, key, file, some = begin.image, begin.key, begin.file, [row for _, row in every]
        if image is None:
            files = paths[0].name if len(paths) == 1 else f"{paths[0].name} … {paths[-1].name}"
            problem = f"row {number + 1} of {files} names no image"
            yield Record(f"row {number + 1}", "", None, (), "train", problem)
            continue
        if file is None and is_url(image):
            raise urls_inside(paths[0])
        captions = tuple(text for row in some for text in row.captions or ())
        asked = (Question.from_row(one) for row in some for one in row.questions or ())
        talks = (tuple(turns) for row in some for turns in row.conversations or ())
        questions, conversations, left_out = usable(joined(asked), talks)
        problem = ""
        lacking = "no caption, and no question or conversation that can be used" if left_out else ""
        if questions or conversations:
            captions = tuple(dict.fromkeys(captions))  # a caption stands again beside each question
        if captions or questions or conversations:
            left_out += tuple(TOO_LONG if row.captions else BLANK for row in some if _lacks(row))
        else:
            problem = next((row.problem for row in some if row.problem), "")
        named = (row.split.strip() for row in some if row.split and row.split.strip())
        splits = sorted({SPLIT_ALIASES.get(name.lower(), name) for name in named})
        if len(splits) > 1 and not options.redraw_splits:
            problem = f"its rows are in several splits: {', '.join(splits)}"
        source: ImageSource
        if picture is None or file is None:
            match = names_in(folder).find(image)
            source = ImageFile(folder, match.name, bounds_of(options))
            problem = problem or match.problem
        else:
            source = picture(file, begin.group, begin.at)
        key = key or (f"{image}#{digests[number]:016x}" if digests is not None and digests[number] else image)
        split = next(iter(splits), None)
        if split is None and file is None:
            split = split_in_path(image)
        split = split_of(key, split, options)
        yield Record(key, image, source, captions, split, problem, left_out, lacking, questions, conversations)


def _lacks(row: Row) -> bool:
    """Whether a row has no text, or fewer captions than it should."""
    return bool(row.problem) or not (row.captions or row.questions or row.conversations)
