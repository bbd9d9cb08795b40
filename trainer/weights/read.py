"""Weights in: from a run, LAVIS's BLIP-2 stage 1, a BLIP-2 of Hugging Face or a BERT, with the sizes and the tokenizer of each."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from msgspec import convert
from torch import Tensor, nn

from ...pipeline.artifacts import check_files, has_manifest, read_manifest, remember
from ...pipeline.encoders.identity import encoder_folder, origin, pointer_in
from ...pipeline.errors import ArtifactError, EncoderError
from ...pipeline.lfs import CURE
from ...pipeline.tensor_files import open_tensors
from ..manifest import RUN, WEIGHTS, ModelSizes
from ..tokens import Tokens, read_tokenizer
from .names import (
    BERT_NAMES,
    HUGGINGFACE_NAMES,
    LAVIS_NAMES,
    PARTS,
    PROJECTION,
    QFORMER_SIZES,
    ROW_A_WORD,
    RUN_NAMES,
    STAGE1_HEADS,
    STAGE2_RUN_NAMES,
    STAGE_2,
    WORD_EMBEDDINGS,
    KeyNames,
    Weights,
    load_tensors,
)

log = logging.getLogger(__name__)


class Exported(TypedDict, total=False):
    """The metadata that `qf export` writes beside tensors."""

    model: ModelSizes
    tokenizer: str


def read_weights(name: str, num_attention_heads: int | None = None, stage: int = 1) -> Weights:
    """The weights of a run, of a LAVIS .pth or .safetensors, or of a folder or Hugging Face id of a BLIP-2 or a BERT.

    A LAVIS file does not hold the number of its attention heads: they are 64 wide unless `num_attention_heads` is given.
    `stage` is the one that they are for: stage 2 also takes runs of stage 2. ArtifactError if there are no weights or they cannot be
    read. Pickled code is never executed."""
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
    if pointer := pointer_in(path):
        raise ArtifactError(f"{pointer} {CURE}")
    if has_manifest(path):
        return _from_run(path, stage)
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


def fill(model: nn.Module, weights: Weights) -> None:
    """Copy `weights` into `model`, whose keys are a Q-Former's.

    Parts that the source may lack keep their fresh start, and so do words that the model has besides; a warning names them.
    ArtifactError names every other key that is missing, unexpected or of another shape, as the source calls it."""
    own, state, theirs = model.state_dict(), weights.state, weights.key_names.theirs
    absent = {key for key in own if key not in state}
    parts = {part: {key for key in own if PARTS[part].match(key)} for part in weights.key_names.may_lack}
    fresh = [part for part, keys in parts.items() if keys and absent >= keys]
    missing = [key for key in own if key in absent and not any(PARTS[part].match(key) for part in fresh)]
    if weights.key_names is BERT_NAMES:  # the queries' feed-forward is a copy of the text's: name that
        missing = [re.sub(r"_query\.", ".", key) for key in missing]
    problems = [f"missing {theirs(key)}" for key in dict.fromkeys(missing)]
    problems += [f"unexpected {key}" for key in weights.unexpected]
    problems += [f"unexpected {theirs(key)}" for key in state if key not in own]
    if problems:  # the shapes may be wrong for the same reason
        raise ArtifactError(f"{weights.name} does not fit the model: {'; '.join(problems)}")
    different = [key for key, value in state.items() if own[key].shape != value.shape]
    for key in different:
        there, wanted = tuple(state[key].shape), tuple(own[key].shape)
        fewer_words = key in ROW_A_WORD and there[1:] == wanted[1:] and there[0] < wanted[0]
        if not fewer_words:
            problems.append(f"{theirs(key)} is {there}, not {wanted}")
    if problems:
        raise ArtifactError(f"{weights.name} does not fit the model: {'; '.join(problems)}")
    for key, value in state.items():
        (own[key][: len(value)] if key in different else own[key]).copy_(value)
    if different:
        fresh.append("word for [DEC]")
    if fresh:
        log.warning("%s has no %s: these start afresh", weights.name, ", ".join(fresh))


def _from_run(folder: Path, stage: int) -> Weights:
    manifest = read_manifest(folder, RUN)
    if manifest["stage"] > stage:
        raise ArtifactError(
            f"run {folder} is of stage {manifest['stage']} and holds no whole Q-Former; give the run of stage 1 that it began with"
        )
    unknown = check_files(folder, manifest["files"], "train again with --overwrite")
    state = load_tensors(folder / WEIGHTS)
    if unknown:
        remember(folder, manifest["files"])
    if manifest["stage"] == 1:
        return Weights(str(folder), RUN_NAMES, manifest["model"], state, tokenizer=read_tokenizer(folder))
    projection = _projection(state)
    state, unexpected = _renamed(state, STAGE2_RUN_NAMES)
    tokenizer = read_tokenizer(folder) if WORD_EMBEDDINGS in state else None
    return Weights(str(folder), STAGE2_RUN_NAMES, manifest["model"], state, unexpected, tokenizer, projection)


def _from_lavis(path: Path, heads: int | None) -> Weights:
    tensors: Any = load_tensors(path, LAVIS_NAMES.foreign)
    tensors = tensors.get("model", tensors)  # a checkpoint of LAVIS itself is {"model": …}
    if isinstance(tensors, dict) and any(STAGE_2.search(str(key)) for key in tensors):
        raise ArtifactError(
            f"{path} is a BLIP-2 checkpoint of stage 2, which has a language model and no heads for stage 1; give LAVIS's "
            "stage-1 weights (blip2_pretrained.pth), or the folder of a Hugging Face BLIP-2"
        )
    if not isinstance(tensors, dict) or not any(str(key).startswith("Qformer.") for key in tensors):
        raise ArtifactError(
            f"{path} holds no BLIP-2 stage-1 weights under LAVIS's names; for a run or a Hugging Face model give the folder"
        )
    state, unexpected = _renamed(tensors, LAVIS_NAMES)
    info = _info(path)
    sizes = info.get("model") or _lavis_sizes(str(path), state, heads)
    return Weights(str(path), LAVIS_NAMES, sizes, state, unexpected, info.get("tokenizer"))


def _lavis_sizes(name: str, state: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The sizes of LAVIS weights. Heads are 64 wide unless given; [DEC] is the last id.

    The size of a missing tensor counts as 1: `fill` names all that is missing. ArtifactError if a tensor has another number of
    dimensions, or heads of 64 do not fit."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else (1,) * dimensions
        if len(found) != dimensions:
            raise ArtifactError(f"{name}: {LAVIS_NAMES.theirs(key)} has {len(found)} dimensions, not {dimensions}")
        return found

    layers = {int(m[1]) for key in state if (m := re.search(r"encoder\.layer\.(\d+)\.", key))}
    crossed = sorted({int(m[1]) for key in state if (m := re.search(r"layer\.(\d+)\.crossattention", key))})
    vocab_size, hidden_size = shape(WORD_EMBEDDINGS, 2)
    query = "qformer.encoder.layer.0.attention.attention.query.weight"
    inner = shape(query, 2)[0] if query in state else 64 * (heads or 1)
    if heads is None and inner % 64:
        raise ArtifactError(f"{name}: attention {inner} wide is no number of heads of 64; give num_attention_heads")
    heads = heads or inner // 64
    return {
        "vocab_size": vocab_size,
        "encoder_hidden_size": shape("post_layernorm.weight", 1)[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "head_dim": inner // heads,
        "intermediate_size": shape("qformer.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "num_query_tokens": shape("query_tokens", 3)[1],
        "cross_attention_frequency": crossed[1] - crossed[0] if len(crossed) > 1 else max(1, len(layers)),
        "embed_dim": shape("vision_projection.weight", 2)[0],
        "max_position_embeddings": shape("embeddings.position_embeddings.weight", 2)[0],
        "ln_vision_eps": 1e-5,
        "bos_token_id": vocab_size - 1,
    }


def _from_huggingface(name: str, folder: Path) -> Weights:
    from transformers import Blip2Config  # it has the defaults of sizes that a config.json leaves out

    try:
        config = Blip2Config.from_pretrained(folder)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # transformers raises errors of many kinds
        raise ArtifactError(
            f"{folder / 'config.json'} cannot be read as that of a BLIP-2; copy it again from {origin(folder)}"
        ) from error
    qformer = config.qformer_config
    _check_activation(name, qformer.hidden_act)
    tensors = _load_folder(folder, HUGGINGFACE_NAMES.foreign)
    projection = _projection(tensors)
    state, unexpected = _renamed(tensors, HUGGINGFACE_NAMES)
    vocab_size = len(state[WORD_EMBEDDINGS]) if WORD_EMBEDDINGS in state else qformer.vocab_size
    sizes = {size: getattr(qformer, size) for size in QFORMER_SIZES} | {
        "vocab_size": vocab_size,
        "num_query_tokens": config.num_query_tokens,
        "embed_dim": config.image_text_hidden_size,
        "ln_vision_eps": config.vision_config.layer_norm_eps,
        "pad_token_id": qformer.pad_token_id or 0,
        "bos_token_id": vocab_size - 1,
    }
    heads = folder / STAGE1_HEADS
    if heads.is_file():
        state |= load_tensors(heads)
        sizes = _info(heads).get("model", sizes)
    # without text embeddings the folder's tokenizer is the language model's
    tokenizer = read_tokenizer(folder) if WORD_EMBEDDINGS in state else None
    return Weights(name, HUGGINGFACE_NAMES, sizes, state, unexpected, tokenizer, projection)


def _from_bert(name: str, folder: Path, config: Mapping[str, Any]) -> Weights:
    """A BERT, as BLIP-2 starts from one: self-attention, text feed-forward, embeddings and, if there is one, its language head.

    The queries' feed-forward is a copy of the text's."""
    _check_activation(name, config.get("hidden_act", "gelu"))
    tensors = {}
    for key, value in _load_folder(folder, BERT_NAMES.foreign).items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        tensors[key if key.startswith(("bert.", "cls.")) else f"bert.{key}"] = value
    state, unexpected = _renamed(tensors, BERT_NAMES)
    for key in list(state):
        if PARTS["text feed-forward"].match(key):
            state[re.sub(r"\.(intermediate|output)\.", r".\1_query.", key, count=1)] = state[key]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    try:
        sizes: dict[str, Any] = {size: int(config[size]) for size in names}
        vocab_size = len(state[WORD_EMBEDDINGS])
        sizes |= {"layer_norm_eps": float(config.get("layer_norm_eps", 1e-12)), "vocab_size": vocab_size}
    except KeyError as error:
        raise ArtifactError(f"{name} cannot be read as a BERT: missing {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'} has a size that is not a number: {error}") from error
    if min(sizes[size] for size in names) < 1 or sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ArtifactError(
            f"{folder / 'config.json'} has impossible sizes: {', '.join(f'{n} {sizes[n]}' for n in names)}"
        )
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        tokens = Tokens.parse(tokenizer, folder, vocab_size)
        sizes |= {"vocab_size": max(vocab_size, len(tokens)), "bos_token_id": tokens.bos_token_id}
    return Weights(name, BERT_NAMES, sizes, state, unexpected, tokenizer)


def _check_activation(name: str, activation: str) -> None:
    if activation != "gelu":
        raise ArtifactError(f"{name} uses the activation {activation!r}; qf's Q-Former, like BLIP-2's, uses 'gelu'")


def _renamed(tensors: Mapping[str, Any], key_names: KeyNames) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` under our names, in float32; and their keys that a Q-Former does not have."""
    state, unexpected = {}, []
    for key, value in ((str(key), value) for key, value in tensors.items()):
        if key_names.foreign.search(key):
            continue
        if not isinstance(value, Tensor) or key_names.theirs(key_names.ours(key)) != key:
            unexpected.append(key)
        else:
            state[key_names.ours(key)] = value.float()
    return state, unexpected


