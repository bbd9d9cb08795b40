"""Texts and JSON that stand beside an image, in a folder or in a tar: the captions in them, and the split."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ReadOptions
from ..formatting import encodable
from .captions import CAPTION_NAMES, texts
from .rows import encoding_of, in_words

MAX_SIDECAR = 2**20  # bytes of a text or JSON beside an image
SHOWN = 10  # names in a message
SUFFIXES = ("json", "txt", "caption", "captions", "text")  # the first that holds a caption is taken


class UnreadableSidecar(Exception):
    """A text or JSON beside an image cannot be read; the message is the reason, for the rejects."""


def is_caption_suffix(suffix: str) -> bool:
    """Whether a suffix in lower case, such as `txt` or `captions.json`, is a usual one of captions."""
    name, dot, last = suffix.rpartition(".")
    return suffix in SUFFIXES or (bool(dot) and name in CAPTION_NAMES and last in ("json", "txt"))


@dataclass(frozen=True)
class Sidecars:
    """The captions that stand beside an image, the split that a JSON names, and the names of that JSON's fields."""

    captions: list[str]
    split: str | None
    fields: tuple[str, ...]

    def lacking(self, names: Iterable[str]) -> str:
        """Why there is no caption, and what would take one; `names` are those of the files there."""
        if self.fields:
            return (
                f"no caption: its JSON has the fields {', '.join(self.fields)}; --caption-column NAME takes one of them"
            )
        seen = ", ".join(sorted(names)[:SHOWN])
        return f"no caption in a .txt, .json or .caption (there is {seen}); --caption-column NAME takes another suffix"


def captions_of(parts: Mapping[str, bytes], options: ReadOptions) -> Sidecars:
    """The captions in the texts and JSON beside an image, given by their suffixes, the first that holds any.

    --caption-column names a suffix, or a field of the JSON, and nothing else is taken then. UnreadableSidecar if a part
    cannot be read."""
    asked = options.caption_column
    captions: list[str] = []
    split: str | None = None
    fields: tuple[str, ...] = ()
    for suffix in sorted(
        parts, key=lambda suffix: (SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES), suffix)
    ):
        is_asked = asked is not None and suffix == asked.lower().lstrip(".")
        try:
            if suffix.rpartition(".")[2] == "json":
                value = json.loads(parts[suffix])
                names = value if isinstance(value, dict) else {}
                found = texts(names.get(asked) if asked and not is_asked else value)
                split = split or _text(names.get(options.split_column or "split"))
                fields = fields or tuple(encodable(str(name)) for name in [*names][:SHOWN])
            else:
                found = _lines(parts[suffix]) if not captions and (not asked or is_asked) else []
        except (ValueError, RecursionError) as error:
            raise UnreadableSidecar(f"its .{suffix} cannot be read: {in_words(error)}") from error
        captions = captions or found
    return Sidecars(captions, split, fields)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _lines(data: bytes) -> list[str]:
    """The captions in a text, one a line."""
    return texts(data.decode(encoding_of(data)).splitlines())
