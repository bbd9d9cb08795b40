"""Contact sheets: a PNG with the thumbnails of each search, or with what a run says about pictures."""

import io
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..pipeline.files import atomic_file
from ..pipeline.formatting import plain
from .searcher import Hit

TILE, GAP, HEAD, FOOT, AFTER = 160, 14, 36, 66, 10  # pixels; AFTER is what parts a search from the next
COLUMNS, CAPTION = 6, 3  # tiles in a row, lines of a caption
LARGE, SMALL = 21, 13  # pixels of a letter
FRAME = 5  # pixels
PAPER, INK, FAINT, EDGE, WANTED = (255, 255, 255), (25, 25, 25), (110, 110, 110), (215, 215, 215), (38, 140, 70)
WRONG = (190, 50, 40)
PICTURE, SAID, LINE = 200, 4, 18  # pixels of a picture, lines of what is said about it, pixels of a line


@dataclass(frozen=True)
class Told:
    """A picture with its caption, and answers to questions: (question, answer, whether it is right)."""

    thumbnail: bytes
    caption: str
    answers: list[tuple[str, str, bool]]


def text_sheet(told: Sequence[Told], path: Path) -> None:
    """Draw each picture with its caption below, then its questions with their answers: green if right, red if wrong."""
    columns = min(COLUMNS, max(1, len(told)))
    font = ImageFont.load_default(SMALL)
    asked = max((len(one.answers) for one in told), default=0)
    tall = PICTURE + GAP + LINE * (SAID + 3 * asked)
    rows = -(-len(told) // columns)
    sheet = Image.new("RGB", (columns * (PICTURE + GAP) + GAP, rows * (tall + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, one in enumerate(told):
        x, y = GAP + place % columns * (PICTURE + GAP), GAP + place // columns * (tall + GAP)
        _paste(sheet, one.thumbnail, x, y, PICTURE)
        y += PICTURE + 6
        draw.multiline_text((x, y), _lines(one.caption, PICTURE, SAID, font), INK, font, spacing=3)
        y += LINE * SAID
        for question, answer, right in one.answers:
            text = _lines(question, PICTURE, 2, font)
            draw.multiline_text((x, y), text, FAINT, font, spacing=3)
            y += LINE * (1 + text.count("\n"))
            draw.text((x, y), _lines(answer, PICTURE, 1, font), WANTED if right else WRONG, font)
            y += LINE + 4
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def contact_sheet(
    searches: Sequence[tuple[str, Sequence[Hit]]],
    path: Path,
    wanted: Sequence[Collection[str]] | None = None,
    notes: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw each search: its query, and its hits in rows. A `title` stands above all of them.

    `wanted` holds the keys that each search should find. Their tiles get a frame, and the query a count: "4 of 6"; or instead of
    the count the one of `notes`."""
    columns = min(COLUMNS, max((len(hits) for _, hits in searches), default=1))
    large, small = ImageFont.load_default(LARGE), ImageFont.load_default(SMALL)
    rows = [-(-len(hits) // columns) for _, hits in searches]
    width = max(480, columns * (TILE + GAP) + GAP)
    top = GAP + (HEAD if title else 0)
    height = len(searches) * (HEAD + AFTER) + sum(rows) * (TILE + FOOT + GAP) + top
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), _lines(title, width - 2 * GAP, 1, large), FAINT, large)
    for number, (query, hits) in enumerate(searches):
        framed = [wanted is not None and hit.key in wanted[number] for hit in hits]
        count = "" if wanted is None else f"{sum(framed)} of {len(hits)}"
        count = notes[number] if notes is not None else count
        taken = large.getlength(count)
        draw.text((width - GAP - taken, top), count, WANTED, large)
        draw.text((GAP, top), _lines(query, width - 3 * GAP - round(taken), 1, large), INK, large)
        for place, hit in enumerate(hits):
            x = GAP + place % columns * (TILE + GAP)
            y = top + HEAD + place // columns * (TILE + FOOT + GAP)
            _paste(sheet, hit.thumbnail, x, y, TILE)
            colour, thick = (WANTED, FRAME) if framed[place] else (EDGE, 1)
            edges = (x - thick, y - thick, x + TILE + thick - 1, y + TILE + thick - 1)
            draw.rectangle(edges, outline=colour, width=thick)
            draw.text((x, y + TILE + 6), f"{hit.rank}.  {hit.score:.3f}", FAINT, small)
            caption = _lines(hit.captions[0] if hit.captions else "", TILE, CAPTION, small)
            draw.multiline_text((x, y + TILE + 22), caption, INK, small, spacing=2)
        top += HEAD + rows[number] * (TILE + FOOT + GAP) + AFTER
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _paste(sheet: Image.Image, jpeg: bytes, x: int, y: int, side: int) -> None:
    """A thumbnail in the middle of its tile, enlarged to fill it. `side` is the tile's, in pixels."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = side / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


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
