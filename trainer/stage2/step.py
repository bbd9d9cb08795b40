"""The loss of a batch of stage 2: pictures through the Q-Former and the projection, texts through the frozen language model."""

import numpy as np
import torch
from torch import Tensor, nn

from ...pipeline.device import autocast
from ...pipeline.features.codecs import decode
from ..attention import drop_tokens
from .batches import Instructions, Stage2Batch
from .language_model import LanguageModel
from .model import VisualPrompt

LOSS = "loss_lm"


def soft_prompts(
    model: VisualPrompt,
    image_embeds: Tensor,
    image_rows: Tensor,
    instructions: Instructions | None,
    dtype: torch.dtype,
    queries_known: bool = False,
) -> Tensor:
    """Frozen tokens (n, T, W) -> soft prompts (N, Q, H), float32: text m sees image `image_rows[m]`.

    With `queries_known`, `image_embeds` is the query output (n, Q, D) already."""
    if queries_known:
        return model.project(image_embeds)[image_rows]
    with autocast(image_embeds.device, dtype):
        if instructions is not None:
            output = model.read(image_embeds, image_rows, instructions.input_ids, instructions.attention_mask)
            return model.project(output)
        return model.project(model.queries(image_embeds))[image_rows]


class Stage2Step(nn.Module):
    """The forward pass of a batch. DistributedDataParallel wraps it where there are several processes.

    The language model is no submodule: its weights are nobody's parameters here."""

    def __init__(
        self,
        model: VisualPrompt,
        language_model: LanguageModel,
        dtype: torch.dtype,
        token_dropout: float,
        seed: int,
        rank: int,
        queries_known: bool,
    ) -> None:
        super().__init__()
        self.model, self.frozen = model, (language_model,)
        self.dtype, self.token_dropout, self.seed, self.rank = dtype, token_dropout, seed, rank
        self.queries_known = queries_known

    def forward(self, batch: Stage2Batch, number: int) -> Tensor:
        """This process's share of the mean cross-entropy of all tokens to learn, a scalar."""
        seeds = np.random.SeedSequence([self.seed, 2, number, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        embeds = decode(batch.encoded)
        if not self.queries_known:
            embeds = drop_tokens(embeds, self.token_dropout)
        prompts = soft_prompts(self.model, embeds, batch.image_rows, batch.instructions, self.dtype, self.queries_known)
        return self.frozen[0].losses(prompts, batch.text).sum() / batch.text.count
