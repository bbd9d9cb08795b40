"""Captions by stage 1 alone: its generation head writes them, token by token, with keys and values kept.

Letters as in qformer.py; N captions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...pipeline.device import autocast
from ..decoding import Decoding, OnText, generate_texts
from ..qformer import KeyValue, QueryOutput
from .embedder import Embedder

GROUP = 64  # pictures captioned at once


class Captioner:
    """A model of stage 1 that was trained with generation (ITG)."""

    prompt = ""  # it reads none

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @torch.inference_mode()
    def texts(
        self, image_embeds: Tensor, questions: Sequence[str], how: Decoding, on_text: OnText | None = None
    ) -> list[str]:
        """A caption for each of N pictures (N, T, W). `questions` are not read: this head answers none."""
        model, tokens = self.embedder.model.eval(), self.embedder.tokens

        def text_of(ids: list[int]) -> str:
            text: str = tokens.tokenizer.decode(ids, skip_special_tokens=True)
            return text.strip()

        ends = frozenset((tokens.sep_token_id,))
        texts: list[str] = []
        with autocast(self.embedder.device, self.embedder.dtype):
            for start in range(0, len(image_embeds), GROUP):
                image = model.read_image(image_embeds[start : start + GROUP].to(self.embedder.device))
                texts += generate_texts(_Head(self.embedder, image), ends, how, text_of, on_text)
        return texts


class _Head:
    """A `Decoder` over the generation head: a caption attends to the queries and to its earlier tokens."""

    def __init__(self, embedder: Embedder, image: QueryOutput) -> None:
        self.model, self.position = embedder.model, 0
        self.past: list[KeyValue] = image.queries
        self.first = torch.full((len(image.output),), self.model.config.bos_token_id, device=image.output.device)

    def start(self) -> Tensor:
        return self._forward(self.first)

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        self.past = [(key[rows], value[rows]) for key, value in self.past]
        return self._forward(tokens)

    def _forward(self, tokens: Tensor) -> Tensor:
        states, own = self.model.next_states(tokens, self.position, self.past)
        self.past = [
            (torch.cat([key, k], 2), torch.cat([value, v], 2))
            for (key, value), (k, v) in zip(self.past, own, strict=True)
        ]
        self.position += 1
        return self.model.language_logits(states).float()
