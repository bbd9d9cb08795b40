"""The step that the benchmark compares with computes the same."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "stage1_step.py"


@pytest.mark.parametrize("captions", [1, 5])
def test_both_steps_give_the_same_losses_and_gradients(captions):
    spec = importlib.util.spec_from_file_location("stage1_step", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    arguments = Namespace(preset="tiny", tokens=9, width=16, captions_file=None, device="cpu", vocab_size=2000)
    apart = benchmark.compare(arguments, captions)
    assert set(apart) == {"loss_itc", "loss_itm", "loss_itg", "gradients"}
    assert max(apart.values()) < 1e-4
