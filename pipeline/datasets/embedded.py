"""Pictures that stand in the cells of a text table: base64, data URLs, the repr of a `{bytes, path}` struct."""

import ast
import base64
import binascii
import re
from typing import Any

STARTS = ("/9j/", "iVBORw0KGg", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")  # JPEG, PNG, GIF, WebP, BMP, TIFF in base64
MIN_BASE64 = 64  # characters; no picture is shorter
_DATA_URL = re.compile(r"\s*data:image/[\w.+-]+(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_STRUCT = re.compile(r"\s*\{\s*['\"](?:bytes|path)['\"]\s*:")


def is_embedded(cell: str) -> bool:
    """Whether a text is a picture in base64, with or without `data:image/…;base64,` before it."""
    if _DATA_URL.match(cell):
        return True
    start = cell[:32].lstrip()
    return len(cell) >= MIN_BASE64 and start.startswith(STARTS) and "." not in cell[:MIN_BASE64]


def picture_in(cell: Any) -> tuple[bytes | None, Any]:
    """The picture in a cell, or None, and the cell's name for it. A picture that cannot be decoded is what stands there."""
    if isinstance(cell, str) and _STRUCT.match(cell):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return cell.encode(errors="replace"), None
    if isinstance(cell, dict):
        inside = cell.get("bytes")
        if isinstance(inside, str):
            inside = _decoded(inside)
        return (inside or None) if isinstance(inside, bytes) else None, cell.get("path")
    if isinstance(cell, str) and is_embedded(cell):
        return _decoded(cell[found.end() :] if (found := _DATA_URL.match(cell)) else cell), None
    return None, cell


def _decoded(text: str) -> bytes:
    data = "".join(text.split()).encode(errors="replace")
    try:
        return base64.b64decode(data.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        return data
