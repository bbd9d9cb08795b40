"""Weights in and out: the rename tables between our names, LAVIS's and BERT's, and the sizes that a file tells."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..pipeline.artifacts import read_manifest
from ..pipeline.errors import ArtifactError
from .config import QFormerConfig
from .qformer import QFormer

# (LAVIS, ours); a key is renamed by the first pattern that it starts with, then by the rules for the layers
LAVIS = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.encoder.", "qformer.encoder."),
    ("Qformer.cls.", "cls."),
    ("ln_vision.", "post_layernorm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
)
ATTENTION = re.compile(r"(\.(?:cross)?attention)\.self\.")
# in LAVIS and BERT checkpoints, but not weights of their own: buffers, and the decoder tied to the word embeddings
DERIVED = re.compile(r"position_ids$|cls\.predictions\.decoder\.")
BERT_UNUSED = re.compile(
    r"^pooler\.|token_type_embeddings|^cls\.seq_relationship|^cls\.predictions\.decoder|position_ids$"
)


def from_lavis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LAVIS BLIP-2 stage-1 weights under our names; the frozen vision encoder's are left out."""
    renamed = {}
    for key, value in state.items():
        if DERIVED.search(key) or key.startswith("visual_encoder."):
            continue
        prefix, ours = next(((a, b) for a, b in LAVIS if key.startswith(a)), ("", ""))
        renamed[ATTENTION.sub(r"\1.attention.", ours + key.removeprefix(prefix))] = value
    return renamed


def lavis_config(
    state: Mapping[str, Tensor], num_attention_heads: int | None = None, bos_token_id: int | None = None
) -> QFormerConfig:
    """The sizes that LAVIS weights tell (`state` under our names). Heads are 64 wide and [DEC] is the last id unless given."""
    layers = sorted({int(m[1]) for key in state if (m := re.search(r"encoder\.layer\.(\d+)\.", key))})
    crossed = sorted({int(m[1]) for key in state if (m := re.search(r"layer\.(\d+)\.crossattention", key))})
    vocab, hidden = state["embeddings.word_embeddings.weight"].shape
    inner = state["qformer.encoder.layer.0.attention.attention.query.weight"].shape[0]
    heads = num_attention_heads or inner // 64
    return QFormerConfig(
        vocab_size=vocab,
        encoder_hidden_size=state["post_layernorm.weight"].shape[0],
        hidden_size=hidden,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        head_dim=inner // heads,
        intermediate_size=state["qformer.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_query_tokens=state["query_tokens"].shape[1],
        cross_attention_frequency=crossed[1] - crossed[0] if len(crossed) > 1 else len(layers),
        embed_dim=state["vision_projection.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        bos_token_id=vocab - 1 if bos_token_id is None else bos_token_id,
    )


def load_qformer(path: object, num_attention_heads: int | None = None, bos_token_id: int | None = None) -> QFormer:
    """A model from a run folder, or from LAVIS weights (.safetensors, or .pth read without pickled code), in evaluation mode.

    ArtifactError if the file cannot be read, or names every key that is missing or unexpected."""
    path = Path(str(path))
    if path.is_dir():
        manifest = read_manifest(path, "run")
        return load_weights(QFormer(QFormerConfig(**manifest["model"])), load_tensors(path / "model.safetensors"), path)
    state = load_tensors(path)
    state = state.get("model", state)  # type: ignore[assignment]  # LAVIS checkpoints hold {"model": …}
    state = from_lavis(state)
    try:
        config = lavis_config(state, num_attention_heads, bos_token_id)
    except KeyError as error:
        raise ArtifactError(f"{path} holds no BLIP-2 stage-1 weights: {error.args[0]} is missing") from error
    return load_weights(QFormer(config), state, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from .pth without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        ValueError,
        EOFError,
        __import__("pickle").UnpicklingError,
    ) as error:
        raise ArtifactError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error


def load_weights(model: QFormer, state: Mapping[str, Tensor], path: Path) -> QFormer:
    """`state` into `model`, every key of it; ArtifactError names those that are missing, unexpected or of another shape."""
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        raise ArtifactError(f"{path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(dict(state))
    return model.eval()


def bert_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a Q-Former that starts from a BERT with this config.json."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    return {name: int(config[name]) for name in names}


def load_bert(model: QFormer, folder: Path) -> None:
    """Start `model` from a BERT's weights, as BLIP-2 does: self-attention, text feed-forward, embeddings and, where the file
    has it, the language head; the queries' feed-forward starts as a copy of the text's. What BERT lacks (cross-attention,
    heads, [DEC]) keeps its random start.

    ArtifactError if a weight is missing or does not fit, or there is one that qf has no place for."""
    file = folder / "model.safetensors"
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    unexpected = []
    for key, value in load_tensors(file).items():
        key = key.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias")
        if BERT_UNUSED.search(key):
            continue
        renamed = ATTENTION.sub(r"\1.attention.", key.replace("embeddings.LayerNorm.", "qformer.layernorm."))
        renamed = re.sub(r"^encoder\.", "qformer.encoder.", renamed)
        if renamed not in own:
            unexpected.append(key)
        state[renamed] = value
        if re.search(r"layer\.\d+\.(intermediate|output)\.", renamed):
            state[re.sub(r"\.(intermediate|output)\.", r".\1_query.", renamed)] = value
    random = re.compile(r"crossattention|_projection\.|^itm_head|^temp$|^query_tokens$|^post_layernorm|^cls\.")
    missing = [key for key in own if key not in state and not random.search(key)]
    if missing or unexpected:
        raise ArtifactError(
            f"{file} is no BERT that qf can start from: missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    for key, value in state.items():
        if own[key].shape == value.shape:
            own[key].copy_(value)
        elif own[key].shape[1:] == value.shape[1:] and own[key].shape[0] > value.shape[0]:  # new words: [DEC]
            own[key][: len(value)].copy_(value)
        else:
            raise ArtifactError(f"{file}: {key} is {tuple(value.shape)}, not {tuple(own[key].shape)}")
