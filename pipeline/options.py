"""Options, written once: a dataclass field carries its help, limits and flags, and the command line is made from it.

    @dataclass(frozen=True)
    class TrainOptions:
        epochs: float = option(20.0, "Passes over the training images.", min=0)
        beta1: float = hidden(0.9)  # a field that is no option, on purpose

Standard library only: the command line imports these classes at its start."""

from dataclasses import Field, dataclass, field
from typing import Any

OPTION = "option"  # the key of a field's metadata


@dataclass(frozen=True, order=True)
class Panel:
    """A heading of --help. Panels of a command stand in the order of `rank`."""

    rank: int
    title: str


@dataclass(frozen=True)
class Option:
    """Help and limits of a field on the command line. Name, type and default are the field's own."""

    help: str
    min: float | None = None
    max: float | None = None
    flags: tuple[str, ...] = ()  # other names than --field-name, such as "--k", "-k"
    panel: Panel = Panel(0, "Options")  # typer's own heading
    envvar: str | None = None


def option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    flags: tuple[str, ...] = (),
    panel: Panel = Option.panel,
    envvar: str | None = None,
) -> Any:
    """A dataclass field that is an option of the command line. `min` and `max` are inclusive."""
    return field(default=default, metadata={OPTION: Option(help, min, max, flags, panel, envvar)})


def flags_of(field: Field[Any]) -> tuple[str, ...]:
    """The names of an option on the command line."""
    flags: tuple[str, ...] = field.metadata[OPTION].flags
    return flags or (f"--{field.name.replace('_', '-')}",)


def required(help: str) -> Any:
    """A dataclass field that is an option which must be given."""
    return field(metadata={OPTION: Option(help)})


def hidden(default: Any) -> Any:
    """A dataclass field that is on purpose no option of the command line."""
    return field(default=default, metadata={OPTION: None})
