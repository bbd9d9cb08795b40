"""A plot of what a scorer finds against what it costs."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..pipeline.files import atomic_file
from .certainty import Certainty
from .mix_file import WAYS, Row

LOOKS = {"clip": ("encoder", "tab:gray", "s"), "itc": ("ITC", "tab:blue", "o"), "mix": ("mix", "tab:green", "o")}
MARKER = {"s": 9, "o": 5}  # points across: the encoder's marker is seen around another


def draw_tradeoff(rows: Mapping[str, Row], certainty: Mapping[str, Mapping[str, Certainty]], path: Path) -> None:
    """Draw R@1 with its interval against the time of a query, both ways, as a PNG. A line joins a scorer with its re-ranked ones,
    beside whose points the number of candidates stands."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, way in zip(figure.subplots(1, 2), WAYS, strict=True):
        for scorer, (label, colour, marker) in LOOKS.items():
            names = [name for name in rows if name.partition("+")[0] == scorer]
            if not names:
                continue
            times = [certainty[name][way].milliseconds for name in names]
            at_1 = [rows[name][f"{way}_R@1"] for name in names]
            bounds = [certainty[name][way].interval for name in names]
            below = [max(0.0, value - low) for value, (low, _) in zip(at_1, bounds, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(at_1, bounds, strict=True)]
            style = {"marker": marker, "markersize": MARKER[marker], "fillstyle": "none" if marker == "s" else "full"}
            axes.errorbar(times, at_1, (below, above), color=colour, capsize=3, label=label, **style)
            points: dict[tuple[float, float], list[str]] = {}  # those that stand in one place have one text
            for name, time, value in zip(names, times, at_1, strict=True):
                points.setdefault((time, value), []).extend(filter(None, [name.partition("@")[2]]))
            for point, ks in points.items():
                axes.annotate(", ".join(ks), point, (5, 5), textcoords="offset points", fontsize=8, color=colour)
        axes.set(title=way.replace("_", " "), xlabel="time to rank a query, ms", ylabel="R@1, %", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
        axes.legend(title="number at a point: candidates re-ranked", fontsize=8, title_fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
