"""The gradients of one batch of stage 1, split over micro-batches that fit in memory and over processes.

ITC compares the features of all images and texts of a batch. Its gradient is therefore computed on the features of the whole
batch first, and then handed to the network micro-batch by micro-batch (gradient caching: Gao et al. 2021, arXiv:2101.06983).
Processes exchange features in the same way, and autograd needs to know nothing of them. A pair to match goes to the process
and micro-batch of its image. All random numbers are a function of the seed, the batch, the process and the micro-batch.

Letters as in objectives.py; n images and k texts of a micro-batch."""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...pipeline.device import autocast
from ...pipeline.features.codecs import decode
from ..attention import drop_tokens
from ..distributed.processes import ALONE, Processes
from ..loader.batches import Batch, MicroBatch
from ..objectives import (
    LOSS_TEACH,
    hard_negatives,
    itc_loss,
    itg_loss,
    itm_loss,
    itm_pairs,
    positives,
    similarities,
    teach_loss,
)
from ..qformer import ImageEncoding, QFormer
from .plan import StepPlan


@dataclass(frozen=True)
class BatchGradients:
    """The facts about the whole batch that its micro-batches use: the losses of its features, and the pairs to match."""

    losses: dict[str, Tensor]  # loss_itc and, where there is a teacher, loss_teach
    images: Tensor  # (B, Q, E) the gradient of both by the image features
    texts: Tensor  # (M, E) their gradient by the text features
    temp: Tensor  # () their gradient by the temperature
    pairs: tuple[Tensor, Tensor, Tensor] | None  # see `itm_pairs`; None without ITM


