"""Patterns to the files that they name: `data/{00000..00031}.tar`, `captions_{train,val}2017.json`, `data/*.tar`, `**`."""

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import glob
from itertools import islice, product
from pathlib import Path

from ..errors import DatasetError
from .look import PassedOver, walk

MAX_FILES = 1_000_000  # that a pattern names


def matching(pattern: Path) -> list[Path]:
    """The files that a pattern with *, ? and ** matches, in order; itself where there are none."""
    text = str(pattern)
    if "**" in pattern.parts:
        at = pattern.parts.index("**")
        tops = glob(_literal(str(Path(*pattern.parts[:at])))) if at else ["."]
        found = [str(path) for top in tops if os.path.isdir(top) for path in _below(Path(top), pattern.parts[at:])]
    else:
        found = glob(_literal(text))
    return sorted(Path(name) for name in set(found) if os.path.isfile(name)) or [pattern]


def _literal(text: str) -> str:
    return text.replace("[", "[[]")


def _below(top: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files below a folder that a pattern matches; no folder is entered twice, and none that qf wrote."""
    for file in islice(walk(top, False, PassedOver()), MAX_FILES):
        if _matches(tuple(file.name.split("/")), tuple(parts)):
            yield top / file.name


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a path matches a pattern, both in their parts. `**` stands for any folders, at the end for any file."""
    if not parts or not names:
        return not parts and not names
    if parts[0] != "**":
        return fnmatchcase(names[0], _literal(parts[0])) and _matches(names[1:], parts[1:])
    return parts == ("**",) or _matches(names, parts[1:]) or _matches(names[1:], parts)


def braces(pattern: Path) -> list[Path]:
    """The paths that a pattern names: `{00..11}` counts, keeping leading zeros; `{a,b}` lists."""
    parts = re.split(r"\{([^{}]*)\}", str(pattern))
    choices: list[Sequence[str]] = []
    total = 1
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif count := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(count[1]), int(count[2])
            if abs(last - first) >= MAX_FILES:
                raise DatasetError(f"{pattern} names more than {MAX_FILES:,} files; give a smaller pattern")
            step = 1 if first <= last else -1
            choices.append([str(n).zfill(len(count[1])) for n in range(first, last + step, step)])
        else:
            choices.append(part.split(",") if "," in part else ["{" + part + "}"])
        total *= len(choices[-1])
    if total > MAX_FILES:
        raise DatasetError(f"{pattern} names more than {MAX_FILES:,} files; give a smaller pattern")
    return [Path("".join(choice)) for choice in product(*choices)]
