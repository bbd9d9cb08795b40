"""loss.png: the curves of a run."""

from collections.abc import Sequence
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FEW = 30  # a curve of fewer points has markers


def draw_curves(lines: Sequence[dict[str, Any]], file: IO[bytes]) -> None:
    """Draw losses and validation metrics by step, from the lines of metrics.jsonl, as a PNG."""
    losses = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "split" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, label in (
        ("loss_itc", "contrastive (ITC)"),
        ("loss_itm", "matching (ITM)"),
        ("loss_itg", "generation (ITG)"),
        ("loss_teach", "distance to the teacher"),
        ("loss_lm", "language model"),
    ):
        _plot(left, losses, name, label, marker="o" if len(losses) < FEW else "", markersize=3)
    generated = any("loss_val" in line for line in checks)
    if generated:
        _plot(left, checks, "loss_val", "validation", marker="o", markersize=3)
        _plot(left, checks, "loss_shuffled", "validation, shuffled images", marker="o", markersize=3)
    end = max((line["step"] for line in lines), default=1)
    left.set(title="training losses", xlabel="step", ylabel="loss", ylim=(0, None))
    if losses:
        left.legend()
    else:
        left.text(0.5, 0.5, "no training step", ha="center", transform=left.transAxes)
    for name, label in (
        ("text_to_image_R@1", "text to image"),
        ("image_to_text_R@1", "image to text"),
        ("reranked_text_to_image_R@1", "text to image, re-ranked"),
        ("CIDEr", "CIDEr"),
        ("accuracy", "accuracy, %"),
    ):
        _plot(right, checks, name, label, marker="o", markersize=3)
    if best := [line["step"] for line in checks if line.get("best")]:
        right.axvline(best[-1], color="black", alpha=0.4, linestyle=":", label="weights that are kept")
    title, unit = ("validation texts", "") if generated else ("validation R@1", "%")
    right.set(title=title, xlabel="step", ylabel=unit, ylim=(0, None))
    if right.get_legend_handles_labels()[0]:
        right.legend()
    else:
        right.text(0.5, 0.5, "no validation", ha="center", transform=right.transAxes)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, end * 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.savefig(file, format="png", dpi=120)


def _plot(axes: Axes, lines: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    """Draw the curve of `name` over the lines that have it, if there are any."""
    if found := [line for line in lines if line.get(name) is not None]:
        axes.plot([line["step"] for line in found], [line[name] for line in found], label=label, **style)
