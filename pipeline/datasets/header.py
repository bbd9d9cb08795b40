"""The line of names in a table of plain rows, or its absence: then columns have numbers from 1 on, and the first rows tell
which of them holds pictures and which captions."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import USUAL, is_url
from .embedded import is_embedded
from .names import IMAGE_FOLDERS
from .records import IMAGE_SUFFIXES, SPLIT_ALIASES

OTHER_TEXTS = ("question_column", "answer_column", "type_column", "conversation_column")
LOOKED_AT = 50  # rows that tell what a column holds


@dataclass(frozen=True)
class Header:
    """The names of a table's columns, and whether its first row holds them. Without one, `options` name columns by their
    numbers."""

    names: list[str]
    present: bool
    options: ReadOptions


def find_header(first: Sequence[Sequence[Any]], options: ReadOptions, path: Path) -> Header:
    """The header of a table that begins with these rows. DatasetError if it has none and its columns are not certain."""
    names = [str(cell).strip() for cell in first[0]]
    if names and names[0].lstrip("# ").lower() in USUAL:
        names[0] = names[0].lstrip("# ")
    if not options.no_header and not _is_data(first, options, path):
        return Header(names, True, options)
    numbers = [str(number) for number in range(1, 1 + max(map(len, first)))]

    def numbered(name: str | None) -> str | None:
        """A column that is named by its number, or by its cell in the first row."""
        return str(1 + names.index(name)) if name in names and name not in numbers else name

    image = numbered(options.image_column) or _one(
        [n for n in numbers if _holds(first, n, lambda cell: _is_picture(cell, options, path))]
    )
    others = [n for n in numbers if n != image]
    split = numbered(options.split_column) or _one(
        [n for n in others if _holds(first, n, lambda cell: str(cell).strip().lower() in SPLIT_ALIASES)]
    )
    key = numbered(options.key_column)
    texts: dict[str, Any] = {name: numbered(getattr(options, name)) for name in OTHER_TEXTS}
    others = [n for n in others if n not in (split, key, *texts.values())]
    asked = bool(texts["question_column"] or texts["conversation_column"])
    caption = numbered(options.caption_column)
    if not asked:
        caption = caption or _one([n for n in others if _holds(first, n, _is_text)]) or _one(others)
    if image is not None and any(is_url(cell) for cell in _cells(first, image)):
        caption = caption or image  # the URLs are told first
    if image is None or (caption is None and not (asked or options.questions or options.allow_uncaptioned)):
        raise DatasetError(
            f"{path} has no line of column names: its first line is {_shown(names)}; give --no-header with "
            f"--image-column {image or 'N'} and --caption-column {caption or 'N'} (columns count from 1)"
        )
    chosen = replace(options, image_column=image, caption_column=caption, split_column=split, key_column=key, **texts)
    return Header(numbers, False, chosen)


def asked_columns(options: ReadOptions) -> tuple[str | None, ...]:
    """The columns that the options name."""
    texts = (getattr(options, name) for name in OTHER_TEXTS)
    return options.image_column, options.caption_column, options.split_column, options.key_column, *texts


def _is_data(first: Sequence[Sequence[Any]], options: ReadOptions, path: Path) -> bool:
    """Whether the first row is data: one of its cells is a picture, and none the name of a column."""
    cells = [cell for cell in first[0] if isinstance(cell, str)]
    if len(cells) < len(first[0]) or any(map(_names_picture, cells)):
        return True
    if any(cell.strip().lower() in USUAL or cell.strip() in asked_columns(options) for cell in cells):
        return False
    return any(_holds(first, str(1 + n), lambda cell: _is_picture(cell, options, path)) for n in range(len(cells)))


def _cells(first: Sequence[Sequence[Any]], column: str) -> list[Any]:
    at = int(column) - 1 if column.isdecimal() else len(column)
    return [row[at] for row in first[:LOOKED_AT] if at < len(row)]


def _holds(first: Sequence[Sequence[Any]], column: str, test: Callable[[Any], bool]) -> bool:
    """Whether nearly all cells of a column pass a test."""
    cells = [cell for cell in _cells(first, column) if cell not in (None, "")]
    return bool(cells) and sum(map(test, cells)) >= 0.9 * len(cells)


def _one(columns: list[str]) -> str | None:
    return columns[0] if len(columns) == 1 else None


def _is_picture(cell: Any, options: ReadOptions, path: Path) -> bool:
    if not isinstance(cell, str) or not cell.strip() or _names_picture(cell):
        return isinstance(cell, str) and _names_picture(cell)
    folders = [options.images or path.parent, *(path.parent / name for name in IMAGE_FOLDERS)]
    return any(os.path.isfile(folder / cell.strip()) for folder in folders)


def _names_picture(cell: str) -> bool:
    """Whether a cell is a URL, a name that ends as those of pictures do, or a picture itself."""
    stem, dot, suffix = cell.strip().rpartition(".")
    return is_url(cell) or (bool(stem and dot) and suffix.lower() in IMAGE_SUFFIXES) or is_embedded(cell)


def _is_text(cell: Any) -> bool:
    """Whether a cell holds words, or a list."""
    return not isinstance(cell, str) or len(re.findall(r"[^\W\d_]+", cell)) > 1


def _shown(names: list[str]) -> str:
    line = ", ".join(names)
    return repr(line if len(line) <= 80 else line[:79] + "…")
