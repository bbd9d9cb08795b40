"""The rules of the tree (README, "The tree"): folders and wings import downwards, and the command line starts light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"data": (), "pipeline": (), "trainer": ("pipeline",), "retrieval": ("data", "pipeline", "trainer")}
FOLDERS = [folder for folder in BELOW if folder != "data"]


def imports(file: Path):
    """The modules of our own that a file imports, anywhere in it, as paths from the root: ("pipeline", "datasets", "read")."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            assert len(package) >= node.level - 1, f"{file} reaches above the package"
            yield (*base, *(node.module or "").split("."))
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("qf"), f"{file}: import qf relatively"


def unit(path: tuple[str, ...], depth: int) -> str:
    return path[depth] if len(path) > depth else ""


def graph(folder: Path) -> dict[str, set[str]]:
    """Of each file and wing in a folder, those in the folder that it imports."""
    depth = len(folder.relative_to(ROOT).parts)
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        if file.name == "__init__.py":
            continue
        own = unit(file.relative_to(ROOT).with_suffix("").parts, depth)
        inside = [path for path in imports(file) if path[:depth] == folder.relative_to(ROOT).parts]
        found.setdefault(own, set()).update({unit(path, depth) for path in inside} - {own})
    return found


def wings(folder: Path) -> set[str]:
    return {init.parent.name for init in folder.glob("*/__init__.py")}


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_only_folders_below(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for path in imports(file):
            assert path[0] == folder or path[0] in BELOW[folder], f"{file} imports {'.'.join(path)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_a_folder_and_within_a_wing_make_no_circle(folder):
    for place in [ROOT / folder, *(ROOT / folder / wing for wing in wings(ROOT / folder))]:
        try:
            list(TopologicalSorter(graph(place)).static_order())
        except CycleError as error:
            pytest.fail(f"{place}: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_wing_that_imports_a_wing_beside_it_is_imported_by_none(folder):
    """Such a wing is on top and joins the others; every other wing stands for itself."""
    side_by_side = {name: used & wings(ROOT / folder) for name, used in graph(ROOT / folder).items()}
    side_by_side = {name: used for name, used in side_by_side.items() if name in wings(ROOT / folder)}
    joining = {name for name, used in side_by_side.items() if used}
    for name, used in side_by_side.items():
        assert not used & joining, f"{folder}/{name} imports {used & joining}, which join other wings"


def loaded(code: str, modules: str) -> list[str]:
    """Which of the modules a fresh Python has loaded after `code`."""
    code = f"import sys; {code}; print(*[m for m in '{modules}'.split() if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_command_line_starts_without_heavy_imports():
    heavy = "torch transformers numpy pyarrow polars faiss matplotlib PIL onnxruntime rich"
    assert loaded("import qf.cli", heavy) == []


def test_index_search_and_the_door_for_queries_import_no_torch():
    files = [ROOT / "retrieval" / "search.py", *ROOT.glob("retrieval/index/*.py"), *ROOT.glob("retrieval/encode/*.py")]
    names = ["qf." + ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    assert loaded(f"import {', '.join(names)}", "torch transformers") == []


def test_info_imports_nothing_heavy():
    assert loaded("import qf.retrieval.info", "torch transformers numpy pyarrow polars faiss matplotlib PIL") == []
