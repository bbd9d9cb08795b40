"""The columns of a table: which are used, and how rows of one image become one record.

Whatever the file, its used columns become the same few columns of text (`FRAME`), grouped as columns by polars. Memory:
about three times their text; pictures inside Parquet files stay there."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from .errors import DatasetError
from .records import CAPTION_NAMES, ReadOptions, Record, encodable, image_folder, split_of, texts
from .sources import ImageFile, ParquetCell, Source

IMAGE_COLUMNS = (
    "image", "image_path", "file_name", "filename", "filepath", "file_path", "path", "file", "img", "image_name",
    "image_file", "photo", "picture", "jpg", "jpeg", "png", "webp", "url", "image_url",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
KEY_COLUMNS = ("key",)
FRAME: dict[str, pl.DataType] = {
    "image": pl.String(),  # the image's name; null: none
    "captions": pl.List(pl.String()),
    "split": pl.String(),
    "key": pl.String(),
    "file": pl.Int32(),  # which of the files holds the picture; null: none
    "group": pl.Int64(),  # row group in it
    "at": pl.Int64(),  # row in the row group
    "digest": pl.String(),  # of the picture, where it is inside and its name repeats
}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used, by their names."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    key: str | None

    @classmethod
    def choose(cls, names: Sequence[str], options: ReadOptions, path: Path) -> "Columns":
        """As the options say, or the first of the usual names that is there, whatever its case. Several captions an
        image may stand in numbered columns (`caption_0`, `caption_1` …)."""
        image = _pick(names, options.image_column, IMAGE_COLUMNS, "--image-column", path)
        caption = _pick(names, options.caption_column, CAPTION_NAMES, "--caption-column", path)
        captions = (caption,) if caption is not None else tuple(filter(_NUMBERED, names))
        for what, found in (("image", image is not None), ("caption", bool(captions))):
            if not found:
                raise DatasetError(f"{path} has no {what} column (it has {_list(names)}); name it with --{what}-column")
        assert image is not None
        split = _pick(names, options.split_column, SPLIT_COLUMNS, "--split-column", path)
        return cls(image, captions, split, _pick(names, options.key_column, KEY_COLUMNS, "--key-column", path))

    @property
    def used(self) -> list[str]:
        """All of them, once."""
        every = (self.image, *self.captions, self.split, self.key)
        return list(dict.fromkeys(name for name in every if name is not None))

    def __str__(self) -> str:
        captions = "caption column " if len(self.captions) == 1 else "caption columns "
        split = f"split column {self.split!r}" if self.split is not None else "no split column"
        key = f", key column {self.key!r}" if self.key is not None else ""
        return f"image column {self.image!r}, {captions}{', '.join(map(repr, self.captions))}, {split}{key}"

    def frame(self, rows: Sequence[dict[str, Any]], path: Path, **more: Sequence[Any]) -> pl.DataFrame:
        """Rows as objects -> the columns of FRAME; those that rows do not have in themselves come in `more`."""
        values: dict[str, Sequence[Any]] = {name: [None] * len(rows) for name in FRAME}
        try:
            values["image"] = [image_name(row.get(self.image)) for row in rows]
            values["captions"] = [[text for name in self.captions for text in texts(row.get(name))] for row in rows]
            if self.split is not None:
                values["split"] = [_text(row.get(self.split)) for row in rows]
            if self.key is not None:
                values["key"] = [_text(row.get(self.key)) for row in rows]
        except AttributeError as error:
            wrong = next(row for row in rows if not isinstance(row, dict))
            raise DatasetError(f"{path}: expected rows with named values, found {str(wrong)[:40]!r}") from error
        return pl.DataFrame({**values, **more}, schema=FRAME)


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
    """Of a path, or of a Hugging Face struct that has one; None if it is blank."""
    return (_text(value.get("path") if isinstance(value, dict) else value) or "").strip() or None


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, bytes) else encodable(str(value))


def grouped_records(frame: pl.DataFrame, paths: Sequence[Path], leaf: str, options: ReadOptions) -> Iterator[Record]:
    """FRAME's rows as records, one an image, in the order of their first rows.

    `paths` are the table's files, `leaf` their column of pictures. Rows that name no image are records with a problem."""
    frame = frame.with_row_index("row", offset=1)
    if urls := frame.filter(pl.col("image").str.contains("^https?://") & pl.col("file").is_null()).height:
        raise DatasetError(
            f"{paths[0]} holds {urls:,} image URLs, which qf does not download; fetch them with img2dataset first"
        )
    unnamed = pl.when(pl.col("image").is_null()).then("row")
    groups = frame.group_by("image", "digest", unnamed.alias("unnamed"), maintain_order=True).agg(
        pl.col("captions").list.explode(keep_nulls=False, empty_as_null=False),
        pl.col("split", "key", "file", "group", "at", "row").first(),
        pl.col("split").unique(maintain_order=True).alias("splits"),
    )
    del frame
    repeated = pl.col("digest").is_not_null() & (pl.len().over("image") > 1)  # one name, several pictures
    name = pl.when(repeated).then(pl.concat_str("image", pl.lit("#"), "digest")).otherwise(pl.col("image"))
    groups = groups.with_columns(name=name)
    folder = options.images or image_folder(paths[0].parent, groups["image"].head(100).drop_nulls().to_list())
    for part in groups.iter_slices(4096):
        for row in part.iter_rows(named=True):
            yield _record(row, paths, leaf, str(folder), options)


def _record(row: dict[str, Any], paths: Sequence[Path], leaf: str, folder: str, options: ReadOptions) -> Record:
    if row["image"] is None:
        problem = f"row {row['row']} of {paths[0].name} names no image"
        return Record(f"row {row['row']}", "", None, (), "train", problem)
    source: Source = ImageFile(folder, row["image"])
    if row["file"] is not None:
        source = ParquetCell(str(paths[row["file"]]), leaf, row["group"], row["at"])
    problem = "" if row["captions"] else "no caption"
    if len(row["splits"]) > 1:
        problem = f"its rows are in several splits: {', '.join(sorted(map(str, row['splits'])))}"
    key = row["key"] or row["name"]
    return Record(key, row["image"], source, tuple(row["captions"]), split_of(key, row["split"], options), problem)
