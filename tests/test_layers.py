"""The direction of imports: pipeline <- trainer <- retrieval <- cli, and a command line that starts at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data": set(),
    "pipeline": set(),
    "trainer": {"pipeline"},
    "retrieval": {"pipeline", "trainer", "data"},
}
# the order of the files in the README is the order of import
ORDER = {
    "pipeline": [
        "errors",
        "artifacts",
        "ahead",
        "device",
        "views",
        "images",
        "sources",
        "records",
        "spool",
        "catalogue",
        "rows",
        "columns",
        "parquet",
        "tables",
        "annotations",
        "folders",
        "tars",
        "datasets",
        "encoders",
        "text_tower",
        "codecs",
        "arrow_shards",
        "tar_shards",
        "features",
        "ledger",
        "stream",
        "extract",
    ],
    "trainer": [
        "config",
        "tokens",
        "qformer",
        "objectives",
        "batches",
        "cache",
        "launch",
        "processes",
        "step",
        "metrics",
        "embed",
        "checkpoints",
        "weights",
        "pretrained",
        "initial",
        "export",
        "curves",
        "log",
        "train",
    ],
    "retrieval": [
        "runs",
        "pictures",
        "index",
        "search",
        "build",
        "evaluate",
        "ask",
        "sheet",
        "explain",
        "heatmaps",
        "verify",
        "demo",
    ],
}


def relative_imports(file: Path):
    """(level, module) of each relative import of a file, and the absolute ones of our own package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("qf"), f"{file}: import qf relatively"


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_stands_below(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for level, module in relative_imports(file):
            if level == 2:
                assert module.split(".")[0] in ALLOWED[folder], f"{file} imports {module}"
            assert level <= 2, f"{file} reaches above the package"


@pytest.mark.parametrize("folder", ORDER)
def test_files_import_only_files_that_stand_above_them(folder):
    order = ORDER[folder]
    assert {file.stem for file in (ROOT / folder).glob("*.py")} == {*order, "__init__"}
    for name in order:
        tree = ast.parse((ROOT / folder / f"{name}.py").read_text())
        for node in tree.body:  # at the top of the file; inside a function an import may go back
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert order.index((node.module or "").split(".")[0]) < order.index(name), f"{folder}/{name}.py"


def test_the_command_line_starts_without_heavy_imports():
    heavy = "torch transformers numpy pyarrow polars faiss matplotlib PIL onnxruntime"
    code = f"import sys, qf.cli; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
