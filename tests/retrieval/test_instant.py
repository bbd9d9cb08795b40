"""A text search starts light: the process imports neither PyTorch nor transformers nor pyarrow, and reads no weights anew."""

import json
import shutil
import subprocess
import sys

import pytest
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.journey import index_run
from qf.retrieval.mix_file import WAYS
from qf.retrieval.searcher import open_searcher

from conftest import reseal  # isort: skip

ON = ComputeOptions("cpu", "float32")
HEAVY = ["torch", "transformers", "pyarrow", "polars", "matplotlib", "PIL"]
SEARCH = """
import sys
from qf.cli import main
try:
    main()
finally:
    print(*[name for name in HEAVY if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def workspaces(trained, tmp_path_factory):
    """Copies of the trained workspace: with a run whose mix counts both spaces, and with an index but without a run."""
    mixed, untrained = (tmp_path_factory.mktemp(name) / "work" for name in ("mixed", "untrained"))
    shutil.copytree(trained, mixed)
    weights = {way: {"clip": 0.5, "itc": 0.5, "itm": 0.0} for way in WAYS}
    reseal(mixed / "runs" / "stage1" / "mix.json", **weights)
    shutil.copytree(trained / "features", untrained / "features")
    index_run(Workspace(untrained), None, ON, print)
    return {"mixed": mixed, "untrained": untrained}


def search(workspace, *options):
    """The hits of a search as a process, and the heavy modules that it imported."""
    code = SEARCH.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", code, "search", "a red bar", "-k", "3", "--json", "-w", str(workspace), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("name", "options"),
    [("untrained", ()), ("mixed", ()), ("mixed", ("--scorer", "itc")), ("mixed", ("--scorer", "encoder"))],
)
def test_a_text_search_imports_nothing_heavy(workspaces, name, options):
    hits, heavy = search(workspaces[name], *options)
    assert heavy == []
    scorer = options[1] if options else "mix"
    wanted = open_searcher(Workspace(workspaces[name]), ON).text("a red bar", 3, scorer=scorer)
    assert [(hit["key"], hit["score"]) for hit in hits] == [(hit.key, hit.score) for hit in wanted]


def test_a_contact_sheet_needs_pictures_alone(workspaces, tmp_path):
    _, heavy = search(workspaces["mixed"], "--sheet", str(tmp_path / "hits.png"))
    assert heavy == ["PIL"]
    assert (tmp_path / "hits.png").stat().st_size > 1000


def test_what_was_checked_once_is_not_read_whole_again(workspaces, monkeypatch):
    """Neither the index nor the weights of run and encoder."""
    open_searcher(Workspace(workspaces["mixed"]), ON).text("a red bar", 3)
    hashed = []
    monkeypatch.setattr("hashlib.file_digest", lambda file, kind: hashed.append(file.name))
    assert len(open_searcher(Workspace(workspaces["mixed"]), ON).text("a red bar", 3)) == 3
    assert hashed == []
