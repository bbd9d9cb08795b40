"""A run while it trains: the panel on a terminal, and the figures of a log line as text. Rich is imported where it draws."""

import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

RECALLS = {  # the metrics that a validation is shown by, with short names
    "text_to_image_R@1": "text to image",
    "image_to_text_R@1": "image to text",
    "reranked_text_to_image_R@1": "matched",
}
GENERATED = {  # those of stage 2
    "CIDEr": "CIDEr",
    "accuracy": "accuracy",
    "loss_val": "loss",
    "loss_shuffled": "loss, shuffled images",
    "empty": "empty texts",
}
REPORTS = 20  # reports that a pace is measured over


def losses_of(line: dict[str, Any]) -> str:
    """The losses of a log line: "itc 1.234  itm 0.567"."""
    found = ((name, value) for name, value in line.items() if name.startswith("loss_") and value is not None)
    return "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in found)


def recalls_of(line: dict[str, Any]) -> str:
    """The recalls of a validation line: "12.3 text to image, 4.5 image to text"."""
    return ", ".join(f"{line[name]:.1f} {label}" for name, label in RECALLS.items() if name in line)


def validation_of(line: dict[str, Any]) -> str:
    """The metrics of a validation line: "R@1 12.3 text to image, …", or of stage 2 "CIDEr 0.51, loss 2.1, …"."""
    if recalls := recalls_of(line):
        return f"R@1 {recalls}"
    return ", ".join(f"{label} {line[name]:.4g}" for name, label in GENERATED.items() if name in line)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Pace:
    """How fast something goes, measured over its last reports."""

    def __init__(self) -> None:
        self.reports: deque[tuple[float, int]] = deque(maxlen=REPORTS)  # (time, how much was done)

    def left(self, total: int) -> float | None:
        """Seconds from the last report until `total` is done; None before there are two different reports."""
        (first, begun), (last, done) = self.reports[0], self.reports[-1]
        return (last - first) * (total - done) / (done - begun) if done > begun else None


class TrainingPanel:
    """A Rich renderable of a run. Drawn several times a second, its clocks go on between the lines of the log."""

    def __init__(self, total: int) -> None:
        self.total, self.pace, self.over = total, Pace(), False
        self.step: dict[str, Any] = {}  # the last line of training
        self.validation: dict[str, Any] = {}  # the last line of validation
        self.best: dict[str, Any] = {}  # the best line of validation

    def add(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if "split" in line:
            self.validation = line
            self.best = line if line["best"] else self.best
        else:
            self.step = line
            self.pace.reports.append((time.monotonic(), line["step"]))

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.panel import Panel

        parts = [*([self._progress()] if self.step else []), *([self._metrics()] if self.validation else [])]
        return Panel(Group(*parts), title="training", title_align="left", border_style="dim", width=80)

    def _progress(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step = self.step
        left = self.pace.left(self.total)
        if left is None:  # take the average since the run began
            left = step["seconds"] / step["step"] * (self.total - step["step"])
        left = 0.0 if self.over else left
        since = time.monotonic() - self.pace.reports[-1][0] if left else 0.0
        remaining = f", about {clock(left - since)} left" if left > since else ""
        rows = {
            "step": f"{step['step']:,} of {self.total:,}, epoch {step['epoch']:.2f}",
            "time": f"{clock(step['seconds'] + since)} so far{remaining}; {step['pairs_per_second']:,.0f} pairs/s",
            "loss": f"{step['loss']:.3f}    {losses_of(step)}",
            "lr": f"{step['lr']:.2g}, gradient norm {step['grad_norm']:.3g}",
        }
        table = Table.grid(padding=(0, 2))
        table.add_row("", ProgressBar(self.total, step["step"], width=70))
        for name, text in rows.items():
            table.add_row(f"[dim]{name}", text)
        return table

    def _metrics(self) -> "RenderableType":
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        generated = {name: label for name, label in GENERATED.items() if name in self.validation}
        shown, first = (generated, "validation") if generated else (RECALLS, "R@1")
        for title in (first, "step", *shown.values()):
            table.add_column(title, justify="right" if title != first else "left", header_style="dim")
        for name, line in {"last": self.validation, "best": self.best}.items():
            if line:
                values = (f"{line[name]:.{1 if name in RECALLS else 3}f}" if name in line else "" for name in shown)
                table.add_row(f"[dim]{name}", f"{line['step']:,}", *values)
        return table
