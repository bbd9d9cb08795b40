"""loss.png: the curves of a run."""

from collections.abc import Sequence
from typing import IO, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curves(lines: Sequence[dict[str, Any]], file: IO[bytes]) -> None:
    """Losses by step, and R@1 on the validation split by step, from the lines of metrics.jsonl, as PNG."""
    losses = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "split" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, label in (
        ("loss_itc", "contrast (ITC)"),
        ("loss_itm", "matching (ITM)"),
        ("loss_itg", "generation (ITG)"),
    ):
        if losses and name in losses[0]:
            left.plot([line["step"] for line in losses], [line[name] for line in losses], label=label)
    left.set(title="training losses", xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend()
    for name, label in (
        ("text_to_image_R@1", "text to image"),
        ("image_to_text_R@1", "image to text"),
        ("reranked_text_to_image_R@1", "text to image, matched"),
    ):
        if checks and name in checks[0]:
            steps, values = [line["step"] for line in checks], [line[name] for line in checks]
            right.plot(steps, values, marker="o", markersize=3, label=label)
    right.set(title="validation R@1", xlabel="step", ylabel="%", ylim=(0, None))
    if checks:
        right.legend()
    else:
        right.text(0.5, 0.5, "no validation split", ha="center", transform=right.transAxes)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=120)
