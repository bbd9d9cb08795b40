"""The loop trains any stage: here a linear model. It resumes to the bit, keeps the best weights, stops, and refuses divergence."""

import json
import math
from dataclasses import replace

import pytest
import torch
from qf.pipeline.errors import TrainingError
from qf.pipeline.tensor_files import read_info
from qf.trainer.config import LoopConfig
from qf.trainer.loop import learning_rate, make_optimizer, planned_steps, refuse_divergence, train_stage
from safetensors.torch import load_file

CPU = torch.device("cpu")
CONFIG = LoopConfig(
    epochs=6, accumulate=2, lr=0.4, warmup_steps=2, weight_decay=0.0, log_every=2, validate_every=3, checkpoint_every=2
)
WANTED = torch.tensor([[2.0, -1.0]])


class Line:
    """A stage of its own: fits a linear model to points of a line. Every batch holds 5 points."""

    losses = ("loss_square", "loss_never")
    batches_per_epoch = 4
    validates = True

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(2, 1, bias=False)
        self.steps = []

    def batches(self, start, stop):
        for number in range(start, stop):
            yield torch.randn(5, 2, generator=torch.Generator().manual_seed(number))

    def step(self, batch, number, weight, last):
        self.steps.append((number, weight, last))
        loss = (self.model(batch) - batch @ WANTED.T).square().mean()
        (loss * weight).backward()
        return {"loss_square": loss.detach()}

    def validate(self, step):
        return {"distance": (self.model.weight - WANTED).norm().item()}

    def better(self, step, metrics):
        return 1 / (1 + metrics["distance"]) if step > 2 else None


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, config=CONFIG, stage=None, **options):
    folder.mkdir(exist_ok=True)
    stage = stage or Line()
    return stage, train_stage(stage, folder, config, CPU, **options)


def test_a_stage_of_a_few_lines_is_trained_logged_and_saved(tmp_path):
    stage, state = run(tmp_path)
    assert (state.step, state.pairs) == (12, 12 * 2 * 5)
    assert stage.steps == [(number, 0.5, number % 2 == 1) for number in range(24)]
    lines = log_of(tmp_path)
    training = [line for line in lines if "split" not in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    assert [line["epoch"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["loss"] == training[-1]["loss_square"] < 0.2 * training[0]["loss"]
    assert all(line["loss_never"] is None for line in training)
    checks = [line for line in lines if line.get("split") == "val"]
    assert [line["step"] for line in checks] == [3, 6, 9, 12]
    assert [line["best"] for line in checks[:2]] == [False, True]  # the first is not compared
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.safetensors",
        "step-00000010.safetensors",
        "step-00000012.safetensors",
    ]
    kept = next(line for line in reversed(checks) if line["best"])
    assert kept["distance"] == min(line["distance"] for line in checks[1:])
    info = read_info(tmp_path / "checkpoints" / "best.safetensors")
    assert info == {"step": kept["step"], "distance": kept["distance"]}


def test_an_interrupted_loop_resumes_to_the_bit(tmp_path):
    calm, _ = run(tmp_path / "calm")

    def interrupt(line, total):
        assert total == 12
        if line["step"] == 7 or ("split" in line and line["step"] == 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", report=interrupt)
    resumed, state = run(tmp_path / "broken")
    assert resumed.steps[0][0] == 4 * 2  # from the checkpoint of step 4
    assert state.step == 12
    assert torch.equal(resumed.model.weight, calm.model.weight)
    name = "checkpoints/step-00000012.safetensors"
    ours, theirs = load_file(tmp_path / "broken" / name), load_file(tmp_path / "calm" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_patience_counts_only_validations_that_are_compared(tmp_path):
    config = replace(CONFIG, lr=0.0, min_lr=0.0, validate_every=1, patience=2)
    _, state = run(tmp_path, config)
    assert state.step == 6  # compared from step 4 on: the best one, and two no better
    assert state.stale == 2
    assert log_of(tmp_path)[-1]["step"] == 6
    assert run(tmp_path, config)[1].step == 6  # and stays stopped


def test_a_stage_without_validation_trains(tmp_path):
    stage = Line()
    stage.validates = False
    _, state = run(tmp_path, replace(CONFIG, validate_every=0), stage)
    assert state.step == 12
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_the_number_of_steps_counts_accumulated_batches():
    assert planned_steps(4, replace(CONFIG, epochs=6, accumulate=3)) == 8
    assert planned_steps(4, replace(CONFIG, epochs=0.01)) == 1


def test_weight_decay_is_on_matrices_only():
    matrices, vectors = make_optimizer(torch.nn.Linear(3, 2), LoopConfig(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], group["params"][0].ndim) for group in (matrices, vectors)] == [(0.3, 2), (0.0, 1)]


def test_the_learning_rate_is_a_function_of_the_step():
    config = LoopConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 200, config) for step in range(200)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    half = 10 + 95
    assert rates[half] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_loss_a_gradient_or_a_weight_that_is_not_finite_is_refused():
    model = torch.nn.Linear(2, 2)
    refuse_divergence(7, CONFIG, ["loss_itc"], torch.tensor([1.0, 2.0]), model)
    for sums, what in (([math.inf, 1.0], "loss_itc"), ([1.0, math.nan], "the gradient")):
        with pytest.raises(TrainingError, match=f"{what} is not finite at step 7"):
            refuse_divergence(7, CONFIG, ["loss_itc"], torch.tensor(sums), model)
    model.bias.data[1] = math.nan
    with pytest.raises(TrainingError, match="a weight is not finite at step 7"):
        refuse_divergence(7, CONFIG, ["loss_itc"], torch.tensor([1.0, 2.0]), model)
