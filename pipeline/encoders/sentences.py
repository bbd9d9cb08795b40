"""Sentence encoders: models of text alone, whose embeddings can teach where the image encoder has no text model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EncoderError
from .identity import MODEL_FILES, encoder_folder, model_type, weights_sha256
from .tokenizer import load_tokenizer
from .transformers import load_model

POOLING = "1_Pooling/config.json"  # of sentence-transformers; without it, the mean over the tokens


class SentenceModelKind(NamedTuple):
    """How transformers names a kind of sentence encoder, and the positions that it cannot use."""

    model: str
    reserved: int = 0


SENTENCE_MODELS = {  # by model_type in config.json
    "bert": SentenceModelKind("BertModel"),
    "distilbert": SentenceModelKind("DistilBertModel"),
    "mpnet": SentenceModelKind("MPNetModel", 2),
    "roberta": SentenceModelKind("RobertaModel", 2),
    "xlm-roberta": SentenceModelKind("XLMRobertaModel", 2),
}


class SentenceModel:
    """A sentence encoder, such as sentence-transformers/all-MiniLM-L6-v2: texts to unit vectors."""

    def __init__(self, name: str, device: torch.device) -> None:
        """`name` is a folder or a Hugging Face id. EncoderError if it holds no sentence encoder."""
        folder = encoder_folder(name, (*MODEL_FILES, POOLING))
        kind = SENTENCE_MODELS.get(model_type(folder))
        if kind is None:
            raise EncoderError(
                f"{name} is of type {model_type(folder)!r}; a sentence encoder is one of {', '.join(SENTENCE_MODELS)}, such as "
                "sentence-transformers/all-MiniLM-L6-v2"
            )
        self.name, self.device, self.sha256 = name, device, weights_sha256(folder)
        model, missing = load_model(kind.model, folder)
        lacking = {weight for weight in missing if not weight.startswith("pooler.")}  # this part is not used
        if lacking:
            raise EncoderError(f"sentence encoder {name} lacks {len(lacking)} weights, such as {min(lacking)}")
        self.model = model.to(device)
        self.tokenizer = load_tokenizer(name, folder, model.config.vocab_size)
        self.limit: int = model.config.max_position_embeddings - kind.reserved  # tokens that it reads
        self.width: int = model.config.hidden_size
        self.first_token = _takes_first_token(folder)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """(M,) texts -> (M, P) float32, L2-normalised. Texts beyond the model's limit are truncated."""
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding="longest",
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
            ).to(self.device)
            mask = batch["attention_mask"]
            hidden: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            # a unit vector needs no division by the count
            pooled = hidden[:, 0] if self.first_token else (hidden * mask[..., None]).sum(1)
            parts.append(F.normalize(pooled, dim=-1).cpu().numpy())
        return np.concatenate(parts)


def _takes_first_token(folder: Path) -> bool:
    """Whether the embedding is the first token's state, as in BGE; otherwise it is the mean over the tokens.

    EncoderError if it is something else."""
    try:
        config: Any = json.loads((folder / POOLING).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{folder / POOLING} is not JSON; copy it again from the model's page") from error
    modes = {name for name, used in config.items() if name.startswith("pooling_mode_") and used}
    if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise EncoderError(
            f"{folder} pools its tokens by {', '.join(sorted(modes))}; qf takes the mean or the first token"
        )
    return modes == {"pooling_mode_cls_token"}
