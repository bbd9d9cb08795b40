"""How fast a machine trains: a few steps of stage 1, measured with a model that is thrown away."""

import time
from contextlib import closing
from dataclasses import dataclass

import torch

from ...pipeline.device import resolve_precision
from ...pipeline.features.reader import Features
from ..config import Stage1Config
from ..distributed.processes import ALONE
from ..loop import make_optimizer
from .embedder import Embedder
from .stage import Stage1, make_batches, make_model

ENOUGH = 2.0  # seconds of one kind of step; it takes a step at least
MOST = 20  # steps of one kind


@dataclass(frozen=True)
class Pace:
    """Seconds of a training step, with its optimiser, by what it trains."""

    itc: float  # ITC alone
    full: float  # all losses of the run

    def step(self, contrast_first: float) -> float:
        """The mean seconds of a step, if that share of the steps trains ITC alone."""
        return contrast_first * self.itc + (1 - contrast_first) * self.full


def measure_pace(features: Features, config: Stage1Config, device: torch.device) -> Pace:
    """The pace of a training on these features, one batch a step and on this process alone. Errors as of `stage.train`.

    It takes up to 2 seconds and a step of warm-up for each kind, or two steps where one takes longer."""
    torch.manual_seed(config.seed)
    model, tokens = make_model(features, config)
    batches = make_batches(features, config, tokens, device, ALONE, None)
    dtype = resolve_precision(config.precision, device)
    embedder = Embedder(model.to(device), tokens, device, dtype, config.max_text_length)
    stage = Stage1(features, config, embedder, batches, ALONE)
    optimizer = make_optimizer(stage.model, config)
    return Pace(itc=seconds_a_step(stage, optimizer, 0), full=seconds_a_step(stage, optimizer, stage.total - 1))


def seconds_a_step(stage: Stage1, optimizer: torch.optim.Optimizer, number: int) -> float:
    """The mean seconds of steps that train what step `number` of the run trains. It changes the model."""
    device = stage.embedder.device
    with closing(stage.batches(number, number + 1 + MOST)) as feed:
        for done, batch in enumerate(feed):
            if done == 1:  # the first step is a warm-up
                began = time.perf_counter()
            stage.model.train()
            stage.step(batch, number, 1.0, last=True)
            torch.nn.utils.clip_grad_norm_(stage.model.parameters(), stage.config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if done and (time.perf_counter() - began > ENOUGH or done == MOST):
                break
    return (time.perf_counter() - began) / done
