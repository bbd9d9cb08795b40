"""The encoder's own text model for queries, in NumPy: `qf index` describes it in the index, a search computes with it.

transformers resolves the model's configuration and its tokenizer when the index is built. The description keeps both, so that a
search needs no transformers, and reads its text exactly as the indexed captions were read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Raw, Struct, json

from ...pipeline.errors import ArtifactError
from ...pipeline.mapped_tensors import MappedTensors
from .towers import ACTIVATIONS, EncoderText

if TYPE_CHECKING:
    from ...pipeline.encoders.text import TextModel

PROBE, SAME = "two dogs on a beach", 1e-4  # a text, and how far PyTorch's embedding of it may be from NumPy's
CAUSAL = {"CLIPTextModelWithProjection": True, "SiglipTextModel": False}  # the models that are described


class Description(Struct):
    """A text model, apart from its weights."""

    causal: bool
    layers: int
    heads: int
    activation: str
    eps: float
    eos_token_id: int
    limit: int  # tokens that it reads
    unk_token_id: int | None
    tokenizer: Raw  # a tokenizer.json, with truncation to the limit, and padding where the model sees it


def describe(model: "TextModel", weights: Sequence[Path]) -> bytes | None:
    """The description of a text model as JSON; None if NumPy cannot compute the same. `weights` are its .safetensors files.

    That is so for other blocks than those of CLIP and SigLIP, and for a tokenizer that is not of the library `tokenizers`."""
    from tokenizers import Tokenizer

    config, reader = model.model.config, model.tokenizer
    backend = getattr(reader, "backend_tokenizer", None)
    if model.kind.model not in CAUSAL or config.hidden_act not in ACTIVATIONS or not isinstance(backend, Tokenizer):
        return None
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.limit, direction=reader.truncation_side)
    if not model.kind.masked:
        tokenizer.enable_padding(
            direction=reader.padding_side, pad_id=reader.pad_token_id, pad_token=reader.pad_token, length=model.limit
        )
    described = json.encode(
        Description(
            CAUSAL[model.kind.model],
            config.num_hidden_layers,
            config.num_attention_heads,
            config.hidden_act,
            config.layer_norm_eps,
            config.eos_token_id,
            model.limit,
            reader.unk_token_id,
            Raw(tokenizer.to_str().encode()),
        )
    )
    try:
        found = DescribedText(described, weights).encode([PROBE])
    except KeyError:  # a tensor has another name or shape
        return None
    return described if np.abs(found - model.encode([PROBE])).max() < SAME else None


class DescribedText:
    """A text model that was described, with the face of `TextModel`."""

    def __init__(self, description: bytes, weights: Sequence[Path]) -> None:
        """`weights` are the .safetensors files of the model. KeyError if they do not hold it; ArtifactError if a file is
        damaged, or the description."""
        from tokenizers import Tokenizer

        try:
            about = json.decode(description, type=Description)
            self._tokenizer: Any = Tokenizer.from_str(bytes(about.tokenizer).decode())
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ArtifactError(
                "the index does not describe the encoder's text model; rebuild it with `qf index`"
            ) from error
        self._about, self.limit = about, about.limit
        self.tower = EncoderText(
            MappedTensors(weights),
            about.causal,
            about.layers,
            about.heads,
            about.activation,
            about.eps,
            about.eos_token_id,
        )

    def truncates(self, text: str) -> bool:
        """Whether the text has more tokens than the model reads."""
        return bool(self._tokenizer.encode(text).overflowing)

    def unknown(self, text: str) -> tuple[list[str], bool]:
        """The words of a text that are not in the vocabulary, and whether nothing of it is."""
        from ...pipeline.encoders.tokenizer import unknown_words

        return unknown_words(self._ids, self._about.unk_token_id, text)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text that is not truncated, without special tokens and padding."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        parts = (encoding, *encoding.overflowing)
        return [number for part in parts for number, read in zip(part.ids, part.attention_mask, strict=True) if read]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(M,) texts -> (M, P) float32, L2-normalised. Texts beyond the model's limit are truncated."""
        return np.stack([self.tower.embed(np.array(self._tokenizer.encode(text).ids)) for text in texts])
