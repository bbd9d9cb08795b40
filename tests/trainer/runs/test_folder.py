"""The folder of a run: what may begin there, what is kept, and the result that a person and a script read."""

import json

import pytest
import torch
from qf.pipeline.artifacts import write_sealed
from qf.pipeline.errors import ArtifactError
from qf.trainer.runs.checkpoints import BEST, TrainState, last_step, load_best, save_best, save_checkpoint
from qf.trainer.runs.folder import Trained, begin, is_finished, recorded_precision, result

TRAIN = {"lr": 0.1, "max_text_length": 8, "losses": "itc", "init": None}
SETTINGS = {"train": TRAIN, "features": "a" * 64, "precision": "torch.bfloat16"}
TRAINED = Trained(
    steps=3, planned_steps=6, stopped="validation R@1 got no better, --patience 1", epochs=1.0, pairs_per_second=9.0,
    seconds=2.0, wait_share=0.0, loss=1.25, best={"step": 2, "text_to_image_R@1": 50.0, "image_to_text_R@1": 25.0}, run="r",
)  # fmt: skip


def checkpoint(folder, step=4):
    model = torch.nn.Linear(2, 2)
    save_checkpoint(folder / "checkpoints", model, torch.optim.AdamW(model.parameters()), TrainState(step), keep=2)
    return model


def test_an_unfinished_run_with_a_checkpoint_refuses_other_settings(tmp_path):
    begin(tmp_path, SETTINGS)
    assert not is_finished(tmp_path, SETTINGS | {"precision": "torch.float32"})  # nothing to lose yet
    checkpoint(tmp_path)
    assert not is_finished(tmp_path, SETTINGS)
    with pytest.raises(ArtifactError, match=r"train\.lr was 0\.1 and is now 1; choose another --name"):
        is_finished(tmp_path, SETTINGS | {"train": TRAIN | {"lr": 1}})
    with pytest.raises(ArtifactError, match="the features have changed"):
        is_finished(tmp_path, SETTINGS | {"features": "b" * 64})


def test_a_run_without_a_checkpoint_is_cleared_and_one_with_a_checkpoint_is_kept(tmp_path):
    (tmp_path / "loss.png").touch()
    (tmp_path / "notes.txt").touch()  # not qf's
    begin(tmp_path, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    checkpoint(tmp_path)
    begin(tmp_path, SETTINGS)
    assert last_step(tmp_path / "checkpoints") == 4
    begin(tmp_path, SETTINGS | {"precision": "torch.float32"})
    assert last_step(tmp_path / "checkpoints") == 0
    assert (tmp_path / "notes.txt").is_file()


def test_the_precision_is_recorded_once_there_is_something_to_resume(tmp_path):
    begin(tmp_path, SETTINGS)
    assert recorded_precision(tmp_path, overwrite=False) is None
    checkpoint(tmp_path)
    assert recorded_precision(tmp_path, overwrite=False) == torch.bfloat16
    write_sealed(tmp_path / "config.json", SETTINGS | {"precision": "strange"})
    assert recorded_precision(tmp_path, overwrite=False) is None


def test_old_checkpoints_are_deleted(tmp_path):
    for step in (1, 2, 10):
        checkpoint(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002.safetensors", "step-00000010.safetensors"]


def test_damaged_best_weights_are_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    assert load_best(tmp_path, model) == {}
    save_best(tmp_path, model, {"step": 2})
    assert load_best(tmp_path, torch.nn.Linear(2, 2)) == {"step": 2}
    (tmp_path / BEST).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"best\.safetensors is damaged"):
        load_best(tmp_path, model)


def test_a_result_is_json_with_an_index_only_where_there_is_one():
    fields = [
        "steps",
        "planned_steps",
        "stopped",
        "epochs",
        "pairs_per_second",
        "seconds",
        "wait_share",
        "loss",
        "best",
        "run",
    ]
    assert list(TRAINED.to_json()) == fields
    assert json.loads(json.dumps(Trained(**TRAINED.to_json(), index="i").to_json()))["index"] == "i"


def test_a_result_reads_as_one_line():
    assert str(TRAINED) == (
        "run       r: 3 steps of 6 (validation R@1 got no better, --patience 1), loss 1.250; validation R@1 in % of the "
        "weights that are kept: 50.0 text to image, 25.0 image to text  (2.0 s)"
    )


def test_the_result_of_a_finished_run_is_in_its_manifest(trained):
    run = trained / "runs" / "stage1"
    found = result(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert found.run == str(run)
    assert (found.steps, found.best) == (manifest["steps"], manifest["best"])
    assert found.steps == found.planned_steps
