"""The plain step that the benchmark compares qf with computes the same as qf."""

from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("captions", [1, 5])
def test_both_steps_give_the_same_losses_and_gradients(captions, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from stage1_step import compare

    arguments = Namespace(preset="tiny", tokens=9, width=16, captions_file=None, device="cpu", vocab_size=2000)
    apart = compare(arguments, captions)
    assert set(apart) == {"loss_itc", "loss_itm", "loss_itg", "gradients"}
    assert max(apart.values()) < 1e-4
