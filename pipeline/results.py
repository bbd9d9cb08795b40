"""The result of a command: a frozen dataclass. Its fields are the JSON that scripts read, its text is for people. And how far
work is until then."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Status:
    """How far long work is: `done` of `total`, with a rate or the like as a `note`."""

    work: str  # a word for it, such as extract
    done: int
    total: int
    note: str


OnStatus = Callable[[Status], None]


def no_status(status: Status) -> None:
    """An OnStatus that does nothing."""


@dataclass(frozen=True)
class Result:
    """Base of all results. A subclass defines `__str__`; one with fields that have no fixed names overrides `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)
