"""An interrupted run goes on: with --overwrite, after a kill, and past damaged checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from qf.pipeline.errors import ArtifactError, TrainingError
from qf.pipeline.replacement import replacement_of
from qf.trainer.config import Stage1Config
from qf.trainer.runs.checkpoints import BEST, last_step
from qf.trainer.stage1.stage import train

CPU = torch.device("cpu")
CONFIG = Stage1Config(
    epochs=3, batch_size=4, log_every=4, checkpoint_every=2, validate_every=4, vocab_size=60, num_query_tokens=2,
    precision="float32", max_val_images=4, contrast_first=0, warmup_steps=1, keep=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(bert_folder):
    """A model so small that its checkpoints take no time."""
    return replace(CONFIG, init=str(bert_folder))


@pytest.fixture(scope="module")
def whole(features, config, tmp_path_factory):
    """The run as it ends without an interrupt: 9 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(features, folder, config, CPU)
    return folder


def interrupted(features, folder, config, at=8, **options):
    """Train until the line of a step."""

    def report(line, total):
        if line["step"] >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(features, folder, config, CPU, report=report, **options)


def new_lines(steps):
    """A report that gathers the steps whose losses are logged."""
    return lambda line, total: steps.append(line["step"]) if "loss" in line else None


def weights(run):
    return (run / "model.safetensors").read_bytes()


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_overwrite_keeps_the_old_run_and_resumes_the_new_one(features, config, whole, tmp_path):
    run = tmp_path / "run"
    old = replace(config, lr=1e-5)
    train(features, run, old, CPU)
    kept = weights(run)
    interrupted(features, run, config, overwrite=True)
    assert weights(run) == kept
    assert last_step(replacement_of(run) / "checkpoints") == 6
    steps = []
    train(features, run, config, CPU, overwrite=True, report=new_lines(steps))
    assert min(steps) >= 8
    assert weights(run) == weights(whole)
    assert not replacement_of(run).exists()


def test_overwrite_resumes_an_unfinished_run_of_the_same_settings_in_its_place(features, config, whole, tmp_path):
    interrupted(features, tmp_path / "run", config, overwrite=True)
    steps = []
    train(features, tmp_path / "run", config, CPU, overwrite=True, report=new_lines(steps))
    assert min(steps) >= 8
    assert weights(tmp_path / "run") == weights(whole)


def test_a_replacement_that_diverges_costs_nothing(features, config, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(TrainingError, match="diverged"):
        train(features, run, replace(config, lr=1e30), CPU, overwrite=True)
    assert weights(run) == weights(whole)


def test_a_resumed_log_has_the_same_losses(features, config, whole, tmp_path):
    """Lines come every 4 steps and checkpoints every 2: the mean is over all 4 steps all the same."""
    interrupted(features, tmp_path / "run", config)
    train(features, tmp_path / "run", config, CPU)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_training_goes_on_from_the_last_checkpoint_that_is_sound(features, config, whole, tmp_path, caplog, damaged):
    run = tmp_path / "run"
    interrupted(features, run, config)
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert len(saved) == 3
    for number, path in enumerate(saved[-damaged:]):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: -number or None])
    train(features, run, config, CPU)
    assert weights(run) == weights(whole)
    assert caplog.text.count("is damaged: it is not what its checksum says; training goes on") == damaged


def test_damaged_best_weights_are_chosen_anew(features, config, tmp_path, caplog):
    run = tmp_path / "run"
    interrupted(features, run, config)
    best = run / "checkpoints" / BEST
    best.write_bytes(best.read_bytes()[:-1])
    train(features, run, config, CPU)
    assert "best.safetensors is damaged" in caplog.text
    assert json.loads((run / "manifest.json").read_text())["best"]["step"] >= 8


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b"\xff"], ids=range(4))
def test_damaged_settings_are_one_line_and_overwrite_starts_anew(features, config, whole, tmp_path, damage):
    run = tmp_path / "run"
    interrupted(features, run, config)
    (run / "config.json").write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"config\.json is damaged or was edited.*--overwrite"):
        train(features, run, config, CPU)
    train(features, run, config, CPU, overwrite=True)
    assert weights(run) == weights(whole)


def test_a_killed_overwrite_goes_on_with_the_same_command(trained, bert_folder, tmp_path):
    work = shutil.copytree(trained, tmp_path / "work")
    run = work / "runs" / "stage1"
    command = [
        sys.executable, "-m", "qf.cli", "train", "-w", str(work), "--overwrite", "--no-index", "--init", str(bert_folder),
        "--epochs", "200", "--batch-size", "12", "--checkpoint-every", "1", "--precision", "float32", "--device", "cpu",
    ]  # fmt: skip
    before = weights(run)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while last_step(replacement_of(run) / "checkpoints") < 3 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert weights(run) == before
    reached = last_step(replacement_of(run) / "checkpoints")
    assert reached >= 3
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(again.stderr.split("of which ")[1].split(" are done")[0]) >= reached
    assert weights(run) != before
