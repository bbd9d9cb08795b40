"""Several processes train as one would, over gloo; torchrun and `qf train --nproc` start them alike."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


def run_train(workspace, *arguments, torchrun=()):
    command = [
        sys.executable, "-m", *torchrun, "qf.cli", "train", "-w", str(workspace), "--epochs", "2", "--batch-size", "4", "--dropout", "0",
        "--preset", "tiny", "--num-query-tokens", "2", "--precision", "float32", "--device", "cpu",
        "--log-every", "1", "--no-index", "--json", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert b"find_unused_parameters" not in err
    return json.loads(out)


def test_two_processes_train_the_weights_of_one(features, tmp_path):
    """ITC and hard negatives reach across both processes; the contrastive batch is split into micro-batches."""
    (tmp_path / "features").symlink_to(features.folder)
    more = ["--contrastive-batch", "8", "--accumulate", "1", "--contrast-first", "0.3"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    runs = {
        "one": run_train(tmp_path, "--name", "one", *more),
        "two": run_train(tmp_path, "--name", "two", *more, "--nproc", "2"),
        "torchrun": run_train(tmp_path, "--name", "torchrun", *more, torchrun=torchrun),
    }
    for process in runs.values():
        assert finished(process)["steps"] == 2 * (len(features.rows("train")) // 8)
    one, *others = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in runs)
    for name, weight in one.items():
        assert (weight - others[0][name]).norm() <= 1e-3 * weight.norm() + 1e-4, name
        assert torch.equal(others[0][name], others[1][name])
    lines = [
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for first, second in zip(*lines, strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], abs=1e-3)
            assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(features, tmp_path):
    (tmp_path / "features").symlink_to(features.folder)
    process = run_train(tmp_path, "--nproc", "2", "--epochs", "40")
    metrics = tmp_path / "runs" / "stage1" / "metrics.jsonl"
    while not metrics.is_file() or not metrics.stat().st_size:
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode()
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by signal 9; run the same command to resume" in err.decode()
    assert np.isfinite(finished(run_train(tmp_path, "--nproc", "2", "--epochs", "40"))["loss"])
