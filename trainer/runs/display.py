"""What a person sees while work goes on: progress on stderr, and a text that grows on stdout. Rich is imported where it draws."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...pipeline.formatting import duration, plain
from .panel import Pace, TrainingPanel, losses_of, validation_of

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

    from ...pipeline.results import Result, Status
    from ..decoding import OnText


class Display:
    """Progress on stderr: live on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live: Live | None = None
        self.shown: Progress | TrainingPanel | None = None  # the part that is live
        self.printed = 0.0  # when the last plain line was printed
        self.paces: dict[str, Pace] = {}  # of each kind of work

    def __enter__(self) -> "Display":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console, Group
            from rich.live import Live

            console = Console(stderr=True)
            self.live = Live(get_renderable=lambda: self.shown or Group(), console=console, redirect_stdout=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self._settle()
            self.live.stop()

    def _settle(self) -> None:
        if isinstance(self.shown, TrainingPanel):
            self.shown.over = True

    def say(self, text: str) -> None:
        """Print a line. The display that was live stays above it."""
        if self.live is not None:
            if self.shown is not None:
                self._settle()
                settled, self.shown = self.shown, None
                self.live.refresh()  # or it would be drawn once more, below
                self.live.console.print(settled)
            self.live.console.print(plain(text), highlight=False, markup=False, emoji=False)
        elif not self.quiet:
            print(plain(text), file=sys.stderr, flush=True)

    def _line(self, what: str, done: int, total: int, note: str) -> None:
        """Print a plain line, ten seconds after the last one at the earliest."""
        pace = self.paces.setdefault(what, Pace())
        if pace.reports and pace.reports[-1][1] > done:  # other work of that kind
            pace.reports.clear()
        pace.reports.append((time.monotonic(), done))
        if not self.quiet and (time.monotonic() - self.printed > 10 or done == total):
            self.printed = time.monotonic()
            left = pace.left(total)
            note += f", {duration(left)} left" if left else ""
            print(f"{what} {done:,}/{total:,}  {note}", file=sys.stderr, flush=True)

    def extracting(self, status: "Status") -> None:
        """Show how far extraction is, of images or of captions."""
        if self.live is None:
            self._line(status.work, status.done, status.total, status.note)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not isinstance(self.shown, Progress) or self.shown.tasks[0].description != status.work:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.shown = Progress(TextColumn("{task.description}"), *columns, console=self.live.console)
            self.shown.add_task(status.work, total=status.total, note="")
        self.shown.update(self.shown.task_ids[0], completed=status.done, note=status.note)

    def training(self, line: dict[str, Any], total: int) -> None:
        """Show a line of metrics.jsonl, of a training of `total` steps."""
        if self.live is not None:
            if not isinstance(self.shown, TrainingPanel):
                self.shown = TrainingPanel(total)
            self.shown.add(line)
        elif "split" in line:
            best = " (the best so far)" if line["best"] else ""
            self.say(f"step {line['step']:,}: validation {validation_of(line)}{best}")
        else:
            self._line("train", line["step"], total, f"{losses_of(line)}  {line['pairs_per_second']:.0f} pairs/s")


def typed(make: "Callable[[OnText], Result]") -> None:
    """Print the text of the result that `make` makes, while it grows. Letters that are not complete yet wait for the next call."""
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        text = plain(text.rstrip("\ufffd"))
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    whole = plain(str(make(show)))
    print(whole[len(shown) :] if whole.startswith(shown) else f"\n{whole}")
