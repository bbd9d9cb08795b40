"""Replacing an artifact: the new one is built in a hidden folder beside the old one, and takes its place by rename.

`--overwrite` means "replace what was there when first asked": an interrupted replacement goes on where it stopped."""

import logging
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from .artifacts import CHECKED, MANIFEST, Kind, has_manifest
from .files import sweep

log = logging.getLogger(__name__)


def replacement_of(folder: Path) -> Path:
    """The hidden folder in which a replacement of the artifact in `folder` is built."""
    return folder.parent / f".{folder.name}.new"


def _replaced(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def place_to_write(folder: Path, overwrite: bool, resumes: Callable[[Path], bool]) -> Path:
    """Where to write an artifact that belongs in `folder`: there, or in its replacement with `overwrite`.

    `resumes` tells whether a folder holds the same work, unfinished. Call it with `folder` locked: a replacement that was
    interrupted between its last two steps takes its place first."""
    if not folder.exists() and has_manifest(replacement_of(folder)):
        replacement_of(folder).rename(folder)
    if _replaced(folder).exists() and folder.exists():
        shutil.rmtree(_replaced(folder))
    if replacement_of(folder).is_dir() and not overwrite:
        log.warning("%s holds an unfinished replacement: --overwrite goes on with it", replacement_of(folder))
    sweep(replacement_of(folder))
    taken = folder.is_dir() and any(folder.iterdir())
    if overwrite and taken and (has_manifest(folder) or not resumes(folder)):
        return replacement_of(folder)
    return folder


def settle(place: Path, folder: Path, kind: Kind) -> None:
    """Let the finished artifact in `place` take the place of the one in `folder`, unless it is there already.

    Files in the old folder that are not qf's stay: they move to the new one."""
    if place == folder:
        return
    old = _replaced(folder)
    folder.rename(old)
    place.rename(folder)
    for path in old.iterdir():
        if not owned(path.name, kind) and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(old)


def clear(folder: Path, kind: Kind) -> None:
    """Delete an artifact's files from `folder`, its manifest first: after an interrupt it counts as unfinished."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if owned(path.name, kind):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def owned(name: str, kind: Kind) -> bool:
    """Whether qf gives this name to a file in an artifact of that kind."""
    return any(fnmatchcase(name, pattern) for pattern in (MANIFEST, CHECKED, *kind.files))
