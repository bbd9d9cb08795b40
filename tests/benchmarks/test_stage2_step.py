"""The step of transformers that the benchmark compares qf with computes the same as qf."""

from argparse import Namespace
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_both_steps_give_the_same_losses_and_gradients(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from qf.trainer.weights.names import HUGGINGFACE_NAMES
    from stage2_step import Sides

    arguments = Namespace(preset="tiny", vision="toy", llm="toy", batch_size=3, text_tokens=5)
    sides = Sides(arguments, torch.device("cpu"), torch.float32)
    sides.ours.eval(), sides.theirs.eval()
    losses = [sides.loss(side) for side in ("qf", "transformers")]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {name: parameter.grad for name, parameter in sides.theirs.named_parameters()}
    for name, parameter in sides.ours.named_parameters():
        key = HUGGINGFACE_NAMES.theirs(name.removeprefix("qformer.")) if name.startswith("qformer.") else name
        torch.testing.assert_close(parameter.grad, theirs[key], atol=1e-5, rtol=1e-3)
