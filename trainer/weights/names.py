"""Weights by name: tables between our key names and those of LAVIS, Hugging Face and BERT. No file of weights/ knows the model."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ...pipeline.errors import ArtifactError
from ...pipeline.failures import out_of_memory
from ...pipeline.lfs import CURE, is_lfs_pointer
from ...pipeline.tensor_files import open_tensors

# (their prefix, our prefix): the first that a key starts with renames it; ATTENTION then renames `self` where they use it
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

PARTS = {  # parts of a Q-Former, by our key names
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
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
PICKLED = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how a .pth begins: a zip file, or a bare pickle
ROW_A_WORD = (WORD_EMBEDDINGS, "cls.predictions.bias")  # tensors with a row for each word of the vocabulary


@dataclass(frozen=True)
class KeyNames:
    """How one kind of source names the weights of a Q-Former."""

    names: tuple[tuple[str, str], ...] = ()  # (their prefix, our prefix)
    says_self: bool = False  # their attention blocks hold `self` where ours hold `attention`
    foreign: re.Pattern[str] = re.compile(r"(?!)")  # keys to skip: of other models, of buffers, of tied weights
    may_lack: tuple[str, ...] = ()  # names of PARTS that such a source may do without

    def ours(self, key: str) -> str:
        """Our name for their `key`."""
        key = _renamed(key, self.names)
        return ATTENTION.sub(r"\1.attention.", key) if self.says_self else key

    def theirs(self, key: str) -> str:
        """Their name for our `key`."""
        key = _renamed(key, [(ours, theirs) for theirs, ours in self.names])
        return OWN_ATTENTION.sub(r"\1.self.", key) if self.says_self else key


RUN_NAMES = KeyNames()
STAGE2_RUN_NAMES = KeyNames((("qformer.", ""),), may_lack=("text embeddings", "text feed-forward", *HEADS))
PROJECTION = "language_projection."  # to a language model, as Hugging Face and runs of stage 2 call it
# the projections to a language model and the model itself, which a BLIP-2 has from stage 2 on
STAGE_2 = re.compile(r"^(opt|t5|llm|language)_(proj|projection|model)\.")
LAVIS_NAMES = KeyNames(LAVIS, True, re.compile(r"^visual_encoder\.|position_ids$|cls\.predictions\.decoder\."))
HUGGINGFACE_NAMES = KeyNames(
    HUGGINGFACE,
    foreign=re.compile(r"^vision_model\.(?!post_layernorm\.)|^language_model\.|position_ids$"),
    may_lack=("text embeddings", "text feed-forward", *HEADS),
)
BERT_NAMES = KeyNames(
    BERT,
    True,
    re.compile(r"pooler\.|token_type_embeddings|^cls\.seq_relationship|^cls\.predictions\.decoder|position_ids$"),
    ("query tokens", "LayerNorm over the features", "cross-attention", *HEADS),
)
STAGE1_HEADS = "stage1_heads.safetensors"  # `qf export` writes the parts there that Hugging Face's class lacks
QFORMER_SIZES = (  # fields that QFormerConfig and transformers' Blip2QFormerConfig share
    "vocab_size", "encoder_hidden_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "cross_attention_frequency", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip


def _renamed(key: str, prefixes: Iterable[tuple[str, str]]) -> str:
    old, new = next(((a, b) for a, b in prefixes if key.startswith(a)), ("", ""))
    return new + key.removeprefix(old)


@dataclass(frozen=True)
class Weights:
    """The weights of a source, with the sizes and the tokenizer that it brings."""

    name: str  # of the source, for messages
    key_names: KeyNames
    sizes: dict[str, Any]  # the fields of QFormerConfig that the source holds
    state: dict[str, Tensor]  # float32, under our names
    unexpected: list[str] = field(default_factory=list)  # their keys that a Q-Former does not have
    tokenizer: str | None = None  # the text of a tokenizer.json, if the source has one for its text embeddings
    projection: dict[str, Tensor] = field(default_factory=dict)  # weight and bias of the projection to a language model

    @property
    def vocab_size(self) -> int | None:
        """The number of ids that have a text embedding, or None without text embeddings."""
        return len(self.state[WORD_EMBEDDINGS]) if WORD_EMBEDDINGS in self.state else None


def load_tensors(path: Path, foreign: re.Pattern[str] = RUN_NAMES.foreign) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name, without those whose name matches `foreign`; or all of a .pth file.

    A .pth is a pickle: nothing in it is executed. ArtifactError if the file does not exist or cannot be read."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    if is_lfs_pointer(path):
        raise ArtifactError(f"{path} {CURE}")
    try:
        if path.suffix == ".safetensors":
            with open_tensors(path) as file:
                return {key: file.get_tensor(key) for key in file.keys() if not foreign.search(key)}  # noqa: SIM118
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except ArtifactError as error:
        raise _unreadable(path, "the file is damaged or incomplete; copy it again") from error
    except Exception as error:  # torch.load raises errors of many kinds
        if out_of_memory(error):
            raise
        if isinstance(error, UnpicklingError) and path.read_bytes()[:2] in PICKLED:
            problem = "it holds pickled objects besides tensors, and qf executes no pickle; save its state_dict as .safetensors"
        else:
            problem = "it is no checkpoint of PyTorch, or damaged; give a LAVIS .pth, a .safetensors, or a folder"
        raise _unreadable(path, problem) from error
    if not isinstance(state, dict):
        raise _unreadable(path, f"it holds a {type(state).__name__}")
    return state


def _unreadable(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read as weights: {problem}")
