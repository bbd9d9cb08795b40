"""The columns of a table: which of them are used, and how rows of one image become one record.

The used columns of any table become the same few (`ROWS`), in a temporary file. Only a hash of each image's name stays in
memory, to find the rows of one image. Memory: about 60 bytes a row, and the rows of a batch."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import encodable
from ..images import UnreadableImage
from ..schema import TYPES
from .captions import CAPTION_NAMES, TOO_LONG, cell_captions, spells_lists
from .embedded import picture_in
from .names import image_folder, images_below, names_in, plain
from .records import SPLIT_ALIASES, Record, bounds_of, split_in_path, split_of
from .sources import ImageFile, ImageSource, load
from .spool import PictureSpool, spool

IMAGE_COLUMNS = (
    "image", "image_path", "file_name", "filename", "filepath", "file_path", "path", "file", "img", "image_name",
    "image_file", "image_filename", "img_path", "photo", "picture", "jpg", "jpeg", "png", "webp", "url", "image_url",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
KEY_COLUMNS = ("key", "__key__")
USUAL = frozenset((*IMAGE_COLUMNS, *CAPTION_NAMES, *SPLIT_COLUMNS, *KEY_COLUMNS))
ROWS = pa.schema(
    [
        *((name, TYPES[name]) for name in ("image", "captions", "split", "key")),  # no image: null
        ("file", pa.int32()),  # which of the table's files holds the picture; null: none
        ("group", pa.int32()),  # where it is there: row group and row, or size and byte
        ("at", pa.int64()),
        ("problem", pa.string()),  # why the row has no captions, or fewer
    ]
)

URLS = ("http://", "https://")
BLANK = "rows without a caption that can be used"
BATCH = 4096  # images whose rows are joined at once
Picture = Callable[[int, int, int], ImageSource]  # the source of a picture inside, from the columns file, group, at


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that are used, by their names."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    key: str | None
    header: bool = True  # whether the table has a line of names; otherwise they are numbers from 1 on
    lists: frozenset[str] = frozenset()  # caption columns whose cells spell lists, as text

    @classmethod
    def choose(
        cls, names: Sequence[str], options: ReadOptions, path: Path, first: Sequence[Any] = ()
    ) -> "TableColumns":
        """The columns that the options name, or else the first usual name that is there, in upper or lower case.

        The captions may stand in numbered columns (`caption_0`, `caption_1` …), or in none where images without a caption
        are kept. DatasetError if a column is missing; the `first` rows help to say why."""
        image = _pick(names, options.image_column, IMAGE_COLUMNS, "--image-column", path)
        caption = _pick(names, options.caption_column, CAPTION_NAMES, "--caption-column", path)
        captions = (caption,) if caption is not None else tuple(filter(_NUMBERED, names))
        for what, found in (("image", image is not None), ("caption", bool(captions) or options.allow_uncaptioned)):
            if not found:
                if any(is_url(cell) for row in first[:100] if isinstance(row, dict) for cell in row.values()):
                    raise urls_inside(path)
                more = ", or keep its images without captions: --allow-uncaptioned" if what == "caption" else ""
                raise DatasetError(
                    f"{path} has no {what} column (it has {_list(names)}); name it with --{what}-column{more}"
                )
        assert image is not None
        split = _pick(names, options.split_column, SPLIT_COLUMNS, "--split-column", path)
        return cls(image, captions, split, _pick(names, options.key_column, KEY_COLUMNS, "--key-column", path))

    def looking_at(self, rows: Iterable[Any]) -> "TableColumns":
        """The same columns, with `lists` as the first rows of the table show them."""
        some = [row for row in rows if isinstance(row, dict)]
        return replace(
            self, lists=frozenset(name for name in self.captions if spells_lists([row.get(name) for row in some]))
        )

    @property
    def used(self) -> list[str]:
        """The names of all used columns, each once."""
        every = (self.image, *self.captions, self.split, self.key)
        return list(dict.fromkeys(name for name in every if name is not None))

    def __str__(self) -> str:
        captions = ", ".join(map(repr, self.captions))
        noun = {0: "no caption column", 1: "caption column "}.get(len(self.captions), "caption columns ")
        split = f"split column {self.split!r}" if self.split is not None else "no split column"
        key = f", key column {self.key!r}" if self.key is not None else ""
        lists = " (lists)" if self.lists else ""
        header = "" if self.header else "no line of column names, "
        return f"{header}image column {self.image!r}, {noun}{captions}{lists}, {split}{key}"

    def batch(
        self,
        rows: Sequence[dict[str, Any]],
        path: Path,
        pictures: PictureSpool | None = None,
        **more: Sequence[Any],
    ) -> pa.RecordBatch:
        """Rows as objects -> a batch with the columns ROWS. Pictures in cells of text go to `pictures`. `more` gives
        columns that the rows do not hold."""
        values: dict[str, Sequence[Any]] = {name: [None] * len(rows) for name in ROWS.names}
        try:
            images = [picture_in(row.get(self.image)) if pictures else (None, row.get(self.image)) for row in rows]
            values["image"] = [image_name(name) or (data and f"{path.name}#{_sha(data)}") for data, name in images]
            if pictures and any(data for data, _ in images):
                values["file"] = [data and 0 for data, _ in images]
                values["group"] = [data and len(data) for data, _ in images]
                values["at"] = [data and pictures.add(data) for data, _ in images]
            found = [[cell_captions(row.get(name), name in self.lists) for name in self.captions] for row in rows]
            values["captions"] = [[text for captions, _ in cells for text in captions] for cells in found]
            values["problem"] = [next((problem for _, problem in cells if problem), None) for cells in found]
            if self.split is not None:
                values["split"] = [_text(row.get(self.split)) for row in rows]
            if self.key is not None:
                values["key"] = [_text(row.get(self.key)) for row in rows]
        except RecursionError as error:
            raise DatasetError(f"{path}: a caption is nested too deep") from error
        except AttributeError as error:
            wrong = next(row for row in rows if not isinstance(row, dict))
            raise DatasetError(f"{path}: expected rows with named values, found {str(wrong)[:40]!r}") from error
        return pa.RecordBatch.from_pydict({**values, **more}, schema=ROWS)


_NUMBERED = re.compile(r"(caption|sentence|text|comment)[ _-]?\d+", re.IGNORECASE).fullmatch


def _pick(names: Sequence[str], wanted: str | None, usual: Iterable[str], option: str, path: Path) -> str | None:
    if wanted is None:
        by_name = {name.strip().lower(): name for name in reversed(names)}
        wanted = next((by_name[name] for name in usual if name in by_name), None)
    elif wanted not in names:
        raise DatasetError(f"{path} has no column {wanted!r} (it has {_list(names)}); check {option}")
    if wanted is not None and list(names).count(wanted) > 1:
        raise DatasetError(f"{path} has two columns named {wanted!r}; rename one of them")
    return wanted


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def image_name(value: Any) -> str | None:
    """The name in a path, or in a Hugging Face struct with a path, without `./` and doubled slashes; None if it is blank."""
    name = (_text(value.get("path") if isinstance(value, dict) else value) or "").strip()
    return plain(name) or None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_url(value: Any) -> bool:
    """Whether a value is a URL, in any case of its letters."""
    return isinstance(value, str) and value.lstrip()[:8].lower().startswith(URLS)


def urls_inside(path: Path) -> DatasetError:
    return DatasetError(f"{path} holds image URLs, which qf does not download; fetch them with img2dataset first")


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, bytes) else encodable(str(value))


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

    def take(self, rows: np.ndarray) -> list[tuple[Any, ...]]:
        """These rows, as tuples of the columns ROWS."""
        found: list[tuple[Any, ...]] = [()] * len(rows)
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(batches):
            places = np.flatnonzero(batches == number)
            part = self._reader.get_batch(number).take(pa.array(rows[places] - self._starts[number]))
            values = zip(*(column.to_pylist() for column in part.columns), strict=True)
            for place, row in zip(places, values, strict=True):
                found[place] = row
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
        for row, (*_, file, group, at, _) in zip(part.tolist(), rows.take(part), strict=True):
            if file is not None:
                digests[row] = _digest(picture(file, group, at))
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
    first = [row[0] for row in rows.take(np.arange(min(100, len(rows)))) if row[0] and row[4] is None]
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
        for number, (image, _, _, _, inside, *_) in enumerate(rows.take(first[start : start + BATCH]), start):
            if image is not None and inside is None and not is_url(image):
                match = names_in(folder).find(image)
                if match.name != image:
                    files[number] = pl.Series([match.name]).hash()[0]
    return files[inverse]


def _records(
    group: list[tuple[int, tuple[Any, ...]]],
    paths: Sequence[Path],
    picture: Picture | None,
    folder: str,
    options: ReadOptions,
    digests: np.ndarray | None,
    odd: np.ndarray,
) -> Iterator[Record]:
    """Rows whose hashes are equal: one image, a row without one, or names whose hashes happen to meet."""
    images: dict[Any, list[tuple[int, tuple[Any, ...]]]] = {}
    for number, row in group:
        file = names_in(folder).find(row[0]).name if odd[number] else row[0]
        images.setdefault(number if row[0] is None else file, []).append((number, row))
    for every in images.values():
        number, (image, _, _, key, file, part, at, _) = every[0]
        if image is None:
            files = paths[0].name if len(paths) == 1 else f"{paths[0].name} … {paths[-1].name}"
            problem = f"row {number + 1} of {files} names no image"
            yield Record(f"row {number + 1}", "", None, (), "train", problem)
            continue
        if file is None and is_url(image):
            raise urls_inside(paths[0])
        captions = tuple(text for _, row in every for text in row[1])
        problem = ""
        left_out: tuple[str, ...] = ()
        if captions:
            left_out = tuple(TOO_LONG if row[1] else BLANK for _, row in every if row[-1] or not row[1])
        else:
            problem = next((row[-1] for _, row in every if row[-1]), "")
        named = (row[2].strip() for _, row in every if row[2] and row[2].strip())
        splits = sorted({SPLIT_ALIASES.get(name.lower(), name) for name in named})
        if len(splits) > 1 and not options.redraw_splits:
            problem = f"its rows are in several splits: {', '.join(splits)}"
        source: ImageSource
        if picture is None or file is None:
            match = names_in(folder).find(image)
            source = ImageFile(folder, match.name, bounds_of(options))
            problem = problem or match.problem
        else:
            source = picture(file, part, at)
        key = key or (f"{image}#{digests[number]:016x}" if digests is not None and digests[number] else image)
        split = next(iter(splits), None)
        if split is None and file is None:
            split = split_in_path(image)
        yield Record(key, image, source, captions, split_of(key, split, options), problem, left_out)
