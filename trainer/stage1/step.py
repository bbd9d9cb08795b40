"""The gradients of a stage-1 step, whatever the batch is split over: parts that fit in memory, or processes.

The contrast needs the features of the whole batch at once, and nothing else of it. So its gradient is taken where the
features are, and handed to the networks part by part (gradient caching: Gao et al. 2021, arXiv:2101.06983; here also over
processes, instead of collectives that autograd sees). A pair to match goes where its image is, wherever its text comes
from. Everything random is a function of the seed, the step, the process and the part.

Letters as in objectives.py; n images and k texts of a part."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...pipeline.device import autocast
from ...pipeline.features.codecs import decode
from ..distributed.processes import ALONE, Processes
from ..loader.batches import Batch, Part
from ..objectives import (
    LOSSES,
    hard_negatives,
    itc_loss,
    itg_loss,
    itm_loss,
    itm_pairs,
    positives,
    similarities,
)
from ..qformer import ImageEncoding, QFormer


@dataclass(frozen=True)
class StepPlan:
    """Where training is. `number` counts batches."""

    number: int
    losses: Sequence[str] = LOSSES
    hardness: float = 1.0


@dataclass(frozen=True)
class Contrast:
    """What the whole batch tells its parts: gradients of loss_itc, and the pairs to match."""

    loss: Tensor
    images: Tensor  # (B, Q, E) gradient
    texts: Tensor  # (M, E) gradient
    temp: Tensor  # () gradient
    pairs: tuple[Tensor, Tensor, Tensor] | None  # see itm_pairs


class Stage1(nn.Module):
    """Parts of a batch to what is to be differentiated. Wrapped by DistributedDataParallel where there are several processes."""

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

    def encode(self, batch: Batch, number: int, moment: StepPlan) -> tuple[ImageEncoding, Tensor]:
        """The images of part `number`, and unit features (k, E) of its texts. The same whenever it is called."""
        part = batch.parts[number]
        torch.manual_seed(self._seed(0, moment.number, self.processes.rank, number))
        encoded = {name: column[part.encoded] for name, column in batch.encoded.items()}
        image = self.model.encode_image(drop_tokens(decode(encoded), self.token_dropout))
        texts = batch.input_ids[part.texts], batch.attention_mask[part.texts]
        return image, self.model.encode_text(*texts, first_only=True).features

    def features(self, batch: Batch, number: int, moment: StepPlan) -> tuple[Tensor, Tensor]:
        """(n, Q, E) and (k, E) of part `number`."""
        image, texts = self.encode(batch, number, moment)
        return image.features, texts

    @torch.no_grad()
    def contrast(self, batch: Batch, image_features: Tensor, texts: Tensor, moment: StepPlan) -> Contrast:
        """From the features of all parts of this process, (·, Q, E) and (·, E); in float32, or maxima would tie."""
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
            loss = itc_loss(similarity, positive)
            gradients = torch.autograd.grad(loss, leaves)
        pairs = None
        if "loss_itm" in moment.losses:
            generator = torch.Generator(texts.device).manual_seed(self._seed(1, moment.number))
            negatives = hard_negatives(
                similarity.detach(), positive, batch.image_rows, batch.matched, moment.hardness, generator
            )
            drawn = self.processes.from_first(torch.stack(negatives))
            pairs = itm_pairs(positive, batch.image_rows, batch.matched, (drawn[0], drawn[1]))
        return Contrast(loss.detach(), gradients[0], gradients[1], gradients[2], pairs)

    def forward(
        self, batch: Batch, number: int, moment: StepPlan, contrast: Contrast | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Part `number` to a scalar whose gradient is the part's share of the batch's, and its share of each loss.

        `contrast` is found here where the part is all that there is of the process."""
        part, processes = batch.parts[number], self.processes
        image, texts = self.encode(batch, number, moment)
        if contrast is None:
            contrast = self.contrast(batch, image.features, texts, moment)
        shares = {}
        if "loss_itm" in moment.losses:
            shares["loss_itm"] = self._matching(batch, part, image, contrast)
        if "loss_itg" in moment.losses:
            shares["loss_itg"] = self._generation(batch, part, image)
        total = torch.stack([*shares.values()]).sum() if shares else torch.zeros((), device=texts.device)
        equal = 1 / (processes.count * len(batch.parts))  # this part's share of what all of them know
        if "loss_itc" in moment.losses:
            total = total + (image.features * contrast.images[part.images]).sum()
            total = total + (texts * contrast.texts[part.texts]).sum() + self.model.temp * contrast.temp * equal
            shares = {"loss_itc": contrast.loss * equal, **shares}
        return total * processes.count, {name: share.detach() for name, share in shares.items()}

    def _matching(self, batch: Batch, part: Part, image: ImageEncoding, contrast: Contrast) -> Tensor:
        assert contrast.pairs is not None
        images, texts, matches = contrast.pairs
        total = len(images)
        if self.processes.count * len(batch.parts) > 1:  # pairs go where their images are; asking waits for the device
            here = ((images >= part.images.start) & (images < part.images.stop)).nonzero().squeeze(1)
            images, texts, matches = images[here] - part.images.start, texts[here], matches[here]
        loss = itm_loss(self.model, image, images, batch.input_ids[texts], batch.attention_mask[texts], matches)
        return loss * (len(images) / total)

    def _generation(self, batch: Batch, part: Part, image: ImageEncoding) -> Tensor:
        texts = batch.matched[part.matched]
        rows = batch.image_rows[texts] - part.images.start
        loss = itg_loss(self.model, image, rows, batch.input_ids[texts], batch.attention_mask[texts])
        here, everywhere = (batch.attention_mask[some, 1:].sum() for some in (texts, batch.matched))
        return loss * (here / everywhere)

    def _seed(self, *numbers: int) -> int:
        return int(np.random.SeedSequence([self.seed, 2, *numbers]).generate_state(1, np.uint64)[0])