class Stage1Step(nn.Module):
    """The forward pass of a micro-batch. DistributedDataParallel wraps it where there are several processes."""

    def __init__(
        self,
        model: QFormer,
        processes: Processes = ALONE,
        dtype: torch.dtype = torch.float32,
        token_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.processes = model, processes
        self.dtype, self.token_dropout, self.seed = dtype, token_dropout, seed

    def encode(self, batch: Batch, n: int, plan: StepPlan) -> tuple[ImageEncoding, Tensor]:
        """The images of micro-batch `n`, and unit features (k, E) of its texts. The result is the same at every call."""
        micro = batch.micro_batches[n]
        torch.manual_seed(self._seed(0, plan.number, self.processes.rank, n))
        encoded = {name: column[micro.encoded] for name, column in batch.encoded.items()}
        image = self.model.encode_image(drop_tokens(decode(encoded), self.token_dropout))
        texts = batch.input_ids[micro.texts], batch.attention_mask[micro.texts]
        return image, self.model.encode_text(*texts, first_only=True).features

    def features(self, batch: Batch, n: int, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Image features (n, Q, E) and text features (k, E) of micro-batch `n`."""
        image, texts = self.encode(batch, n, plan)
        return image.features, texts

    @torch.no_grad()
    def batch_gradients(self, batch: Batch, image_features: Tensor, texts: Tensor, plan: StepPlan) -> BatchGradients:
        """From the features (·, Q, E) and (·, E) of all micro-batches of this process; in float32, or maxima would tie."""
        counts = [len(image_features)] * self.processes.count
        leaves = [
            self.processes.gather(image_features.detach(), counts),
            self.processes.gather(texts.detach(), batch.texts_of),
            self.model.temp.detach().clone(),
        ]
        image_id = torch.arange(len(leaves[0]), device=texts.device)
        positive = positives(image_id, batch.image_rows, batch.text_id)  # (B, M)
        with torch.enable_grad(), torch.autocast(texts.device.type, enabled=False):
            images, texts, temp = [leaf.requires_grad_() for leaf in leaves]
            similarity = similarities(images, texts) / temp  # (B, M)
            lesson = batch.lesson if plan.teach or plan.soft_targets else None
            losses = {"loss_itc": itc_loss(similarity, positive, lesson, plan.soft_targets)}
            total = losses["loss_itc"]
            if lesson is not None:
                losses[LOSS_TEACH] = teach_loss(images, texts, lesson)
                total = total + plan.teach * losses[LOSS_TEACH]
            gradients = torch.autograd.grad(total, leaves)
        pairs = None
        if "loss_itm" in plan.losses:
            generator = torch.Generator(texts.device).manual_seed(self._seed(1, plan.number))
            negatives = hard_negatives(
                similarity.detach(), positive, batch.image_rows, batch.matched, plan.hardness, generator
            )
            drawn = self.processes.from_first(torch.stack(negatives))
            pairs = itm_pairs(positive, batch.image_rows, batch.matched, (drawn[0], drawn[1]))
        known = {name: loss.detach() for name, loss in losses.items()}
        return BatchGradients(known, gradients[0], gradients[1], gradients[2], pairs)

    def forward(
        self, batch: Batch, n: int, plan: StepPlan, whole: BatchGradients | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar whose gradient is the share of micro-batch `n` in the batch's gradient, and its share of each loss.

        Without `whole`, the micro-batch must be the only one of this process: the batch's gradients are then computed here."""
        micro, processes = batch.micro_batches[n], self.processes
        image, texts = self.encode(batch, n, plan)
        if whole is None:
            whole = self.batch_gradients(batch, image.features, texts, plan)
        shares = {}
        if "loss_itm" in plan.losses:
            shares["loss_itm"] = self._matching(batch, micro, image, whole)
        if "loss_itg" in plan.losses:
            shares["loss_itg"] = self._generation(batch, micro, image)
        total = torch.stack([*shares.values()]).sum() if shares else torch.zeros((), device=texts.device)
        equal = 1 / (processes.count * len(batch.micro_batches))  # each micro-batch's share of what all of them know
        if "loss_itc" in plan.losses:
            total = total + (image.features * whole.images[micro.images]).sum()
            total = total + (texts * whole.texts[micro.texts]).sum() + self.model.temp * whole.temp * equal
            shares = {name: loss * equal for name, loss in whole.losses.items()} | shares
        return total * processes.count, {name: share.detach() for name, share in shares.items()}

    def _matching(self, batch: Batch, micro: MicroBatch, image: ImageEncoding, whole: BatchGradients) -> Tensor:
        """The share of loss_itm of the pairs whose image is in the micro-batch."""
        assert whole.pairs is not None
        images, texts, matches = whole.pairs
        total = len(images)
        if self.processes.count * len(batch.micro_batches) > 1:  # choosing pairs waits for the device
            here = ((images >= micro.images.start) & (images < micro.images.stop)).nonzero().squeeze(1)
            images, texts, matches = images[here] - micro.images.start, texts[here], matches[here]
        loss = itm_loss(self.model, image, images, batch.input_ids[texts], batch.attention_mask[texts], matches)
        return loss * (len(images) / total)

    def _generation(self, batch: Batch, micro: MicroBatch, image: ImageEncoding) -> Tensor:
        """The share of loss_itg of the micro-batch's matched texts, by their tokens."""
        texts = batch.matched[micro.matched]
        rows = batch.image_rows[texts] - micro.images.start
        loss = itg_loss(self.model, image, rows, batch.input_ids[texts], batch.attention_mask[texts])
        here, everywhere = (batch.attention_mask[some, 1:].sum() for some in (texts, batch.matched))
        return loss * (here / everywhere)

    def _seed(self, *numbers: int) -> int:
        return int(np.random.SeedSequence([self.seed, 2, *numbers]).generate_state(1, np.uint64)[0])


def backward(
    module: nn.Module, batch: Batch, plan: StepPlan, weight: float = 1.0, last: bool = True
) -> dict[str, Tensor]:
    """Add `weight` times the gradients of the batch's losses to the parameters. Returns this process's share of each loss.

    `module` is a Stage1Step, wrapped or not. Processes exchange their gradients only with `last`."""
    step = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(step, Stage1Step)
    device, count = batch.input_ids.device, len(batch.micro_batches)
    whole = None
    if count > 1:
        with torch.no_grad(), autocast(device, step.dtype):
            features = [step.features(batch, n, plan) for n in range(count)]
            images, texts = (torch.cat(some) for some in zip(*features, strict=True))
            whole = step.batch_gradients(batch, images, texts, plan)
    shares = []
    for n in range(count):
        exchange = last and n == count - 1
        with nullcontext() if exchange or module is step else module.no_sync():  # type: ignore[operator]
            with autocast(device, step.dtype):
                total, losses = module(batch, n, plan, whole)
            (total * weight).backward()
        shares.append(losses)
    return {name: torch.stack([losses[name] for losses in shares]).sum() for name in shares[0]}
