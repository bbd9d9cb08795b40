"""An explanation as a PNG: heat maps over the picture, of the query that answers, of matching, and of every query."""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..pipeline.files import atomic_file
from ..pipeline.formatting import plain
from .explain import Explanation

# inches
WIDTH, MARGIN, GAP = 11.0, 0.4, 0.3
LINE, SCORES, TITLE, BAR, TILE_TITLE = 0.3, 0.5, 0.3, 0.75, 0.24
PANELS, TILES = 3, 8  # in a row
LETTERS, LINES = 80, 3  # the caption's: letters in a line, lines
NAME = 60  # letters shown of the picture's name
FAINT, ANSWER = "#666666", "#268c46"
COLOURS = "inferno"


class Page:
    """A figure on which parts are placed in inches from the upper left corner."""

    def __init__(self, height: float) -> None:
        self.figure, self.height = Figure(figsize=(WIDTH, height)), height
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        place = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(place)

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / WIDTH, 1 - top / self.height, text, va="top", parse_math=False, **style)


def draw_explanation(explanation: Explanation, path: Path) -> None:
    """Draw the picture, the attention of the query that answers, and the evidence for a match; below, every query's attention."""
    e = explanation
    aspect = e.pixels.shape[1] / e.pixels.shape[2]
    caption = textwrap.wrap(plain(e.caption), LETTERS, max_lines=LINES, placeholder=" …")
    panel = (WIDTH - 2 * MARGIN - (PANELS - 1) * GAP) / PANELS
    tile = (WIDTH - 2 * MARGIN - (TILES - 1) * GAP / 2) / TILES
    panels_top = MARGIN + len(caption) * LINE + SCORES + TITLE
    tiles_top = panels_top + panel * aspect + BAR + TITLE
    tile_height = tile * aspect + TILE_TITLE + GAP / 3
    page = Page(tiles_top + -(-len(e.scores) // TILES) * tile_height + MARGIN)

    page.text(MARGIN, MARGIN, "\n".join(caption), fontsize=15, fontweight="bold", linespacing=1.3)
    scores = f"ITC {e.scores.max():.3f} by query {e.query}      ITM probability {e.probability:.1%}"
    name = plain(e.picture, NAME)
    page.text(MARGIN, MARGIN + len(caption) * LINE + 0.08, f"{scores}      {name}", fontsize=10, color=FAINT)

    def place(number: int, title: str) -> Axes:
        left = MARGIN + number * (panel + GAP)
        page.text(left, panels_top - TITLE + 0.03, title, fontsize=11)
        return page.axes(left, panels_top, panel, panel * aspect)

    height, width = e.pixels.shape[1:]
    _show(place(0, f"what the encoder sees: {width} x {height} pixels"), e.pixels.transpose(1, 2, 0))
    heat = _overlay(place(1, f"attention of query {e.query}"), e, e.attention[e.query], e.attention[e.query].mean())
    others = "the class token" if e.grid.first == 1 else f"the {e.grid.first} tokens before the patches"
    off = f" ({1 - e.attention[e.query].sum():.0%} is on {others})" if e.grid.first else ""
    left = MARGIN + panel + GAP
    _bar(page, heat, left, panels_top + panel * aspect, panel, f"share of its attention{off}", percent=True)
    title, left = "evidence for a match", left + panel + GAP
    if e.evidence.max() > 0:
        heat = _overlay(place(2, title), e, e.evidence / e.evidence.max())
        _bar(page, heat, left, panels_top + panel * aspect, panel, "Grad-CAM, relative", percent=False)
    else:
        _overlay(place(2, f"{title}: no patch"), e, e.evidence)

    which = f"attention of each of the {len(e.scores)} queries, by score with the text; each map has its own scale, from its mean up"
    page.text(MARGIN, tiles_top - TITLE - 0.05, which, fontsize=11)
    for place_of, query in enumerate(np.argsort(-e.scores, kind="stable")):
        left = MARGIN + place_of % TILES * (tile + GAP / 2)
        top = tiles_top + place_of // TILES * tile_height
        axes = page.axes(left, top + TILE_TITLE, tile, tile * aspect)
        _overlay(axes, e, e.attention[query], e.attention[query].mean())
        style = {"color": ANSWER, "fontweight": "bold"} if query == e.query else {}
        page.text(left, top + 0.04, f"query {query}   {e.scores[query]:.3f}", fontsize=8, **style)
    with atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # captions in a script that it lacks
        page.figure.savefig(file, format="png", dpi=130)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.set_axis_off()


def _overlay(axes: Axes, e: Explanation, heat: np.ndarray, ground: float = 0.0) -> Any:
    """Draw `heat` (rows, columns) over the picture in grey. Heat further above `ground` is more opaque.

    Full colour takes at least twice `ground`, so that even attention stays grey. Returns the image that a colour bar needs."""
    _show(axes, e.pixels.mean(0) * 0.8)
    grid, top = e.grid, max(heat.max(), 2 * ground) or 1.0
    fine = _smooth(heat, grid.side)
    drawn = axes.imshow(
        fine,
        cmap=COLOURS,
        vmin=ground,
        vmax=top,
        alpha=0.85 * ((fine - ground) / (top - ground)).clip(0, 1) ** 0.7,
        extent=(0, grid.columns * grid.side, grid.rows * grid.side, 0),
    )
    axes.set(xlim=(0, e.pixels.shape[2]), ylim=(e.pixels.shape[1], 0))
    return drawn


def _smooth(heat: np.ndarray, side: int) -> np.ndarray:
    """(rows, columns) -> (rows * side, columns * side), linear between the middles of the patches."""
    rows, columns = (_weights(count, side) for count in heat.shape)
    return rows @ heat @ columns.T


def _weights(count: int, side: int) -> np.ndarray:
    """(count * side, count): the weight of each patch of a row in each pixel of that row."""
    at = ((np.arange(count * side) + 0.5) / side - 0.5).clip(0, count - 1)
    return (1 - np.abs(at[:, None] - np.arange(count))).clip(0)


def _bar(page: Page, heat: Any, left: float, top: float, width: float, label: str, percent: bool) -> None:
    axes = page.axes(left, top + 0.1, width, 0.1)
    bar = page.figure.colorbar(heat, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    if percent:
        bar.formatter = PercentFormatter(1)
    bar.set_label(label, fontsize=9, labelpad=2)
    axes.tick_params(labelsize=8, length=2)
