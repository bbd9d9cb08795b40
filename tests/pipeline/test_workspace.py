import pytest
from qf.pipeline.artifacts import write_sealed
from qf.pipeline.errors import QfError
from qf.pipeline.workspace import Workspace


def write(folder, **manifest):
    folder.mkdir(parents=True)
    write_sealed(folder / "manifest.json", {"kind": "run", "version": 2, **manifest})


def test_the_run_that_finished_last_is_the_latest_and_damaged_ones_are_skipped(tmp_path, caplog):
    workspace = Workspace(tmp_path)
    assert workspace.latest_run() is None
    with pytest.raises(QfError, match="no finished run; train one with `qf train`"):
        workspace.run()
    write(workspace.runs / "a", finished="2026-02-01")
    write(workspace.runs / "b", finished="2026-01-01")
    write(workspace.runs / "c", finished="2026-03-01")
    (workspace.runs / "c" / "manifest.json").write_text("{")
    assert workspace.run() == workspace.runs / "a"
    assert "is damaged or was edited" in caplog.text


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_run_is_a_folder_of_the_workspace(tmp_path, name):
    with pytest.raises(QfError, match="is not the name of a run"):
        Workspace(tmp_path).run(name)


def test_weights_may_be_named_by_a_run_of_the_workspace(tmp_path):
    workspace = Workspace(tmp_path)
    (workspace.runs / "one").mkdir(parents=True)
    (workspace.runs / "one" / "config.json").write_text("{}")
    assert workspace.weights("one") == str((workspace.runs / "one").resolve())
    assert workspace.weights("bert-base-uncased") == "bert-base-uncased"
    assert workspace.weights(None) is None


def test_unfinished_artifacts_are_warned_of(tmp_path, caplog):
    workspace = Workspace(tmp_path)
    with pytest.raises(QfError, match="holds no features, run or index"):
        workspace.artifacts()
    workspace.features.mkdir()
    write_sealed(workspace.features / "plan.json", {"codec": "int8"})
    with pytest.raises(QfError, match="is unfinished; run the command that began it again"):
        workspace.artifacts()
    write(workspace.runs / "a")
    assert workspace.artifacts() == [workspace.runs / "a"]
    assert "features: unfinished" in caplog.text
