"""The result of a command: a frozen dataclass. Its fields are the JSON that scripts read, its text is for people."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Base of all results. A subclass defines `__str__`; one with fields that have no fixed names overrides `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)
