"""Weights by name: the tables between our names and those of LAVIS, Hugging Face and BERT, and how weights fill a model.

A part that a layout has no place for starts afresh and is named; any other key that is missing, left over or of another
shape is an error that names it."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...pipeline.errors import ArtifactError, first_line
from ..qformer import QFormer

log = logging.getLogger(__name__)

# (theirs, ours): a key is renamed by the first prefix that it starts with, then by ATTENTION where they say `self`
LAVIS = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.encoder.", "qformer.encoder."),
    ("Qformer.cls.", "cls."),
    ("ln_vision.", "post_layernorm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
)
HUGGINGFACE = (("vision_model.post_layernorm.", "post_layernorm."),)
BERT = (
    ("bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("bert.embeddings.", "embeddings."),
    ("bert.encoder.", "qformer.encoder."),
)
ATTENTION = re.compile(r"(\.(?:cross)?attention)\.self\.")
OWN_ATTENTION = re.compile(r"(\.(?:cross)?attention)\.attention\.")

PARTS = {  # by our names
    "query tokens": re.compile(r"query_tokens$"),
    "LayerNorm over the features": re.compile(r"post_layernorm\."),
    "cross-attention": re.compile(r"qformer\..*\.crossattention\."),
    "text embeddings": re.compile(r"embeddings\."),
    "text feed-forward": re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\."),
    "image projection": re.compile(r"vision_projection\."),
    "text projection": re.compile(r"text_projection\."),
    "matching head": re.compile(r"itm_head\."),
    "language head": re.compile(r"cls\."),
    "temperature": re.compile(r"temp$"),
}
HEADS = ("image projection", "text projection", "matching head", "language head", "temperature")
BY_WORD = ("embeddings.word_embeddings.weight", "cls.predictions.bias")  # have a row for each word


@dataclass(frozen=True)
class KeyNames:
    """How a kind of source names the weights of a Q-Former."""

    names: tuple[tuple[str, str], ...] = ()
    says_self: bool = False
    foreign: re.Pattern[str] = re.compile(r"(?!)")  # keys of other models, of buffers, and of tied weights
    may_lack: tuple[str, ...] = ()  # PARTS

    def ours(self, key: str) -> str:
        """Our name of their `key`."""
        key = _renamed(key, self.names)
        return ATTENTION.sub(r"\1.attention.", key) if self.says_self else key

    def theirs(self, key: str) -> str:
        """Their name of our `key`."""
        key = _renamed(key, [(ours, theirs) for theirs, ours in self.names])
        return OWN_ATTENTION.sub(r"\1.self.", key) if self.says_self else key


RUN_NAMES = KeyNames()
LAVIS_NAMES = KeyNames(LAVIS, True, re.compile(r"^visual_encoder\.|position_ids$|cls\.predictions\.decoder\."))
HUGGINGFACE_NAMES = KeyNames(
    HUGGINGFACE,
    foreign=re.compile(r"^vision_model\.(?!post_layernorm\.)|^language_model\.|^language_projection\.|position_ids$"),
    may_lack=("text embeddings", "text feed-forward", *HEADS),
)
BERT_NAMES = KeyNames(
    BERT,
    True,
    re.compile(r"pooler\.|token_type_embeddings|^cls\.seq_relationship|^cls\.predictions\.decoder|position_ids$"),
    ("query tokens", "LayerNorm over the features", "cross-attention", *HEADS),
)
STAGE1_HEADS = "stage1_heads.safetensors"  # what `qf export` writes beside the parts that Hugging Face's class has
QFORMER_SIZES = (  # that transformers' Blip2QFormerConfig calls as QFormerConfig does
    "vocab_size", "encoder_hidden_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "cross_attention_frequency", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip


def _renamed(key: str, prefixes: Iterable[tuple[str, str]]) -> str:
    old, new = next(((a, b) for a, b in prefixes if key.startswith(a)), ("", ""))
    return new + key.removeprefix(old)


@dataclass(frozen=True)
class Weights:
    """What a source holds."""

    name: str  # for messages
    layout: KeyNames
    sizes: dict[str, Any]  # of QFormerConfig, those that the source tells
    state: dict[str, Tensor]  # under our names, float32
    unexpected: list[str] = field(default_factory=list)  # their keys that are no name of the layout
    tokenizer: str | None = None  # the text of a tokenizer.json, where the source brings one for its text embeddings

    @property
    def words(self) -> int | None:
        """For how many ids there are text embeddings, if there are any."""
        return len(self.state[BY_WORD[0]]) if BY_WORD[0] in self.state else None


def load_tensors(path: Path, foreign: re.Pattern[str] = RUN_NAMES.foreign) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, but for the foreign ones; or all from .pth, without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if not foreign.search(key)}  # noqa: SIM118
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except Exception as error:  # of what is no checkpoint torch.load says so in many ways
        raise ArtifactError(f"{path} cannot be read as weights: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"{path} cannot be read as weights: it holds a {type(state).__name__}")
    return state


def fill(model: QFormer, weights: Weights) -> None:
    """Every key of `weights` into `model`. Parts that the layout has no place for, and words that the model has besides,
    keep their fresh start and are named in a line of the log, which goes to stderr.

    ArtifactError names every key that is missing, unexpected or of another shape, as the source calls it."""
    own, state, theirs = model.state_dict(), weights.state, weights.layout.theirs
    absent = {key for key in own if key not in state}
    fresh = [part for part in weights.layout.may_lack if absent >= {key for key in own if PARTS[part].match(key)}]
    missing = [key for key in own if key in absent and not any(PARTS[part].match(key) for part in fresh)]
    if weights.layout is BERT_NAMES:  # the queries' feed-forward is missing with the text's
        missing = [re.sub(r"_query\.", ".", key) for key in missing]
    problems = [f"missing {theirs(key)}" for key in dict.fromkeys(missing)]
    problems += [f"unexpected {key}" for key in weights.unexpected]
    problems += [f"unexpected {theirs(key)}" for key in state if key not in own]
    if problems:  # sizes may be wrong for the same reason
        raise ArtifactError(f"{weights.name} does not fit the model: {'; '.join(problems)}")
    shorter = [key for key, value in state.items() if own[key].shape != value.shape]
    for key in shorter:
        there, wanted = tuple(state[key].shape), tuple(own[key].shape)
        if key not in BY_WORD or there[1:] != wanted[1:] or there[0] > wanted[0]:
            problems.append(f"{theirs(key)} is {there}, not {wanted}")
    if problems:
        raise ArtifactError(f"{weights.name} does not fit the model: {'; '.join(problems)}")
    for key, value in state.items():
        (own[key][: len(value)] if key in shorter else own[key]).copy_(value)
    if shorter:
        fresh.append("word for [DEC]")
    if fresh:
        log.warning("%s has no %s: these start afresh", weights.name, ", ".join(fresh))
