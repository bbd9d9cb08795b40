"""Several processes train as one would, over gloo; torchrun and `qf train --nproc` start them alike."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from qf.pipeline.files import locked
from safetensors.torch import load_file

LONG = ("--epochs", "400", "--checkpoint-every", "1")


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


def test_two_processes_train_the_soft_prompt_of_one(features, tmp_path):
    (tmp_path / "features").symlink_to(features.folder)
    more = ["--stage", "2", "--llm", "builtin", "--llm-precision", "float32", "--init", "none"]
    runs = {name: run_train(tmp_path, "--name", name, *more, "--nproc", name) for name in ("1", "2")}
    for process in runs.values():
        finished(process)
    one, two = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in runs)
    for name, weight in one.items():
        assert (weight - two[name]).norm() <= 1e-3 * weight.norm() + 1e-4, name


def children_of(process):
    """The processes that a launcher started, in the order of their ranks."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, listed.stdout.split()))


def started(workspace, *arguments, **options):
    """A long training of two processes that has a checkpoint, and the processes themselves."""
    process = run_train(workspace, *LONG, *arguments, **options)
    while not list((workspace / "runs").glob("stage1/checkpoints/step-*.safetensors")):
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode()
    return process, children_of(process)


def alive(pid):
    """Whether a process runs. One that has ended and that nobody waits for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def own_lines(err):
    """The lines on stderr without the progress."""
    return [line for line in err.decode().splitlines() if not line.startswith(("train ", "step ", "training on"))]


@pytest.fixture
def workspace(features, tmp_path):
    (tmp_path / "features").symlink_to(features.folder)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_trains_on_when_the_launcher_ends(workspace, number):
    process, children = started(workspace, "--nproc", "2")
    assert len(children) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))
    with locked(workspace / "runs" / "stage1"):  # the lock is free
        pass
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert own_lines(err) == ["qf: interrupted; run the same command to go on"]


def test_processes_end_when_torchrun_is_killed(workspace):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process, children = started(workspace, torchrun=torchrun)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))


def test_a_killed_process_ends_the_others_in_one_line_and_the_run_goes_on(workspace):
    process, children = started(workspace, "--nproc", "2")
    os.kill(children[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert own_lines(err) == ["qf: error: process 1 was killed by signal 9; run the same command to resume"]
    resumed = run_train(workspace, "--nproc", "2", *LONG)
    first = resumed.stderr.readline().decode()
    resumed.terminate()
    resumed.communicate(timeout=60)
    assert resumed.returncode == 130
    assert "of which" in first


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is set and MASTER_ADDR is not"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "make no sense"),
    ],
)
def test_an_environment_that_is_incomplete_is_one_line(workspace, environment, problem, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, err = (process := run_train(workspace)).communicate(timeout=60)
    assert process.returncode == 1
    (line,) = own_lines(err)
    assert line.startswith("qf: error: ")
    assert problem in line
    assert "qf train --nproc N" in line
