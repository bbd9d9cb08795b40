"""The GPU benchmark at toy size, on whichever device there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # pytest-xdist runs several


def test_every_section_runs_and_json_is_all_there_is_on_stdout():
    done = subprocess.run([sys.executable, str(FILE), "--toy"], capture_output=True, text=True, env=ONE_THREAD)
    result = json.loads(done.stdout)
    assert done.returncode == 0, result["errors"]
    assert (result["skipped"], result["errors"]) == ([], {})
    assert result["correctness"]["correct"]
    assert result["extraction"]["toy"]["images_per_second"] > 0
    assert result["step"]["captions_5"]["times_faster"] > 0
    assert result["loader"]["cached_on_device_images_per_second"] > 0
    assert result["compile"]["times_faster"] > 0


def test_sections_that_cannot_start_in_time_are_listed():
    done = subprocess.run(
        [sys.executable, str(FILE), "--toy", "--minutes", "0"], capture_output=True, text=True, env=ONE_THREAD
    )
    assert len(json.loads(done.stdout)["skipped"]) == 5
