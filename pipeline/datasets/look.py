"""One look into a folder: which files it holds, in order, and what is passed over.

Hidden files are passed over, and every folder that qf wrote. Links are followed, but no folder is entered twice. Nothing is
opened but regular files. Memory: the names in one folder at a time, and the names of tables, tars and shards."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import is_own
from ..errors import DatasetError
from ..formatting import counted, printable
from .records import IMAGE_SUFFIXES
from .sidecars import SUFFIXES

MAX_DEPTH = 64  # folders in each other
MAX_LISTED = 10_000  # tables, JSON files and texts that are kept, each
MAX_KINDS = 8  # of files that were not read, in a message
COPIES = re.compile(  # folders of thumbnails and of deleted pictures: Synology, Windows, macOS, and all but the originals of Apple Photos
    r"(^|/)(@eadir|#recycle|\$recycle\.bin|__macosx|[^/]+\.photoslibrary/(?!(originals|masters)$)[^/]+)$", re.IGNORECASE
)
OWN_FOLDERS = re.compile(r"features|runs|index|demo|sample-\d+")  # in a workspace
SIDECARS = (*(f".{suffix}" for suffix in SUFFIXES), ".JSON", ".TXT")
COMPRESSED_SUFFIXES = ("gz", "bz2", "xz", "zst", "tgz", "7z", "rar")
PICTURES = (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
SIGNATURES = re.compile(  # first bytes of the formats that qf reads
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM....\0\0\0\0|II\*\0|MM\0\*|RIFF....WEBP|....ftypavi[fs]|\0\0\0\x0cjP  |P[1-6]\s", re.DOTALL
)  # fmt: skip

SUFFIX = rb"\.(?:" + "|".join(sorted(IMAGE_SUFFIXES, reverse=True)).encode() + rb")"
SAMPLE = 2**16  # bytes of a file, at either end


@dataclass(frozen=True, slots=True)
class Listed:
    """A file. `regular` is False for pipes, sockets, devices and broken links; `refused` for a link to a folder that
    leads out, where links are confined."""

    name: str  # below the top, with slashes
    folder: str  # that holds it, as it is opened
    beside: Set[str]  # all names in that folder
    link: bool  # whether it is a link, or below one
    regular: bool
    refused: bool = False

    @property
    def base(self) -> str:
        """The name in its own folder."""
        return self.name.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without its dot."""
        return os.path.splitext(self.base)[1][1:].lower()

    @property
    def path(self) -> str:
        """The path at which it is opened."""
        return os.path.join(self.folder, self.base)


