"""The log of a run: metrics.jsonl, TensorBoard beside it, and a report of each line to the caller."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...pipeline.errors import TrainingError
from ...pipeline.files import atomic_file
from ..manifest import METRICS, TENSORBOARD

Report = Callable[[dict[str, Any], int], None]  # takes a line of metrics.jsonl, and the total of steps


def no_report(line: dict[str, Any], total: int) -> None:
    """A Report that does nothing."""


def summary_writer() -> type:
    """PyTorch's writer of TensorBoard files. TrainingError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard needs the package tensorboard: pip install 'qf[tensorboard]'") from error
    return SummaryWriter


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, up to one that an interrupt or damage left incomplete."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not (isinstance(value, dict) and type(value.get("step")) is int):
            return
        yield value


class Log:
    """Appends to metrics.jsonl in a run's folder, as a context manager.

    A run that resumes at step `start` drops the lines after it, then reports the best validation and those since. With `writer`
    TensorBoard gets the numbers of all lines, earlier ones included, so that both always hold the same."""

    def __init__(
        self, folder: Path, start: int, seconds: float, total: int, report: Report, writer: type | None
    ) -> None:
        """`seconds` of training up to `start`; `total` steps; `writer`: the class of `summary_writer`."""
        path = folder / METRICS
        kept = [line for line in read_log(path) if line["step"] <= start] if start else []
        with atomic_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self.total, self.report = total, report
        self.began, self.seconds = time.time() - seconds, 0.0
        # purge_step makes readers of the folder forget earlier files
        self.board = None if writer is None else writer(folder / TENSORBOARD, purge_step=0, flush_secs=10)
        for line in kept:
            self._scalars(line)
        checks = [line for line in kept if "split" in line]
        best = max((number for number, line in enumerate(checks) if line.get("best")), default=len(checks))
        for line in checks[best:]:
            report(line, total)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, and report it."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self._scalars(line)
        self.report(line, self.total)

    def _scalars(self, line: dict[str, Any]) -> None:
        """Give the numbers of a line to TensorBoard, as `train/loss` or `val/text_to_image_R@1`, with the time of the line."""
        if self.board is None:
            return
        self.seconds = line.get("seconds", self.seconds)
        for name, value in line.items():
            if name != "step" and type(value) in (int, float):
                tag = f"{line.get('split', 'train')}/{name}"
                self.board.add_scalar(tag, value, line["step"], walltime=self.began + self.seconds)

    def close(self) -> None:
        """The end of the log."""
        self.file.close()
        if self.board is not None:
            self.board.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
