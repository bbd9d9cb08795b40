"""What stage 2 trains: the query side of a Q-Former, and the linear projection of its output to a language model's width.

Both are float32; the language model casts the result once. Letters as in qformer.py; H the width of the language model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QFormerConfig
from ..manifest import WEIGHTS
from ..qformer import QFormer
from ..runs.checkpoints import load_model

TEXT_HEADS = ("vision_projection", "text_projection", "itm_head", "cls", "temp")
TEXT_INPUT = ("embeddings",)
TEXT_FEED_FORWARD = ("intermediate", "output")


def query_side(qformer: QFormer, reads_text: bool) -> QFormer:
    """The Q-Former without the parts that stage 2 does not use, in place: its heads and, unless it reads questions, its text side."""
    for name in (*TEXT_HEADS, *(() if reads_text else TEXT_INPUT)):
        delattr(qformer, name)
    if not reads_text:
        for layer in qformer.qformer.encoder.layers():
            for name in TEXT_FEED_FORWARD:
                delattr(layer, name)
    return qformer


class VisualPrompt(nn.Module):
    """Frozen tokens of a picture to a soft prompt of a language model (Li et al. 2023, section 3.3)."""

    def __init__(self, config: QFormerConfig, width: int, reads_text: bool) -> None:
        """`width` is the language model's; with `reads_text` the queries read a question, too (Dai et al. 2023, InstructBLIP)."""
        super().__init__()
        self.config, self.width, self.reads_text = config, width, reads_text
        self.qformer = query_side(QFormer(config), reads_text)
        self.language_projection = nn.Linear(config.hidden_size, width)

    def freeze_qformer(self) -> None:
        """Train the projection alone."""
        self.qformer.requires_grad_(False)

    @property
    def qformer_is_frozen(self) -> bool:
        return not self.qformer.query_tokens.requires_grad

    def train(self, mode: bool = True) -> "VisualPrompt":
        """As of nn.Module; a frozen Q-Former has no dropout."""
        super().train(mode)
        if self.qformer_is_frozen:
            self.qformer.eval()
        return self

    def queries(self, image_embeds: Tensor) -> Tensor:
        """Frozen tokens (B, T, W) -> query output (B, Q, D), for a Q-Former that reads no text."""
        return self.qformer.read_image(image_embeds).output

    def read(self, image_embeds: Tensor, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Frozen tokens (B, T, W) -> query output (N, Q, D) of the pairs (image `image_rows[n]`, question n)."""
        return self.qformer.read_pairs(self.qformer.read_image(image_embeds), image_rows, input_ids, attention_mask)

    def project(self, output: Tensor) -> Tensor:
        """Query output (·, Q, D) -> the soft prompt (·, Q, H), float32."""
        with torch.autocast(output.device.type, enabled=False):
            prompt: Tensor = self.language_projection(output.float())
        return prompt

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)


def open_soft_prompt(folder: Path, manifest: dict[str, Any]) -> VisualPrompt:
    """The model of a finished run with that manifest, in evaluation mode. ArtifactError if its weights are not those of such a model."""
    width, reads_text = manifest["language_model"]["width"], bool(manifest["train"]["instruct"])
    model = VisualPrompt(QFormerConfig(**manifest["model"]), width, reads_text)
    load_model(folder / WEIGHTS, model)
    return model.eval()