class PassedOver:
    """Files and folders that were not read: how many, by their kind, and one example of each."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], str] = {}

    def add(self, noun: str, name: str, detail: str = "", count: int = 1) -> None:
        """Count `count` more of a kind: a noun in the singular, and more words about it."""
        if count:
            self._counts[noun, detail] += count
            self._examples.setdefault((noun, detail), printable(name))

    def __str__(self) -> str:
        kinds = self._counts.most_common()
        listed = [
            f"{counted(count, noun)}{detail} ({self._examples[noun, detail]})"
            for (noun, detail), count in kinds[:MAX_KINDS]
        ]
        rest = sum(count for _, count in kinds[MAX_KINDS:])
        return ", ".join([*listed, *[f"{rest:,} more"] * bool(rest)])


@dataclass
class Look:
    """The visible files of a folder."""

    folder: Path
    pictures: int = 0
    a_picture: str = ""
    captioned: int = 0  # pictures with a text or JSON beside, which may hold captions
    names: dict[str, list[str]] = field(default_factory=dict)  # tar, parquet, arrow, table, json, text, zip, compressed
    counts: Counter[str] = field(default_factory=Counter)  # files by suffix
    links: dict[str, list[str]] = field(default_factory=dict)  # file: the pictures, by name, that are links to it
    passed: PassedOver = field(default_factory=PassedOver)
    others: PassedOver = field(
        default_factory=PassedOver
    )  # files by suffix that are neither pictures nor texts beside one

    def of(self, kind: str) -> list[Path]:
        """The paths of the files of a kind, sorted."""
        return sorted(self.folder / name for name in self.names.get(kind, ()))

    def __str__(self) -> str:
        seen = [counted(count, _with_suffix(suffix)) for suffix, count in self.counts.most_common(6)]
        return ", ".join(seen) or "no file"


KINDS = {
    "tar": "tar", "parquet": "parquet", "arrow": "arrow", "csv": "table", "tsv": "table", "jsonl": "table", "ndjson": "table",
    "token": "text", "txt": "text", "json": "json", "zip": "zip", **dict.fromkeys(COMPRESSED_SUFFIXES, "compressed"),
}  # fmt: skip


def look_into(folder: Path, confine: bool) -> Look:
    """Everything below a folder. DatasetError if the folder cannot be opened."""
    look = Look(folder)
    for file in walk(folder, confine, look.passed):
        kind = KINDS.get(file.suffix)
        if is_picture(file):
            look.pictures += 1
            look.a_picture = look.a_picture or file.name
            stem = os.path.splitext(file.base)[0]
            look.captioned += any(name + suffix in file.beside for name in (stem, file.base) for suffix in SIDECARS)
            if file.link:
                look.links.setdefault(os.path.realpath(file.path), []).append(file.name)
        elif not file.regular:
            look.passed.add("pipe", file.name, ", devices or broken links")
            continue
        elif kind in ("json", "text") and _is_sidecar(file):
            continue
        else:
            look.others.add(_with_suffix(file.suffix), file.name)
            most = MAX_LISTED if kind in ("table", "json", "text") else 10**9
            if kind is not None and len(names := look.names.setdefault(kind, [])) < most:
                names.append(file.name)
        look.counts[file.suffix] += 1
    return look


def _with_suffix(suffix: str) -> str:
    return f".{suffix} file" if suffix else "file without suffix"


def _is_sidecar(file: Listed) -> bool:
    stem = os.path.splitext(file.base)[0]
    return stem in file.beside or any(f"{stem}.{suffix}" in file.beside for suffix in PICTURES)


def is_picture(file: Listed) -> bool:
    """Whether a file is a picture: by its suffix, or by its first bytes where a suffix says nothing."""
    if file.suffix in IMAGE_SUFFIXES:
        return True
    if file.regular and file.suffix not in KINDS and (not file.suffix or file.suffix.isdigit() or len(file.suffix) > 5):
        try:
            with open(file.path, "rb", buffering=0) as opened:
                return bool(SIGNATURES.match(opened.read(32)))
        except OSError:
            return False
    return False


def speaks_of_captions(path: Path) -> bool:
    """Whether a table, JSON or text seems to hold the captions of pictures: by the word, or by names of pictures.

    A JSON that names a single picture does not, for Google Takeout writes one for each; nor does a text, unless several
    of its lines begin with the name of a picture; nor a file that cannot be opened."""
    try:
        with open(path, "rb") as file:
            data = file.read(SAMPLE)
            file.seek(max(len(data), os.fstat(file.fileno()).st_size - SAMPLE))
            data = (data + file.read(SAMPLE)).replace(b"\0", b"")  # UTF-16
    except OSError:
        return False
    kind = KINDS.get(path.suffix[1:].lower())
    if kind == "text":
        return len(re.findall(rb"^[^\s,;|]+" + SUFFIX + rb"\W+\w", data, re.IGNORECASE | re.MULTILINE)) > 1
    named = set(re.findall(rb"[^\s\"'/\\,;|]+" + SUFFIX + rb"\b", data, re.IGNORECASE))
    return bool(re.search(rb"caption", data, re.IGNORECASE)) or len(named) > (kind == "json")


def walk(top: Path, confine: bool, passed: PassedOver) -> Iterator[Listed]:
    """The visible files below a folder, in the order of names. DatasetError if the top cannot be opened.

    `passed` gets hidden files that look like data, folders that qf wrote, and folders that are not entered."""
    real_top = os.path.join(os.path.realpath(top), "")
    entered: set[str] = {real_top.rstrip("/") or "/"}

    def entries(path: str, name: str, link: bool) -> Iterator[tuple[_Entry, str, str, Set[str], bool]]:
        here = _scan(path)
        names = frozenset(entry.name for entry in here)
        return ((entry, path, name, names, link) for entry in here)

    try:
        stack = [entries(str(top), "", False)]
    except OSError as error:
        raise cannot_open(top, error) from error
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            continue
        entry, folder, below, names, link = item
        name, path = below + entry.name, os.path.join(folder, entry.name)
        if entry.name.startswith("."):
            suffix = os.path.splitext(entry.name)[1][1:].lower()
            if (
                not entry.is_folder
                and not entry.name.startswith("._")
                and (suffix in KINDS or suffix in IMAGE_SUFFIXES)
            ):
                passed.add("hidden file", name)
        elif not entry.is_folder:
            yield Listed(name, folder, names, link or entry.is_link, entry.is_file)
        else:
            real = os.path.realpath(path)
            outside = not os.path.join(real, "").startswith(real_top)
            if confine and outside:
                yield Listed(name, folder, names, True, False, refused=True)
            elif real_top.startswith(os.path.join(real, "")):
                passed.add("link", name, " to a folder that holds it")
            elif real in entered or (entry.is_link and not outside and "/." not in real[len(real_top) - 1 :]):
                passed.add("link", name, " to a folder that is read already")
            elif len(stack) >= MAX_DEPTH:
                passed.add("folder", name, f" more than {MAX_DEPTH} deep")
            elif COPIES.search(path):
                passed.add("folder", name, " of thumbnails or deleted pictures")
            elif is_own(Path(path)) or _is_workspace(path):
                passed.add("folder", name, " that qf wrote")
            else:
                entered.add(real)
                try:
                    stack.append(entries(path, name + "/", link or entry.is_link))
                except OSError as error:
                    passed.add("folder", name, f" that cannot be opened: {(error.strerror or 'error').lower()}")


@dataclass(frozen=True, slots=True, order=True)
class _Entry:
    name: str
    is_folder: bool
    is_link: bool
    is_file: bool


def _scan(path: str) -> list[_Entry]:
    """What a folder holds, in the order of names."""
    with os.scandir(path) as entries:
        return sorted(
            _Entry(
                entry.name, _holds(entry, os.DirEntry.is_dir), entry.is_symlink(), _holds(entry, os.DirEntry.is_file)
            )
            for entry in entries
        )


def _holds(entry: Any, question: Any) -> bool:
    try:
        return bool(question(entry))
    except OSError:  # a link to itself
        return False


def _is_workspace(folder: str) -> bool:
    """Whether a folder holds nothing but what qf wrote, and drawings, such as contact sheets, that have no text beside."""
    try:
        here = [entry for entry in _scan(folder) if not entry.name.startswith(".")]
    except OSError:
        return False
    folders = [entry.name for entry in here if entry.is_folder]
    if not folders or not all(map(OWN_FOLDERS.fullmatch, folders)):
        return False
    drawings = {os.path.splitext(entry.name) for entry in here if not entry.is_folder}
    if any(suffix not in (".png", ".jpg", ".jpeg") for _, suffix in drawings):
        return False
    return any(is_own(Path(folder, name)) or _holds_own(os.path.join(folder, name)) for name in folders)


def _holds_own(folder: str) -> bool:
    try:
        return any(entry.is_folder and is_own(Path(folder, entry.name)) for entry in _scan(folder))
    except OSError:
        return False


def cannot_open(path: str | Path, error: OSError) -> DatasetError:
    """The error for a file or folder that the operating system does not open."""
    reason = (error.strerror or "error").lower()
    return DatasetError(f"{path} cannot be opened: {reason}")
