"""The measurement of a machine's pace takes real steps of both kinds, and a few of them."""

import pytest
import torch
from qf.trainer.config import Stage1Config
from qf.trainer.stage1 import pace
from qf.trainer.stage1.pace import Pace, measure_pace
from qf.trainer.stage1.stage import Stage1

CPU = torch.device("cpu")
SMALL = Stage1Config(epochs=12, batch_size=4, vocab_size=60, num_query_tokens=2, precision="float32")


@pytest.fixture
def steps(monkeypatch):
    """The losses of every step that is taken."""
    taken, step = [], Stage1.step

    def counted(*arguments, **options):
        losses = step(*arguments, **options)
        taken.append([name for name in losses if losses[name] is not None])
        return losses

    monkeypatch.setattr(Stage1, "step", counted)
    return taken


def test_steps_of_itc_alone_and_of_all_losses_are_measured_after_a_warm_up(features, steps, monkeypatch):
    monkeypatch.setattr(pace, "ENOUGH", 0.0)
    measured = measure_pace(features, SMALL, CPU)
    assert measured.itc > 0
    assert measured.full > 0
    assert steps == [["loss_itc"]] * 2 + [["loss_itc", "loss_itm", "loss_itg"]] * 2


def test_a_fast_machine_takes_a_limited_number_of_steps(features, steps, monkeypatch):
    monkeypatch.setattr(pace, "ENOUGH", float("inf"))
    monkeypatch.setattr(pace, "MOST", 3)
    measure_pace(features, SMALL, CPU)
    assert len(steps) == 2 * (1 + 3)


def test_the_mean_step_weighs_both_kinds():
    assert Pace(1.0, 5.0).step(0.0) == 5.0
    assert Pace(1.0, 5.0).step(0.25) == 4.0
