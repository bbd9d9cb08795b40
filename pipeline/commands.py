"""Commands of the command line from dataclasses: their fields are the options (see `options.py`)."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from .errors import UsageError
from .options import OPTION, Panel, flags_of


def with_options(body: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it: a parameter whose type is a dataclass stands for an option for each of its fields.

    A field that several dataclasses have is one option, as the first of them declares it."""
    given_as = inspect.signature(body).parameters.values()
    bundles: dict[str, Any] = {p.name: p.annotation for p in given_as if is_dataclass(p.annotation)}
    options = {
        parameter.name: (panel, parameter) for b in reversed(bundles.values()) for panel, parameter in _options(b)
    }
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in given_as if p.name not in bundles]
    declared = [f.name for bundle in bundles.values() for f in fields(bundle)]
    ranked = sorted(options.values(), key=lambda option: (option[0], declared.index(option[1].name)))
    parameters += [parameter for _, parameter in ranked]

    def called(**given: Any) -> None:
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name.replace('_', '-')} {value}: give a number")
        made = {
            name: bundle(**{f.name: given[f.name] for f in fields(bundle) if f.name in given})
            for name, bundle in bundles.items()
        }
        kept = {name: value for name, value in given.items() if name not in options}
        try:
            body(**kept, **made)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error

    called.__doc__, called.__signature__ = body.__doc__, inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _options(bundle: Any) -> Iterator[tuple[Panel, inspect.Parameter]]:
    """The fields of a dataclass as parameters for typer, each with the panel of its option."""
    types = get_type_hints(bundle)
    for field in fields(bundle):
        if (option := field.metadata[OPTION]) is not None:
            shown = typer.Option(
                *flags_of(field),
                help=option.help,
                min=option.min,
                max=option.max,
                rich_help_panel=option.panel.title if option.panel.rank else None,
                envvar=option.envvar,
            )
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            kind: Any = Annotated[types[field.name], shown]
            parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            yield option.panel, parameter
