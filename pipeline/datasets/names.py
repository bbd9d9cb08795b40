"""The file that a name in a dataset means: the name as it is, or else the one file whose name is nearly it.

Tables travel between systems: accents are composed or not, case changes, slashes turn, suffixes and folders get lost, blanks
are percent-encoded. A file is taken where it is the only one that the name can mean; otherwise the reason says what is there.
Memory: the names of a few folders, read when a name is missing."""

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..formatting import printable
from .records import IMAGE_SUFFIXES

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images")
ANNOTATION_FOLDERS = (
    "annotation",
    "annotations",
    "captions",
    "flickr8k_text",
    "labels",
    "metadata",
    "splits",
)  # beside those of images
MAX_LISTED = 1_000_000  # names in a folder; in a larger one no near name is looked for
MAX_WALKED = 10_000  # folders below --images
NEARLY = 10  # names of a table that tell where the images are, if only nearly right
MAX_FOLDERS = 100  # below a table's folder, in which images are looked for


@dataclass(frozen=True, slots=True)
class Match:
    """The file that a name means, below the folder or absolute, and whether it is there. `problem`: several or none are
    nearly it, and which."""

    name: str
    found: bool
    problem: str = ""


class Names:
    """The files of one folder, by names that are right or nearly right."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._real = os.path.join(os.path.abspath(folder), "")
        self._prefix: tuple[str, ...] | None = None  # that leads to the folder on the machine the names come from

    def find(self, name: str) -> Match:
        """The file that `name` means. The same file has one name, however `name` is spelled."""
        name = plain(name)
        if self._is_there(name):
            return Match(os.path.relpath(name, self._real) if name.startswith(self._real) else name, True)
        spellings = _spellings(name)
        for spelling in spellings[1:]:
            if self._is_there(spelling):
                return self.find(spelling)
        near: list[str] = []
        for spelling in spellings:
            parts = _parts(spelling)
            if ".." in parts:
                continue
            if not _is_absolute(spelling):
                near = near or self._near(parts)
            elif not near:
                near = self._tail(spelling[:2] if spelling[1:2] == ":" else "", parts)
        if len(near) == 1:
            return Match(near[0], True)
        return Match(name, False, self._reason(near, spellings[-1]))

    def _is_there(self, name: str) -> bool:
        """Whether something that is no folder has this name, a broken link included."""
        try:
            return bool(name) and not stat.S_ISDIR(os.lstat(os.path.join(self.folder, name)).st_mode)
        except (OSError, ValueError):  # missing, too long, or not even a name
            return False

    def _tail(self, drive: str, parts: Sequence[str]) -> list[str]:
        """Files below the folder, for an absolute path of another machine: the longest end of it that is there. Only the
        first one decides how much is left out in front, so that no two paths can mean one file."""
        for start in range(len(parts)):
            prefix = tuple(map(_folded, (drive, *parts[:start])))
            if self._prefix in (None, prefix) and (near := self._near(parts[start:])):
                self._prefix = prefix
                return near
        return []

    def _near(self, parts: Sequence[str]) -> list[str]:
        """The files below the folder, at most a few, that the parts of a path nearly name."""
        found = [""]
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            longer: list[str] = []
            for start in found[:4]:
                listing = _listing(os.path.join(self.folder, start))
                same = listing.same(part)
                if last:
                    same = [name for name in same if self._is_there(os.path.join(start, name))] or listing.longer(part)
                longer += [os.path.join(start, name) for name in same]
            found = longer
        return found if parts else []

    def _reason(self, near: Sequence[str], name: str) -> str:
        """The reason why no file is certain, or nothing if none is near."""
        if near:
            return f"no such file; nearly it are {' and '.join(map(printable, near[:3]))}: write the one that it is"
        parts = _parts(name)
        if not parts:
            return ""
        for archive in _listing(self.folder).zips:
            if _folded(parts[-1]) in _zipped(os.path.join(self.folder, archive)):
                return f"no such file, but {archive} holds it; unzip that there"
        folder = "" if _is_absolute(name) else os.path.join(*parts[:-1], "")
        other = _listing(os.path.join(self.folder, folder)).longer(os.path.splitext(parts[-1])[0])
        return f"no such file, but {printable(folder + other[0])} is there" if other else ""


def plain(name: str) -> str:
    """A path without `./` and doubled slashes, which name the same file. A URL stays as it is."""
    return str(PurePosixPath(name)) if ("./" in name or "//" in name) and "://" not in name else name


@lru_cache(64)
def names_in(folder: str) -> Names:
    """The names of a folder. What was looked up is remembered."""
    return Names(folder)


def look_again() -> None:
    """Forget which names folders hold: files may have come or gone."""
    names_in.cache_clear()
    _listing.cache_clear()
    _zipped.cache_clear()


class _Listing:
    """The names in a folder, by their folded forms."""

    def __init__(self, folder: str) -> None:
        self._same: dict[str, list[str]] = {}
        self._longer: dict[str, list[str]] = {}  # by the name without an image's suffix
        self.zips: list[str] = []
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, MAX_LISTED + 1)]
        except (OSError, ValueError):  # missing, closed to us, or not even a name
            names = []
        for name in sorted(names) if len(names) <= MAX_LISTED else ():
            folded = _folded(name)
            self._same.setdefault(folded, []).append(name)
            stem, _, suffix = folded.rpartition(".")
            if stem and suffix in IMAGE_SUFFIXES:
                self._longer.setdefault(stem, []).append(name)
            elif suffix == "zip":
                self.zips.append(name)

    def same(self, name: str) -> list[str]:
        """The names that equal `name`, or else those that do but for accents, or else for case and blanks at the ends."""
        return _closest(name, self._same.get(_folded(name), []))

    def longer(self, name: str) -> list[str]:
        """The names of images that equal `name` but for their suffix."""
        return _closest(name, self._longer.get(_folded(name), []), lambda other: os.path.splitext(other)[0])


_listing = lru_cache(256)(_Listing)


def _closest(name: str, others: list[str], part: Callable[[str], str] = str) -> list[str]:
    """Those of `others` whose `part` is `name`, or else `name` with other accents, or else all."""
    composed = unicodedata.normalize("NFC", name)
    same = [other for other in others if part(other) == name]
    return same or [other for other in others if unicodedata.normalize("NFC", part(other)) == composed] or others


def _folded(name: str) -> str:
    """The same text for names that differ in case, in composed accents or in blanks at the ends."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def _spellings(name: str) -> list[str]:
    """The name, and other ways to write it: as a path where it is a URL, decoded, with slashes for backslashes."""
    seen = [name]
    path = re.sub(r"^file:(//(localhost)?)?(?=/)", "", name, flags=re.IGNORECASE)
    path = path[1:] if re.match(r"/[A-Za-z]:[/\\]", path) else path
    for spelling in (path, unquote(path), path.replace("\\", "/"), unquote(path).replace("\\", "/")):
        if spelling not in seen:
            seen.append(spelling)
    return seen


