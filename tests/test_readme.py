"""The README is true: its file tree, its commands and options, and what must never be in the repository."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main
from qf.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^qf [a-z].*$", README, re.M))))
def test_every_command_line_exists(line):
    for part in line.split("#")[0].split("&&"):
        words = part.split()
        command = COMMANDS[words[1]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[2:]:
            if word.startswith("-"):
                assert word.split("=")[0] in options, f"{line}: {word}"


def test_every_command_is_described():
    for name in COMMANDS:
        assert f"`qf {name}" in README or f"\nqf {name}" in README, name


def test_nothing_of_this_machine_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    hosts = re.compile("|".join(["pythonhosted" + r"\.org", "pypi" + r"\.org", "registry" + r"\.npmjs"]))
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".jsonl", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not hosts.search(text), name
            assert not re.search(r"(?<![\w.])/(work|root)/", text), name
