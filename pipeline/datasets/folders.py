"""Folders of images: with a `metadata.csv|jsonl|parquet` (the Hugging Face imagefolder convention), also one a split; or
with a text or JSON beside each image (`a.jpg`, `a.txt`).

Memory: the names in one folder at a time."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..config import ReadOptions
from ..formatting import printable
from .records import IMAGE_SUFFIXES, SPLIT_ALIASES, Record, split_in_path, split_of
from .sidecars import MAX_SIDECAR, SUFFIXES, Sidecars, UnreadableSidecar, captions_of
from .sources import ImageFile
from .tables import TABLES, read_table, renamed


def metadata_of(folder: Path) -> list[Path]:
    """The `metadata.*` in the folder, or those of its `train`, `validation`, `test` folders."""
    if found := _metadata(folder):
        return [found]
    parts = sorted(part for part in folder.iterdir() if part.is_dir() and part.name.lower() in SPLIT_ALIASES)
    return [table for part in parts if (table := _metadata(part))]


def _metadata(folder: Path) -> Path | None:
    return next((table for suffix in TABLES if (table := folder / f"metadata{suffix}").is_file()), None)


def read_metadata(folder: Path, tables: list[Path], options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of `metadata_of(folder)`. A folder is a split."""
    found, parts = [], []
    for table in tables:
        name = "" if table.parent == folder else str(table.parent.relative_to(folder))
        columns, records = read_table(table, options, name or None)
        found.append(f"{table.relative_to(folder)}: {columns}")
        parts.append((name, records))
    return "; ".join(found), (renamed(name, record) for name, records in parts for record in records)


def read_sidecars(folder: Path, options: ReadOptions) -> Iterator[Record]:
    """A record an image in the folder or below it. Captions are those in the `.json` beside it, or each line of the
    `.txt`. Folders `train`, `validation`, `test` are splits, where the `.json` names none."""
    for at, name, names in _images(str(folder), ""):
        key = printable(name)
        split = split_in_path(key)
        source, problem = ImageFile(str(folder), name), ""
        captions: list[str] = []
        if names is None:
            problem = "a link to a folder, which is not followed"
        elif key != name:
            problem = "its name is not UTF-8"
        else:
            try:
                found = _captions(at, os.path.splitext(name.rsplit("/", 1)[-1])[0], names, options)
                captions, split = found.captions, found.split or split
                if not captions:
                    problem = found.lacking(()) if found.fields else "no caption"
            except (OSError, UnreadableSidecar) as error:
                problem = f"the text beside it cannot be read: {error}"
        yield Record(key, key, None if problem else source, tuple(captions), split_of(key, split, options), problem)


def _images(folder: str, below: str) -> Iterator[tuple[str, str, set[str] | None]]:
    """(folder, image relative to the top, names in its folder), in the order of names; None for a linked folder."""
    with os.scandir(folder) as entries:
        here = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink() and entry.is_dir())
            for entry in entries
            if not entry.name.startswith(".")
        )
    names = {name for name, _, _ in here}
    for name, is_folder, is_link in here:
        if is_folder:
            yield from _images(os.path.join(folder, name), f"{below}{name}/")
        elif is_link:
            yield folder, below + name, None
        elif name.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES and "." in name:
            yield folder, below + name, names


def _captions(folder: str, stem: str, names: set[str], options: ReadOptions) -> Sidecars:
    suffixes = (*SUFFIXES, (options.caption_column or "").lstrip("."))
    beside = {suffix: f"{stem}.{suffix}" for suffix in suffixes if f"{stem}.{suffix}" in names}
    return captions_of({suffix: _sidecar(os.path.join(folder, name)) for suffix, name in beside.items()}, options)


def _sidecar(path: str) -> bytes:
    """A regular file's bytes; a link is refused, for it may lead anywhere."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        data = file.read(MAX_SIDECAR + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    if len(data) > MAX_SIDECAR:
        raise OSError(f"{os.path.basename(path)} has more than {MAX_SIDECAR} bytes")
    return data