def _parts(name: str) -> list[str]:
    """The folders and the file of a path, without its drive."""
    return [part for part in re.sub("^[A-Za-z]:", "", name).split("/") if part not in ("", ".")]


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or bool(re.match("[A-Za-z]:/", name))


@lru_cache(16)
def _zipped(path: str) -> frozenset[str]:
    """The folded names of the files in a zip, without their folders; none if it is no zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(_folded(name.rsplit("/", 1)[-1]) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return frozenset()


def image_folder(table: Path, names: Iterable[str]) -> Path:
    """Where the relative image paths of a table start: its folder, or a folder of images near it, whichever holds the
    first of `names` that any holds."""
    folder = table.parent
    words = table.stem.split("_")  # captions_val2017 may be the captions of val2017/
    parts = ["_".join(words[at:]) for at in range(len(words))]
    tops = [folder, folder.parent] if folder.name.lower() in ANNOTATION_FOLDERS else [folder]
    usual = [top / part for top in tops for part in (*parts, *IMAGE_FOLDERS)]
    candidates = list(dict.fromkeys([folder, *(folder / name for name in IMAGE_FOLDERS), *usual, *tops]))
    candidates = [candidate for candidate in candidates if candidate.is_dir()]
    every = [name for name in names if name]
    for name in every:
        for candidate in candidates:
            if _is_file(candidate, name):
                return candidate
    candidates += [below for top in tops for below in _folders(top) if below not in candidates]
    for name in every:
        for candidate in candidates:
            if _is_file(candidate, name):
                return candidate
    for name in every[:NEARLY]:
        for candidate in candidates:
            if names_in(str(candidate)).find(name).found:
                return candidate
    return folder


def images_below(folder: Path, names: Iterable[str]) -> Path:
    """The folder of images that --images means: `folder`, or the only one below it that holds the first of `names`."""
    every = [name for name in names if name]
    if not every or any(names_in(str(folder)).find(name).found for name in every[:NEARLY]):
        return folder
    walked = islice(os.walk(folder), MAX_WALKED)
    holding = [
        Path(top) for top, _, _ in walked if _is_file(Path(top), every[0]) and "/." not in top[len(str(folder)) :]
    ]
    return holding[0] if len(holding) == 1 else folder


def _folders(top: Path) -> list[Path]:
    """Some folders in a folder, in their order."""
    try:
        with os.scandir(top) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        names = []
    return [top / name for name in names[:MAX_FOLDERS]]


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # too long, or not even a name
        return False