def drop_tokens(image_embeds: Tensor, share: float) -> Tensor:
    """(B, T, W) -> (B, the rest of T, W): a random share of the tokens left out, the same for the whole batch.

    Masking patches as FLIP does (Li et al. 2023, arXiv:2212.00794), here against overfitting of small datasets."""
    if share == 0:
        return image_embeds
    count = image_embeds.shape[1]
    kept = torch.randperm(count, device=image_embeds.device)[: max(1, round(count * (1 - share)))]
    return image_embeds[:, kept]


def backward(
    stage: nn.Module, batch: Batch, moment: StepPlan, weight: float = 1.0, last: bool = True
) -> dict[str, Tensor]:
    """Add `weight` times the gradients of the batch's losses to the parameters; returns this process's share of each loss.

    `stage` is a Stage1, wrapped or not. Only with `last` are the gradients exchanged between processes."""
    plain = stage.module if isinstance(stage, DistributedDataParallel) else stage
    assert isinstance(plain, Stage1)
    device = batch.input_ids.device
    contrast = None
    if len(batch.parts) > 1:
        with torch.no_grad(), autocast(device, plain.dtype):
            features = [plain.features(batch, number, moment) for number in range(len(batch.parts))]
            images, texts = (torch.cat(parts) for parts in zip(*features, strict=True))
            contrast = plain.contrast(batch, images, texts, moment)
    shares = []
    for number in range(len(batch.parts)):
        exchange = last and number == len(batch.parts) - 1
        with nullcontext() if exchange or stage is plain else stage.no_sync():  # type: ignore[operator]
            with autocast(device, plain.dtype):
                total, losses = stage(batch, number, moment, contrast)
            (total * weight).backward()
        shares.append(losses)
    return {name: torch.stack([losses[name] for losses in shares]).sum() for name in shares[0]}
