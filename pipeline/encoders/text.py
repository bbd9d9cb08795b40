"""Text models of encoders with a joint space. Their embeddings are compared with `pooled`, for zero-shot scores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import EncoderError
from .identity import check_weights, encoder_folder, model_type
from .tokenizer import load_tokenizer, unknown_words
from .transformers import load_model


class TextModelKind(NamedTuple):
    """How transformers names a kind of text model, and how its processor feeds it."""

    model: str
    joint: str  # the output with the joint embedding
    masked: bool  # pad texts to the longest one and mask the padding; otherwise pad to the full length, as SigLIP does


TEXT_MODELS = {  # by model_type in config.json; a folder with a vision model alone has no text model
    "clip": TextModelKind("CLIPTextModelWithProjection", "text_embeds", masked=True),
    "metaclip_2": TextModelKind("MetaClip2TextModelWithProjection", "text_embeds", masked=True),
    "siglip": TextModelKind("SiglipTextModel", "pooler_output", masked=False),
}


def has_text_model(identity: dict[str, Any]) -> bool:
    """Whether texts can be compared with the encoder's `pooled`. `identity` is the encoder's, from a features manifest."""
    if identity["joint"] is None:
        return False
    folder = encoder_folder(identity["id"])
    return not (folder / "model.onnx").is_file() and model_type(folder) in TEXT_MODELS


class TextModel:
    """Texts to unit vectors beside `pooled`."""

    def __init__(self, identity: dict[str, Any], device: torch.device) -> None:
        """`identity` is the encoder's, from a features manifest. EncoderError if the weights are other ones, or have no text model."""
        name = identity["id"]
        if not has_text_model(identity):
            raise EncoderError(f"encoder {name} has no text model; train a model first: qf train")
        folder = encoder_folder(name)
        check_weights(identity, folder)
        self.kind, self.device, self.width = TEXT_MODELS[model_type(folder)], device, identity["joint"]
        model, missing = load_model(self.kind.model, folder)
        if missing:
            raise EncoderError(f"encoder {name} lacks {len(missing)} weights of its text model, such as {min(missing)}")
        self.model = model.to(device)
        self.tokenizer = load_tokenizer(name, folder, model.config.vocab_size)

    @property
    def limit(self) -> int:
        """The largest number of tokens that the model reads from a text."""
        limit: int = self.model.config.max_position_embeddings
        return limit

    def truncates(self, text: str) -> bool:
        """Whether the text has more tokens than the model reads."""
        found = self.tokenizer(text, truncation=True, max_length=self.limit + 1)["input_ids"]
        return len(found) > self.limit

    def unknown(self, text: str) -> tuple[list[str], bool]:
        """The words of a text that are not in the vocabulary, and whether nothing of it is."""
        return unknown_words(self._ids, self.tokenizer.unk_token_id, text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """(M,) texts -> (M, P) float32, L2-normalised. Texts beyond the model's limit are truncated."""
        padding = "longest" if self.kind.masked else "max_length"
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=padding,
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
            ).to(self.device)
            mask = batch["attention_mask"] if self.kind.masked else None
            out = getattr(self.model(input_ids=batch["input_ids"], attention_mask=mask), self.kind.joint)
            parts.append(torch.nn.functional.normalize(out, dim=-1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)
