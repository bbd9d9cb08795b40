"""The GPU benchmark at toy size, on whichever device there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


# pytest-xdist runs several processes; torch.compile takes 15 seconds and has a test of its own
QUICK = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def test_every_section_runs_and_json_is_all_there_is_on_stdout():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, env=QUICK)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert (done.returncode, result["skipped"], result["errors"]) == (0, [], {})
    assert result["correctness"]["correct"]
    assert result["extraction"]["toy"]["images_per_second"] > 0
    assert result["step"]["captions_5"]["times_faster"] > 0
    assert result["loader"]["cached_on_device"]["images_per_second"] > 0
    assert result["compile"]["times_faster"] > 0


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def test_sections_that_cannot_start_in_time_are_skipped(gpu, capsys):
    assert gpu.main(["--toy", "--minutes", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["skipped"] == ["correctness", "extraction", "step", "loader", "compile"]


def test_a_section_that_fails_is_reported_and_the_others_run(gpu, capsys, monkeypatch):
    def broken(arguments, device, folder):
        raise RuntimeError("no luck")

    def sound(arguments, device, folder):
        print("not JSON")
        return {"fine": True}

    monkeypatch.setattr(gpu, "SECTIONS", {broken: 1, sound: 1})
    assert gpu.main(["--toy"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["errors"] == {"broken": "RuntimeError: no luck"}
    assert result["sound"] == {"fine": True}


@pytest.mark.parametrize("off", ["losses", "gradients", "tokens"])
def test_differences_above_a_tolerance_are_not_correct(gpu, capsys, monkeypatch, off):
    monkeypatch.setattr(gpu, "SECTIONS", {gpu.correctness: 1})
    monkeypatch.setitem(gpu.TOLERANCES, off, -1.0)
    assert gpu.main(["--toy"]) == 1
    assert json.loads(capsys.readouterr().out)["correctness"]["correct"] is False