def _projection(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projection to a language model, taken out of `tensors`, in float32; {} if it is not among them."""
    keys = [key for key in tensors if key.startswith(PROJECTION)]
    return {key.removeprefix(PROJECTION): tensors.pop(key).float() for key in keys}


def _load_folder(folder: Path, foreign: re.Pattern[str]) -> dict[str, Tensor]:
    """The tensors of a transformers folder, from one file or from shards, without those whose name matches `foreign`."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_tensors(folder / "model.safetensors", foreign)
    tensors: dict[str, Tensor] = {}
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ArtifactError(f"{index} cannot be read: it has no weight_map")
    for file in sorted({str(file) for key, file in weight_map.items() if not foreign.search(key)}):
        tensors |= load_tensors(folder / file, foreign)
    return tensors


def _info(path: Path) -> dict[str, Any]:
    """The metadata {model, tokenizer} that `qf export` writes beside the tensors; {} in any other file."""
    if path.suffix != ".safetensors":
        return {}
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get("qf", "{}")
    try:
        return convert(json.loads(text), Exported)
    except (ValueError, RecursionError) as error:  # msgspec's ValidationError is a ValueError
        raise ArtifactError(
            f"{path} cannot be read as weights: the metadata of `qf export` in it is damaged"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: it is not JSON; copy it again from {origin(path.parent)}"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return value
