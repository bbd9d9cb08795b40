"""Folders of images: with a `metadata.csv|jsonl|parquet` (the Hugging Face imagefolder convention), in it or in folders
below; with a text or JSON beside each image (`a.jpg`, `a.txt`); or without any caption.

Memory: the names in one folder at a time, and about 300 bytes a link."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import ReadOptions
from ..formatting import counted, printable
from .look import Listed, Look, PassedOver, is_picture, walk
from .records import IMAGE_SUFFIXES, SPLIT_ALIASES, Record, bounds_of, split_in_path, split_of
from .sidecars import MAX_SIDECAR, SUFFIXES, Sidecars, UnreadableSidecar, captions_of
from .sources import ImageFile
from .tables import TABLES, read_table, renamed

UNREADABLE = "the text beside it cannot be read"  # how such a problem begins


def metadata_of(look: Look) -> list[Path]:
    """The `metadata.*` of a folder, one a folder: its own, or those of the folders below."""
    found: dict[Path, Path] = {}
    for suffix in TABLES:
        for path in look.of("parquet" if suffix == ".parquet" else "table"):
            if path.name == f"metadata{suffix}":
                found.setdefault(path.parent, path)
    return [found[look.folder]] if look.folder in found else [found[folder] for folder in sorted(found)]


def read_metadata(folder: Path, tables: Sequence[Path], options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of `metadata_of` a folder. Folders named after a split are one. The
    names in the tables may not leave the folder of their table."""
    options = replace(options, names_stay=True)
    found, parts = [], []
    for table in tables:
        name = "" if table.parent == folder else table.parent.relative_to(folder).as_posix()
        first = name.split("/")[0]
        columns, records = read_table(table, options, first if first.lower() in SPLIT_ALIASES else None)
        found.append(f"{table.relative_to(folder)}: {columns}")
        parts.append((name, records))
    if len(found) > 4:
        found[4:] = [f"and {len(found) - 4:,} more"]
    return "; ".join(found), (renamed(name, record) for name, records in parts for record in records)


def read_sidecars(look: Look, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and a record an image in the folder or below it. Captions are those in the `.json`
    beside it, or each line of the `.txt`. Folders `train`, `validation`, `test` are splits, where the `.json` names none.

    A picture and the links to it are one record, with the captions of all its names."""
    links, more = _links(look)
    return "images with a .txt or .json beside each" + _again(more), _records(look, links, options, captioned=True)


def read_pictures(look: Look, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and a record without captions for each image in the folder or below it.

    A picture and the links to it are one record. All are `train`, which means nothing without captions, unless folders are
    named `validation` or `test`, or splits are to be drawn."""
    links, more = _links(look)
    found = f"{counted(look.pictures - more, 'picture')} without captions" + _again(more)
    if look.captioned:
        found += "; no caption in the text or JSON beside some (--caption-column NAME takes a field of a JSON)"
    return found, _records(look, links, options, captioned=False)


def holds_captions(look: Look, options: ReadOptions) -> bool:
    """Whether a text or JSON beside an image holds a caption, or cannot be read. Looks at one after the other."""
    records = read_sidecars(look, options)[1] if look.captioned else ()
    return any(record.captions or record.problem.startswith(UNREADABLE) for record in records)


def _again(more: int) -> str:
    return f"; {more:,} links name a picture again" if more else ""


def _records(look: Look, links: dict[str, list[str]], options: ReadOptions, captioned: bool) -> Iterator[Record]:
    """The pictures of a folder, with the captions beside them if they are `captioned`."""
    for file in walk(look.folder, options.confine, PassedOver()):
        if file.refused:
            problem = "a link to a folder outside, which --confine refuses"
            yield Record(file.name, file.name, None, (), "train", problem)
        elif is_picture(file):
            names = links.get(os.path.realpath(file.path), [file.name]) if links else [file.name]
            if names[0] == file.name:
                yield _record(look, file, names[1:], options, captioned)


def _links(look: Look) -> tuple[dict[str, list[str]], int]:
    """The names of each picture that links name, its own first if it is one of the folder's; and how many names are more
    than one a picture."""
    top = os.path.join(os.path.realpath(look.folder), "")
    every: dict[str, list[str]] = {}
    for real, names in look.links.items():
        own = os.path.relpath(real, top) if real.startswith(top) else ""
        visible = bool(own) and not any(part.startswith(".") for part in own.split("/"))
        is_own = visible and os.path.isfile(real) and os.path.splitext(own)[1][1:].lower() in IMAGE_SUFFIXES
        every[real] = [own, *(name for name in names if name != own)] if is_own else names
    return every, sum(len(names) - 1 for names in every.values())


def _record(look: Look, file: Listed, others: Sequence[str], options: ReadOptions, captioned: bool) -> Record:
    key = printable(file.name)
    split = split_in_path(key)
    source, problem, lacking = ImageFile(str(look.folder), file.name, bounds_of(options)), "", ""
    captions: list[str] = []
    if key != file.name:
        problem = "its name is not UTF-8"
    elif not captioned:
        split = split or "train"
    else:
        try:
            every = [_beside(file.path, lambda name: name in file.beside, options)]
            every += [_beside(os.path.join(look.folder, other), None, options) for other in others]
            for found in every:
                captions += (caption for caption in found.captions if found is every[0] or caption not in captions)
                split = found.split or split
            lacking = every[0].lacking(()) if every[0].fields else ""
        except (OSError, UnreadableSidecar) as error:
            problem = f"{UNREADABLE}: {error}"
    split = split_of(key, split, options)
    return Record(key, key, None if problem else source, tuple(captions), split, problem, lacking=lacking)


def _beside(image: str, is_there: Callable[[str], bool] | None, options: ReadOptions) -> Sidecars:
    """The captions beside an image: in `a.json` or `a.jpg.json`, and so on. `is_there` tells whether its folder holds a
    name."""
    folder, base = os.path.split(image)
    parts: dict[str, bytes] = {}
    for suffix in (*SUFFIXES, (options.caption_column or "").lstrip(".")):
        for name in (f"{stem}.{end}" for stem in (os.path.splitext(base)[0], base) for end in (suffix, suffix.upper())):
            path = os.path.join(folder, name)
            if suffix and suffix not in parts and (is_there(name) if is_there else os.path.lexists(path)):
                parts[suffix] = _sidecar(path, options.confine)
    return captions_of(parts, options)


def _sidecar(path: str, confine: bool) -> bytes:
    """A regular file's bytes. Where links are confined, a link is refused, for it may lead anywhere."""
    flags = os.O_RDONLY | os.O_NONBLOCK | (os.O_NOFOLLOW if confine else 0)
    with open(os.open(path, flags), "rb") as file:
        data = file.read(MAX_SIDECAR + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    if len(data) > MAX_SIDECAR:
        raise OSError(f"{os.path.basename(path)} has more than {MAX_SIDECAR} bytes")
    return data
