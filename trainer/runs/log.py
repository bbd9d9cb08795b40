"""What a run tells while it trains: metrics.jsonl, TensorBoard beside it, and a report to the caller."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...pipeline.artifacts import atomic_file
from ...pipeline.errors import TrainingError

TENSORBOARD = "tensorboard"
Report = Callable[[dict[str, Any], int], None]  # a line of metrics.jsonl, steps in all


def summary_writer() -> type:
    """PyTorch's writer of TensorBoard files. TrainingError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard needs the package tensorboard: pip install 'qf[tensorboard]'") from error
    return SummaryWriter


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, up to one that was cut off as it was written."""
    with suppress(json.JSONDecodeError):
        yield from map(json.loads, path.read_text().splitlines() if path.is_file() else [])


class Log:
    """The lines of metrics.jsonl in the run `folder`, of which a run that goes on from step `start` takes away those after it.

    A run that goes on reports its best validation and those since, for a start. With `writer`, TensorBoard gets the scalars
    of all lines, those from before included: its files hold the same as metrics.jsonl, whenever the option was given."""

    def __init__(
        self, folder: Path, start: int, seconds: float, total: int, report: Report, writer: type | None
    ) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_log(path) if line["step"] <= start] if start else []
        with atomic_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self.total, self.report = total, report
        self.began, self.seconds = time.time() - seconds, 0.0
        # readers of the folder forget what an earlier file says from purge_step on
        self.board = None if writer is None else writer(folder / TENSORBOARD, purge_step=0, flush_secs=10)
        for line in kept:
            self._scalars(line)
        checks = [line for line in kept if "split" in line]
        best = max((number for number, line in enumerate(checks) if line.get("best")), default=len(checks))
        for line in checks[best:]:
            report(line, total)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self._scalars(line)
        self.report(line, self.total)

    def _scalars(self, line: dict[str, Any]) -> None:
        """The numbers of a line, as `train/loss` or `val/text_to_image_R@1`, at the moment that it was written."""
        if self.board is None:
            return
        self.seconds = line.get("seconds", self.seconds)
        for name, value in line.items():
            if name != "step" and type(value) in (int, float):
                tag = f"{line.get('split', 'train')}/{name}"
                self.board.add_scalar(tag, value, line["step"], walltime=self.began + self.seconds)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
