"""Contact sheets: a PNG with a row of thumbnails for each search."""

import io
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..pipeline.artifacts import atomic_file
from .ask import Answer

TILE, GAP, HEAD, FOOT = 160, 12, 30, 38
PAPER, INK, FAINT, RIGHT = (255, 255, 255), (25, 25, 25), (110, 110, 110), (38, 140, 70)


def contact_sheet(
    searches: Sequence[tuple[str, Sequence[Answer]]], path: Path, right: Sequence[str] | None = None
) -> None:
    """Draw each search (its query and answers) as a row. `right` names the key that was looked for, which gets a frame."""
    columns = max((len(answers) for _, answers in searches), default=1)
    row = HEAD + TILE + FOOT + GAP
    sheet = Image.new("RGB", (max(480, columns * (TILE + GAP) + GAP), len(searches) * row + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(11)
    for number, (query, answers) in enumerate(searches):
        top = GAP + number * row
        draw.text((GAP, top), _fit(query, sheet.width - 2 * GAP, large), INK, large)
        for column, answer in enumerate(answers):
            x, y = GAP + column * (TILE + GAP), top + HEAD
            _paste(sheet, answer.thumbnail, x, y)
            if right is not None and answer.key == right[number]:
                draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=RIGHT, width=4)
            draw.text((x, y + TILE + 4), f"{answer.rank}.  {answer.score:.3f}", FAINT, small)
            draw.text((x, y + TILE + 19), _fit(answer.captions[0] if answer.captions else "", TILE, small), INK, small)
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


def _fit(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    text = text.partition("\n")[0]
    if len(text) <= width and font.getlength(text) <= width:
        return text
    kept = bisect_left(range(min(len(text), width)), True, key=lambda end: font.getlength(text[: end + 1] + "…") > width)
    return text[:kept].rstrip() + "…"
