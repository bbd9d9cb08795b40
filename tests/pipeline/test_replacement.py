"""Replacing an artifact: the old one stays until the new one is complete."""

import pytest
from qf.pipeline.artifacts import MANIFEST
from qf.pipeline.features.manifest import FEATURES
from qf.pipeline.replacement import place_to_write, replacement_of, settle


def fill(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)


def place(folder, overwrite=True, resumes=False):
    return place_to_write(folder, overwrite, lambda there: resumes)


def test_work_goes_in_place_where_there_is_nothing_to_replace(tmp_path):
    folder = tmp_path / "features"
    assert place(folder) == folder
    fill(folder)
    assert place(folder) == folder
    (folder / "plan.json").touch()
    assert place(folder, resumes=True) == folder
    assert place(folder, overwrite=False) == folder


def test_finished_and_other_work_is_replaced_beside_it(tmp_path):
    folder = tmp_path / "features"
    fill(folder, "plan.json")
    assert place(folder) == replacement_of(folder)
    (folder / MANIFEST).touch()
    assert place(folder, resumes=True) == replacement_of(folder)
    assert place(folder, overwrite=False) == folder


def test_a_waiting_replacement_is_warned_of(tmp_path, caplog):
    folder = tmp_path / "features"
    fill(folder, MANIFEST)
    fill(replacement_of(folder), "plan.json")
    assert place(folder, overwrite=False) == folder
    assert "holds an unfinished replacement: --overwrite goes on with it" in caplog.text


def test_the_new_artifact_takes_the_place_of_the_old_one_and_other_files_stay(tmp_path):
    folder = tmp_path / "features"
    fill(folder, MANIFEST, "shard-00000.arrow", "shard-00001.arrow", "notes.txt")
    fill(replacement_of(folder), MANIFEST, "shard-00000.arrow")
    settle(replacement_of(folder), folder, FEATURES)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "notes.txt", "shard-00000.arrow"]
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_between_the_two_renames_is_mended(tmp_path, kept):
    folder = tmp_path / "features"
    fill(tmp_path / ".features.old", MANIFEST)
    fill(folder if kept else replacement_of(folder), MANIFEST, "new")
    assert place(folder, overwrite=False) == folder
    assert (folder / "new").is_file()
    place(folder, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
