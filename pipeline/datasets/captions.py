"""The captions in a value: a text, a list, an object; in a table also a text that spells a list, as JSON or Python do."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..formatting import encodable

CAPTION_NAMES = (
    "caption", "captions", "text", "texts", "sentence", "sentences", "description", "descriptions", "comment", "title",
    "raw", "txt",
)  # fmt: skip
MAX_CAPTION = 2**16  # characters; a longer text is a document
MAX_CAPTIONS = 1000  # of one image: a training step takes them all
TOO_LONG, TOO_MANY = "captions that are too long", f"captions beyond the first {MAX_CAPTIONS:,} of an image"
MAX_DEPTH = 16  # lists and objects, one inside the other
MAX_CELL = 2**20  # characters of a text that may spell a list

# One or several quoted texts in brackets. Python separates them with commas, NumPy with blanks alone.
_TEXT = r"""(?>'(?>[^'\\]|\\.)*+'|"(?>[^"\\]|\\.)*+"|None|nan|null)"""
_LIST = re.compile(
    rf"(?:array\()?[\[(]\s*+{_TEXT}(?>\s*+,?+\s*+{_TEXT})*+\s*+,?+\s*+[\])](?:, dtype=\w+\))?", re.DOTALL
)
_ITEM = re.compile(_TEXT, re.DOTALL)
_NO_ESCAPE = re.compile(r"""(?<!\\)(?:\\\\)*\\[^\\'"abfnrtvxuUN0-7\n]""")


def texts(value: Any, depth: int = MAX_DEPTH) -> list[str]:
    """The captions in a value: a text, a list of texts, or of objects that hold one; empty ones do not count, nor those
    more than `depth` lists and objects deep."""
    if depth < 0:
        return []
    if isinstance(value, str):
        if len(value) > MAX_CAPTION:
            return [value]  # no caption, and costly to look at
        return [encodable(text)] if (text := value.strip()) else []
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts(part, depth - 1)]
    if isinstance(value, dict):
        return _in_object(value, depth - 1)
    if isinstance(value, bytes):
        return texts(value.decode(errors="replace"))
    return [] if value is None or value != value else texts(str(value), depth - 1)  # NaN is what pandas writes for none


def _in_object(value: dict[Any, Any], depth: int) -> list[str]:
    """The captions under the first usual name, in upper or lower case; or those that `tokens` of a Karpathy split are."""
    fields = {name.lower(): found for name, found in value.items() if isinstance(name, str) and found is not None}
    for name in ("raw", *CAPTION_NAMES):
        if name in fields:
            return texts(fields[name], depth)
    tokens = fields.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return texts(" ".join(tokens))
    return []


def usable(captions: Sequence[str]) -> tuple[list[str], str]:
    """The captions that are short enough, and what is wrong with another one, or nothing."""
    long = next((text for text in captions if len(text) > MAX_CAPTION), None)
    if long is None:
        return list(captions), ""
    problem = f"a caption of {len(long):,} characters, the limit is {MAX_CAPTION:,}"
    return [text for text in captions if len(text) <= MAX_CAPTION], problem


def spells_lists(cells: Sequence[Any], inside: Callable[[Any], Sequence[str]] = texts) -> bool:
    """Whether a column of a table holds lists of captions, spelled as text: more than half of its cells do. `inside` finds the
    texts in a list."""
    written = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    lists = [found for cell in written if (found := spelled(cell)) is not None]
    return 2 * len(lists) > len(written) and any(map(inside, lists))


def cell_captions(cell: Any, lists: bool) -> tuple[list[str], str]:
    """The captions in a cell, and what is wrong with it, or nothing. `lists`: whether its column spells lists."""
    if lists and isinstance(cell, str):
        found = spelled(cell)
        if found is None and cell.lstrip()[:1] in ("[", "{"):
            return [], "its list of captions cannot be read"
        cell = cell if found is None else found
    return usable(texts(cell))


def spelled(cell: str) -> list[Any] | dict[str, Any] | None:
    """The list of captions that a text spells, as JSON or as the repr of a list in Python or NumPy; or the object that
    holds captions. None for any other text."""
    text = cell.strip()
    if len(text) > MAX_CELL or not text.startswith(("[", "{", "(", "array(")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python(text)
    if isinstance(value, dict):
        return value if texts(value) else None
    if not isinstance(value, list | tuple):
        return None
    return list(value) if all(part is None or isinstance(part, str | dict) for part in value) else None


def _python(text: str) -> Any:
    """The value of a list, tuple or dict in Python's spelling, or None."""
    if _NO_ESCAPE.search(text):  # Python would keep the backslash, with a warning
        return None
    try:
        if _LIST.fullmatch(text):  # by hand: Python would join two texts that stand side by side
            return [ast.literal_eval(item) for item in _ITEM.findall(text) if item[0] in "'\""]
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
