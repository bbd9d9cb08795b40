"""The training loop of every stage: optimiser, schedule, log, validation, checkpoints. It knows no objective.

A stage gives batches, a step, a validation and a score. All that is random depends on the number of the batch, so that
an interrupted run resumes from its last checkpoint and ends with the same weights, to the bit on a CPU."""

import math
import time
from collections.abc import Generator, Sequence, Sized
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..pipeline.errors import TrainingError
from .config import LoopConfig
from .distributed.processes import ALONE, Processes
from .manifest import CHECKPOINTS
from .runs.checkpoints import TrainState, drop_damaged_best, load_last_checkpoint, save_best, save_checkpoint
from .runs.log import Log, Report, no_report

Batch = TypeVar("Batch", bound=Sized)  # its length is the number of its image-text pairs


class Stage(Protocol[Batch]):
    """A stage of training: its model, its batches, its step, its validation."""

    @property
    def model(self) -> nn.Module:
        """The module that is saved. Its parameters are trained, but for those that require no gradients."""

    @property
    def losses(self) -> Sequence[str]:
        """The loss fields of a log line. A loss that was not trained is null there."""

    @property
    def batches_per_epoch(self) -> int: ...

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches `start` to `stop` - 1, numbered from 0 over all epochs."""

    def step(self, batch: Batch, number: int, weight: float, last: bool) -> dict[str, Tensor]:
        """Add `weight` times the gradients of batch `number` to the model's parameters.

        Returns this process's share of each loss, on the device. Processes exchange gradients only with `last`."""

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the model after step `step`. Rank 0 alone calls it."""

    def better(self, step: int, metrics: dict[str, float]) -> float | None:
        """The score of these metrics, 0 or more; the loop keeps the weights with the highest one. None: do not compare yet."""


def planned_steps(batches_per_epoch: int, config: LoopConfig) -> int:
    """The number of steps of a whole run, at least 1."""
    return max(1, round(config.epochs * (batches_per_epoch / config.accumulate)))


def learning_rate(step: int, total: int, config: LoopConfig) -> float:
    """Linear warm-up, then half a cosine down to `min_lr`: a function of the step alone."""
    warmup = min(config.warmup_steps, total // 4)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW for the parameters that require gradients, with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def train_stage(
    stage: Stage[Batch],
    folder: Path,
    config: LoopConfig,
    device: torch.device,
    processes: Processes = ALONE,
    report: Report = no_report,
    writer: type | None = None,
) -> TrainState:
    """Train the stage's model from the last checkpoint in the run `folder`, or from its start. Returns where training ended.

    Rank 0 writes the log and the checkpoints, and calls `report` with each line. `writer` is the class of `summary_writer`.
    TrainingError if a loss, a gradient or a weight is no longer finite."""
    model, checkpoints = stage.model, folder / CHECKPOINTS
    steps_per_epoch = stage.batches_per_epoch / config.accumulate
    total = planned_steps(stage.batches_per_epoch, config)
    validate_every = config.validate_every or max(1, round(steps_per_epoch))
    optimizer = make_optimizer(model, config)
    state = load_last_checkpoint(checkpoints, model, optimizer, device)
    if processes.first:
        drop_damaged_best(checkpoints, state)
    state.stale = processes.number(state.stale, device)
    start, began = state.step, time.perf_counter() - state.seconds
    meter = Meter(stage.losses, device, state, processes)
    data = closing(stage.batches(start * config.accumulate, total * config.accumulate))
    logged = Log(folder, start, state.seconds, total, report, writer) if processes.first else nullcontext()

    with data as feed, logged as log:
        for step in range(start, total):
            if out_of_patience(state, config):
                break
            # ---- one step --------------------------------------------------------------------------------------------
            lr = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                asked = time.perf_counter()
                batch = next(feed)
                state.waited += time.perf_counter() - asked
                last = number + 1 == (step + 1) * config.accumulate
                meter.add(stage.step(batch, number, 1 / config.accumulate, last), 1 / config.accumulate)
                state.pairs += len(batch)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            meter.gradient += grad_norm
            optimizer.step()
            optimizer.zero_grad()
            # ----------------------------------------------------------------------------------------------------------
            done = state.step = step + 1
            validate_now = stage.validates and (done % validate_every == 0 or done == total)
            log_now, save_now = done % config.log_every == 0, done % config.checkpoint_every == 0

            if validate_now or log_now or save_now or done == total:  # once in a while: is all still finite?
                refuse_divergence(done, config, stage.losses, meter.sums(), model)

            if validate_now:  # once in a while: how good is the model?
                paused = time.perf_counter()
                if processes.first:
                    metrics = stage.validate(step)
                    score = stage.better(step, metrics)
                    best = score is not None and score > state.best
                    if score is not None and best:
                        state.best, state.stale = score, 0
                        save_best(checkpoints, model, {"step": done, **metrics})
                    elif score is not None:
                        state.stale += 1
                state.stale = processes.number(state.stale, device)
                meter.since += time.perf_counter() - paused  # the rate is that of training alone

            ends = done == total or out_of_patience(state, config)
            if log_now or ends:  # once in a while: how far are we?
                losses, rates = meter.take(state)
                line = {
                    "step": done,
                    "epoch": round(done / steps_per_epoch, 3),
                    **losses,
                    "lr": lr,
                    "grad_norm": round(grad_norm.item(), 4),
                    **rates,
                    "seconds": round(time.perf_counter() - began, 2),
                }
                if log:
                    log.write(line)
            if validate_now and log:
                log.write({"step": done, "split": "val", **metrics, "best": best})

            state.seconds = time.perf_counter() - began
            if save_now or ends:  # once in a while: a place to resume from
                state.losses = meter.totals()
                if processes.first:
                    save_checkpoint(checkpoints, model, optimizer, state, config.keep)
    return state


class Meter:
    """Losses, gradient norms and rates since the last line of the log. The losses are summed on the device."""

    def __init__(self, names: Sequence[str], device: torch.device, state: TrainState, processes: Processes) -> None:
        """A run that resumes between two lines takes up the sums of its checkpoint."""
        self.names, self.device, self.processes = names, device, processes
        self._begin(state)
        for name, (total, weight) in state.losses.items():
            self.weights[name] = weight
            if processes.first:
                self.losses[name] += total

    def _begin(self, state: TrainState) -> None:
        self.losses = {name: torch.zeros((), device=self.device) for name in self.names}
        self.weights = dict.fromkeys(self.names, 0.0)
        self.gradient = torch.zeros((), device=self.device)
        self.since, self.pairs, self.waited = time.perf_counter(), state.pairs, state.waited

    def add(self, shares: dict[str, Tensor], weight: float) -> None:
        """Add this process's share of the losses of a batch that counts `weight`."""
        for name, share in shares.items():
            self.losses[name] += weight * share
            self.weights[name] += weight

    def sums(self) -> Tensor:
        """(losses + 1,): this process's sum of each loss, and of the gradient norms."""
        return torch.stack([*self.losses.values(), self.gradient])

    def totals(self) -> dict[str, tuple[float, float]]:
        """The sum of each loss over all processes, and its weight. All processes call it. Waits for the device."""
        sums = dict(zip(self.names, self.processes.total(self.sums()).tolist(), strict=False))
        return {name: (sums[name], self.weights[name]) for name in self.names}

    def take(self, state: TrainState) -> tuple[dict[str, float | None], dict[str, float]]:
        """The mean of each loss, None if it was not trained, with their total; and the rates. Then begins anew.

        All processes call it. Waits for the device."""
        means = {name: total / weight for name, (total, weight) in self.totals().items() if weight}
        seconds = time.perf_counter() - self.since
        losses = {name: round(means[name], 5) if name in means else None for name in self.names}
        rates = {
            "pairs_per_second": round((state.pairs - self.pairs) / seconds, 1),
            "wait_share": round((state.waited - self.waited) / seconds, 4),
        }
        self._begin(state)
        return {"loss": round(sum(means.values()), 5), **losses}, rates


def out_of_patience(state: TrainState, config: LoopConfig) -> bool:
    """Whether the last `config.patience` validations were all worse than the best one; never with patience 0."""
    return 0 < config.patience <= state.stale


def refuse_divergence(step: int, config: LoopConfig, names: Sequence[str], sums: Tensor, model: nn.Module) -> None:
    """TrainingError if one of the `sums` of `Meter.sums`, or a weight of the model, is not finite. Waits for the device."""
    weights = torch.nn.utils.get_total_norm(p.detach() for p in model.parameters())
    finite = torch.cat([sums, weights[None]]).isfinite().tolist()
    wrong = [name for name, fine in zip([*names, "the gradient", "a weight"], finite, strict=True) if not fine]
    if wrong:
        raise TrainingError(
            f"training diverged: {wrong[0]} is not finite at step {step}; start again with --overwrite and a lower "
            f"--lr (now {config.lr:g}) or --precision float32, if `qf verify` finds the features sound"
        )
