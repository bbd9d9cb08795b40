"""Contact sheets: a PNG with the thumbnails of each search."""

import io
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..pipeline.files import atomic_file
from ..pipeline.formatting import plain
from .searcher import Hit

TILE, GAP, HEAD, FOOT = 160, 12, 30, 64
COLUMNS, CAPTION = 6, 3  # tiles in a row, lines of a caption
PAPER, INK, FAINT, WANTED = (255, 255, 255), (25, 25, 25), (110, 110, 110), (38, 140, 70)


def contact_sheet(
    searches: Sequence[tuple[str, Sequence[Hit]]], path: Path, wanted: Sequence[str] | None = None
) -> None:
    """Draw each search: its query, and its hits in rows.

    `wanted` holds the key that each search should find. The tile of that key gets a frame."""
    columns = min(COLUMNS, max((len(hits) for _, hits in searches), default=1))
    large, small = ImageFont.load_default(16), ImageFont.load_default(11)
    rows = [-(-len(hits) // columns) for _, hits in searches]
    width = max(480, columns * (TILE + GAP) + GAP)
    sheet = Image.new("RGB", (width, len(searches) * (HEAD + GAP) + sum(rows) * (TILE + FOOT + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for number, (query, hits) in enumerate(searches):
        draw.text((GAP, top), _lines(query, width - 2 * GAP, 1, large), INK, large)
        for place, hit in enumerate(hits):
            x = GAP + place % columns * (TILE + GAP)
            y = top + HEAD + place // columns * (TILE + FOOT + GAP)
            _paste(sheet, hit.thumbnail, x, y)
            if wanted is not None and hit.key == wanted[number]:
                draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=WANTED, width=4)
            draw.text((x, y + TILE + 4), f"{hit.rank}.  {hit.score:.3f}", FAINT, small)
            caption = _lines(hit.captions[0] if hit.captions else "", TILE, CAPTION, small)
            draw.multiline_text((x, y + TILE + 19), caption, INK, small, spacing=2)
        top += HEAD + rows[number] * (TILE + FOOT + GAP) + GAP
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _paste(sheet: Image.Image, jpeg: bytes, x: int, y: int) -> None:
    """A thumbnail in the middle of its tile, enlarged to fill it."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = TILE / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    sheet.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))


def _lines(text: str, width: int, count: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text in at most `count` lines of that width. Lines break between words; a longer text ends in an ellipsis."""
    rest = plain(text, 4 * width)

    def fitting(end: str = "") -> int:
        """How many letters of the rest fit in a line that ends with `end`."""
        return bisect_left(range(1, len(rest) + 1), True, key=lambda count: font.getlength(rest[:count] + end) > width)

    lines: list[str] = []
    while rest and len(lines) < count:
        fits = fitting()
        if fits < len(rest) and len(lines) + 1 == count:  # the text goes on after the last line
            lines.append(rest[: fitting("…")].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        end = space if fits < len(rest) and space > 0 else max(fits, 1)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return "\n".join(lines)
