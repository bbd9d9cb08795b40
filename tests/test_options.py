"""Options are written once, on dataclass fields; commands are short."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import typer.main
from qf import cli
from qf.pipeline import config as pipeline_config
from qf.pipeline.options import OPTION
from qf.retrieval import config as retrieval_config
from qf.trainer import config as trainer_config

CLI = Path(cli.__file__)
COMMANDS = typer.main.get_command(cli.app).commands
CONFIGS = [
    kind
    for module in (pipeline_config, trainer_config, retrieval_config)
    for kind in vars(module).values()
    if is_dataclass(kind) and kind.__module__ == module.__name__ and kind is not trainer_config.QFormerConfig
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_a_config_is_an_option_or_hidden_on_purpose(config):
    for field in fields(config):
        assert OPTION in field.metadata, f"{config.__name__}.{field.name}: use option() or hidden()"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_is_on_a_command_with_its_default_and_limits(config):
    for field in fields(config):
        if (option := field.metadata[OPTION]) is None:
            continue
        found = [p for command in COMMANDS.values() for p in command.params if p.name == field.name]
        assert any(p.default == field.default and p.help == option.help for p in found if not p.required) or any(
            p.required for p in found
        ), f"{config.__name__}.{field.name}"


def command_bodies():
    """(name, lines without the docstring) of each command."""
    for node in ast.parse(CLI.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "command" for d in node.decorator_list):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_no_command_body_is_longer_than_15_lines():
    bodies = dict(command_bodies())
    assert set(COMMANDS) == {name.rstrip("_") for name in bodies}
    assert {name: lines for name, lines in bodies.items() if lines > 15} == {}


def test_the_command_line_is_one_short_file():
    assert len(CLI.read_text().splitlines()) <= 480
