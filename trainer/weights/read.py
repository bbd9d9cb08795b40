"""Weights in: a run, LAVIS BLIP-2 stage-1 weights, a BLIP-2 of Hugging Face or a BERT, with the sizes and the tokenizer of each."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...pipeline.artifacts import has_manifest, read_manifest
from ...pipeline.encoders.identity import encoder_folder
from ...pipeline.errors import ArtifactError, EncoderError, first_line
from ..config import QFormerConfig
from ..manifest import RUN
from ..qformer import QFormer
from ..tokens import Tokens, read_tokenizer
from .names import (
    BERT_NAMES,
    BY_WORD,
    HUGGINGFACE_NAMES,
    LAVIS_NAMES,
    PARTS,
    QFORMER_SIZES,
    RUN_NAMES,
    STAGE1_HEADS,
    KeyNames,
    Weights,
    fill,
    load_tensors,
)


def load_qformer(path: object, **sizes: Any) -> QFormer:
    """A model with the weights that `path` names (see `read_weights`), in evaluation mode.

    `sizes` are fields of QFormerConfig that the source does not tell: of a LAVIS file `num_attention_heads` (64 wide each
    unless given), of a BERT `encoder_hidden_size`; `bos_token_id` is the last id unless it is known. ArtifactError as of
    `read_weights` and `fill`."""
    weights = read_weights(str(path), sizes.get("num_attention_heads"))
    sizes = weights.sizes | sizes
    if "encoder_hidden_size" not in sizes:
        raise ArtifactError(f"{path} is a BERT: give encoder_hidden_size, the width of the frozen encoder's features")
    model = QFormer(QFormerConfig(**sizes))
    fill(model, weights)
    return model.eval()


def read_weights(name: str, num_attention_heads: int | None = None) -> Weights:
    """The weights that `name` names: a run, a LAVIS .pth or .safetensors, a folder or Hugging Face id of a BLIP-2 or a BERT.

    `num_attention_heads` is what a LAVIS file does not tell; heads are 64 wide unless given. ArtifactError if there are none,
    or they cannot be read; nothing pickled is executed."""
    path = Path(name)
    if path.is_file():
        return _from_lavis(path, num_attention_heads)
    if not path.is_dir():
        try:
            path = encoder_folder(name, ("*.json", "*.txt", "*.safetensors"))
        except EncoderError as error:
            raise ArtifactError(
                f"{name}: no such weights; give a run, a BLIP-2 or BERT folder or Hugging Face id that can be fetched, or a "
                "LAVIS .pth or .safetensors"
            ) from error
    if has_manifest(path):
        return _from_run(path)
    if (path / "config.json").is_file():
        config = _read_object(path / "config.json")
        if config.get("model_type") == "blip-2":
            return _from_huggingface(name, path)
        if config.get("model_type") == "bert":
            return _from_bert(name, path, config)
        raise ArtifactError(
            f"{name}: a model of type {config.get('model_type')!r}; use a finished run, BLIP-2 weights or a BERT"
        )
    if (path / "model.safetensors").is_file():
        return _from_lavis(path / "model.safetensors", num_attention_heads)
    raise ArtifactError(
        f"{name} holds no finished run and no model (no manifest.json, config.json or model.safetensors)"
    )


def _from_run(folder: Path) -> Weights:
    manifest = read_manifest(folder, RUN)
    state = load_tensors(folder / "model.safetensors")
    return Weights(str(folder), RUN_NAMES, manifest["model"], state, tokenizer=read_tokenizer(folder))


def _from_lavis(path: Path, heads: int | None) -> Weights:
    tensors: Any = load_tensors(path, LAVIS_NAMES.foreign)
    tensors = tensors.get("model", tensors)  # LAVIS's own checkpoints hold {"model": …}
    if not isinstance(tensors, dict) or not any(str(key).startswith("Qformer.") for key in tensors):
        raise ArtifactError(
            f"{path} holds no BLIP-2 stage-1 weights under LAVIS's names; of a run or a Hugging Face model give the folder"
        )
    state, unexpected = _taken(path, tensors, LAVIS_NAMES)
    info = _info(path)
    sizes = info.get("model") or _lavis_sizes(Weights(str(path), LAVIS_NAMES, {}, state, unexpected), heads)
    return Weights(str(path), LAVIS_NAMES, sizes, state, unexpected, info.get("tokenizer"))


def _lavis_sizes(weights: Weights, heads: int | None) -> dict[str, Any]:
    """The sizes that LAVIS weights tell. Heads are 64 wide and [DEC] is the last id unless known."""
    state = weights.state
    layers = sorted({int(m[1]) for key in state if (m := re.search(r"encoder\.layer\.(\d+)\.", key))})
    crossed = sorted({int(m[1]) for key in state if (m := re.search(r"layer\.(\d+)\.crossattention", key))})
    depth = {
        "num_hidden_layers": len(layers),
        "cross_attention_frequency": crossed[1] - crossed[0] if len(crossed) > 1 else max(1, len(layers)),
    }
    try:
        vocab, hidden = state[BY_WORD[0]].shape
        inner = state["qformer.encoder.layer.0.attention.attention.query.weight"].shape[0]
        if heads is None and inner % 64:
            raise ArtifactError(
                f"{weights.name}: attention {inner} wide is no number of heads of 64; give num_attention_heads"
            )
        heads = heads or inner // 64
        return depth | {
            "vocab_size": vocab,
            "encoder_hidden_size": state["post_layernorm.weight"].shape[0],
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "head_dim": inner // heads,
            "intermediate_size": state["qformer.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_query_tokens": state["query_tokens"].shape[1],
            "embed_dim": state["vision_projection.weight"].shape[0],
            "max_position_embeddings": state["embeddings.position_embeddings.weight"].shape[0],
            "ln_vision_eps": 1e-5,
            "bos_token_id": vocab - 1,
        }
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{weights.name} has a tensor of too few or too many dimensions: {error}") from error
    except KeyError:  # what else is missing does not depend on the sizes: have all of it named
        fill(QFormer(QFormerConfig(1, 1, hidden_size=1, num_attention_heads=1, intermediate_size=1, **depth)), weights)
        raise


def _from_huggingface(name: str, folder: Path) -> Weights:
    from transformers import Blip2Config  # knows the sizes that a config.json leaves to their defaults

    try:
        config = Blip2Config.from_pretrained(folder)
    except Exception as error:  # transformers checks it with errors of many kinds
        raise ArtifactError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    qformer = config.qformer_config
    _check_activation(name, qformer.hidden_act)
    state, unexpected = _taken(folder, _load_folder(folder, HUGGINGFACE_NAMES.foreign), HUGGINGFACE_NAMES)
    words = len(state[BY_WORD[0]]) if BY_WORD[0] in state else qformer.vocab_size
    sizes = {size: getattr(qformer, size) for size in QFORMER_SIZES} | {
        "vocab_size": words,
        "num_query_tokens": config.num_query_tokens,
        "embed_dim": config.image_text_hidden_size,
        "ln_vision_eps": config.vision_config.layer_norm_eps,
        "pad_token_id": qformer.pad_token_id or 0,
        "bos_token_id": words - 1,
    }
    heads = folder / STAGE1_HEADS
    if heads.is_file():
        state |= load_tensors(heads)
        sizes = _info(heads).get("model", sizes)
    # without text embeddings the tokenizer is the language model's
    tokenizer = read_tokenizer(folder) if BY_WORD[0] in state else None
    return Weights(name, HUGGINGFACE_NAMES, sizes, state, unexpected, tokenizer)


def _from_bert(name: str, folder: Path, config: Mapping[str, Any]) -> Weights:
    """As BLIP-2 starts: self-attention, text feed-forward, embeddings and, where it is there, the language head of a BERT;
    the queries' feed-forward is a copy of the text's."""
    _check_activation(name, config.get("hidden_act", "gelu"))
    tensors = {}
    for key, value in _load_folder(folder, BERT_NAMES.foreign).items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        tensors[key if key.startswith(("bert.", "cls.")) else f"bert.{key}"] = value
    state, unexpected = _taken(folder, tensors, BERT_NAMES)
    for key in list(state):
        if PARTS["text feed-forward"].match(key):
            state[re.sub(r"\.(intermediate|output)\.", r".\1_query.", key, count=1)] = state[key]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    try:
        sizes: dict[str, Any] = {size: int(config[size]) for size in names}
        words = len(state[BY_WORD[0]])
        sizes |= {"layer_norm_eps": float(config.get("layer_norm_eps", 1e-12)), "vocab_size": words}
    except KeyError as error:
        raise ArtifactError(f"{name} is no BERT that qf can start from: missing {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'} has a size that is no number: {error}") from error
    if min(sizes[size] for size in names) < 1 or sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ArtifactError(
            f"{folder / 'config.json'} has sizes that no BERT has: {', '.join(f'{n} {sizes[n]}' for n in names)}"
        )
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        tokens = Tokens.parse(tokenizer, folder, words)
        sizes |= {"vocab_size": max(words, len(tokens)), "bos_token_id": tokens.bos_token_id}
    return Weights(name, BERT_NAMES, sizes, state, unexpected, tokenizer)


def _check_activation(name: str, activation: str) -> None:
    if activation != "gelu":
        raise ArtifactError(f"{name} computes with {activation!r}; qf's Q-Former, as BLIP-2's, with 'gelu'")


def _taken(path: Path, tensors: Mapping[str, Any], layout: KeyNames) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` under our names, in float32, and the keys that are none of the layout's."""
    state, unexpected = {}, []
    for key, value in ((str(key), value) for key, value in tensors.items()):
        if layout.foreign.search(key):
            continue
        if not isinstance(value, Tensor) or layout.theirs(layout.ours(key)) != key:
            unexpected.append(key)
        else:
            state[layout.ours(key)] = value.float()
    return state, unexpected


def _load_folder(folder: Path, foreign: re.Pattern[str]) -> dict[str, Tensor]:
    """All tensors of a transformers folder, but for the foreign ones, from one file or from shards."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_tensors(folder / "model.safetensors", foreign)
    tensors: dict[str, Tensor] = {}
    placed = _read_object(index).get("weight_map")
    if not isinstance(placed, dict):
        raise ArtifactError(f"{index} cannot be read: it has no weight_map")
    for file in sorted({str(file) for key, file in placed.items() if not foreign.search(key)}):
        tensors |= load_tensors(folder / file, foreign)
    return tensors


def _info(path: Path) -> dict[str, Any]:
    """What `qf export` wrote beside the tensors: {model, tokenizer}; nothing in files of others."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("qf", "{}")
    try:
        info = json.loads(text)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ArtifactError(f"{path} cannot be read as weights: what `qf export` wrote beside them is damaged")
    return info


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return value
