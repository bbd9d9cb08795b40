"""The READMEs are true: their trees, commands, options and Python; and nothing is in the repository that must not be."""

import re
import subprocess
import sys

import pytest
import typer.main
from qf.cli import app

from test_layers import FOLDERS, ROOT, imports, wings  # isort: skip

READMES = {path: (ROOT / path / "README.md").read_text() for path in ("", *FOLDERS)}
COMMANDS = typer.main.get_command(app).commands
COMMAND_LINES = sorted({line for text in READMES.values() for line in re.findall(r"^qf [a-z].*$", text, re.M)})


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a language."""
    parts = re.split(r"^```(\w*)\n", text, flags=re.M)  # text, language, code, "", text …
    return [code for name, code in zip(parts[1::4], parts[2::4], strict=True) if name == language]


def tree(text: str) -> list[str]:
    """The files that the last code block of a README names, in their order: `a.py`, `wing/b.py`."""
    block = blocks(text)[-1]
    named, wing = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            wing = name if name.endswith("/") else ""
        if name.endswith(".py"):
            named.append((wing if line.startswith(" ") else "") + name)
    return named


def test_the_readme_is_short():
    assert len(READMES[""].splitlines()) <= 150


def test_the_tree_of_the_readme_has_a_line_for_every_folder():
    block = next(block for block in blocks(READMES[""]) if block.startswith("cli.py"))
    named = {line.split()[0].strip("/") for line in block.splitlines()}
    assert named >= {"data", *FOLDERS, "tests", "benchmarks"}
    for folder in FOLDERS:
        assert named >= wings(ROOT / folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_of_a_folder_names_every_file_in_the_order_of_import(folder):
    named = tree(READMES[folder])
    there = {file.relative_to(ROOT / folder).as_posix() for file in (ROOT / folder).rglob("*.py")}
    assert {name for name in there if not name.endswith("__init__.py")} == set(named)
    for number, name in enumerate(named):
        for path in imports(ROOT / folder / name):
            imported = "/".join(path[1:]) + ".py"
            if path[0] == folder and imported in named:
                assert named.index(imported) < number, f"{folder}/{name} imports {imported}, which stands below it"


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_exists(line):
    for part in line.split("#")[0].split("&&"):
        words = part.split()
        command = COMMANDS[words[1]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[2:]:
            if word.startswith("-"):
                assert word.split("=")[0] in options, f"{line}: {word}"


def test_every_option_in_the_text_exists():
    options = {o for c in COMMANDS.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    options |= {"--nproc-per-node", "--help", "--version", "--debug"}  # torchrun's and the program's own
    for folder, text in READMES.items():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in options, f"{folder}/README.md names {option}"


def test_every_command_is_described():
    for name in COMMANDS:
        assert any(f"`qf {name}" in text or f"\nqf {name}" in text for text in READMES.values()), name


def test_the_python_example_runs_as_it_stands(tmp_path):
    (code,) = blocks(READMES[""], "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loss_itc" in done.stdout


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
