"""Home-made JSON documents: where the rows of a table are in one, and what their columns are called."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ..config import ReadOptions
from ..errors import DatasetError
from .columns import IMAGE_COLUMNS, USUAL
from .names import IMAGE_FOLDERS
from .records import IMAGE_SUFFIXES, SPLIT_ALIASES

WRAPPERS = ("data", "rows", "annotations", "images", "items", "records", "samples", "examples", "dataset", "captions")
MAX_WRAPPERS = 3  # one inside the other
LOOKED_AT = 20  # keys that are compared with files


def document_rows(document: Any, path: Path, options: ReadOptions) -> list[Any]:
    """The rows in a JSON document: objects, or lists of cells. DatasetError if it holds none.

    They are an array; or an array under a name; `{split: rows}`; `{image: captions}`; `{column: values}`, or what else
    pandas writes."""
    rows = _rows(document, path, options, MAX_WRAPPERS)
    if rows is not None:
        return rows
    fields = f"it has the fields {_listed(list(document))}" if isinstance(document, dict) else "it holds no objects"
    raise DatasetError(
        f"{path} is no caption JSON that qf knows: COCO captions, a Karpathy split, an array of objects, or names of images "
        f"with their captions; {fields}"
    )


def _rows(value: Any, path: Path, options: ReadOptions, depth: int) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value or not depth:
        return None
    if all(name.lower() in SPLIT_ALIASES for name in value):
        return _of_splits(value, path, options, depth)
    if _names_images(list(value), value, path, options):
        return [_of_image(name, captions) for name, captions in value.items()]
    if (columns := _columns(value, options)) is not None:
        return columns
    if all(isinstance(row, dict) and _has_image(row) for row in value.values()):
        return list(value.values())  # pandas' orient="index"
    under = [name for name in value if _is_table(value[name])]
    usual = [name for name in WRAPPERS if name in under] or [
        name for name in WRAPPERS if isinstance(value.get(name), dict)
    ]
    chosen = usual[0] if usual else under[0] if len(under) == 1 else None
    return None if chosen is None else _rows(value[chosen], path, options, depth - 1)


def _has_image(row: Mapping[str, Any]) -> bool:
    return any(name.lower() in IMAGE_COLUMNS and isinstance(cell, str) for name, cell in row.items())


def _is_table(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict | list) for row in value)


def _of_splits(value: Mapping[str, Any], path: Path, options: ReadOptions, depth: int) -> list[Any] | None:
    """`{"train": rows, "val": rows}`: the rows of all splits, each with its own."""
    found: list[Any] = []
    for split, some in value.items():
        rows = _rows(some, path, options, depth - 1)
        if rows is None or not all(isinstance(row, dict) for row in rows):
            return None
        found += [{"split": split, **row} for row in rows]
    return found


def _of_image(name: str, captions: Any) -> dict[str, Any]:
    if isinstance(captions, dict):
        return {"image": name, **{field: value for field, value in captions.items() if field != "image"}}
    return {"image": name, "caption": captions}


def _names_images(names: Sequence[str], value: Mapping[str, Any], path: Path, options: ReadOptions) -> bool:
    """Whether the names of an object are those of images: most end like ones, or are files but for their suffixes."""
    if not all(isinstance(captions, str | list | dict) for captions in value.values()):
        return False
    if 2 * sum(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and "." in name for name in names) > len(names):
        return True
    if any(name.lower() in USUAL for name in names):
        return False
    folders = [options.images or path.parent, *(path.parent / folder for folder in IMAGE_FOLDERS)]
    there = {entry.stem for folder in folders if folder.is_dir() for entry in folder.iterdir()}
    looked_at = [name.rpartition("/")[2] for name in names[:LOOKED_AT]]
    return all(isinstance(captions, str | list) for captions in value.values()) and 2 * sum(
        name in there for name in looked_at
    ) > len(looked_at)


def _columns(value: Mapping[str, Any], options: ReadOptions) -> list[Any] | None:
    """The rows of `{column: [values]}`, `{column: {row: value}}` or `{"columns": names, "data": [[cell]]}`."""
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]
    asked = {options.image_column, options.caption_column, options.question_column, options.conversation_column}
    if len(value) < 2 or not any(name.strip().lower() in USUAL or name in asked for name in value):
        return None
    if all(isinstance(column, dict) for column in value.values()):
        rows = list(dict.fromkeys(row for column in value.values() for row in column))
        return [{name: column.get(row) for name, column in value.items()} for row in rows]
    if all(isinstance(column, list) for column in value.values()) and len(set(map(len, value.values()))) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
