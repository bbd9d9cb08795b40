"""Weights out: a run as a folder for transformers' Blip2ForImageTextRetrieval, or as one file under LAVIS's names.

Both carry everything that the run's model is, so that `QFormer.from_pretrained` gets it back to the bit; no pickle is written."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ...pipeline.artifacts import atomic_file, is_artifact, read_manifest, write_json
from ...pipeline.encoders.identity import encoder_folder, model_type, read_processor, weights_sha256
from ...pipeline.encoders.transformers import BLIP_2, VISION_MODELS, load_model
from ...pipeline.errors import ArtifactError, EncoderError
from ..config import QFormerConfig
from ..manifest import RUN
from ..tokens import CLS, DEC, MASK, PAD, SEP, UNK, Tokens
from .names import HUGGINGFACE_NAMES, LAVIS_NAMES, QFORMER_SIZES, STAGE1_HEADS
from .read import load_qformer

log = logging.getLogger(__name__)
LAYOUTS = ("huggingface", "lavis")
WEIGHTS = "model.safetensors"


def export(run: Path, out: Path, layout: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the run's model to `out` in the layout of `huggingface` (a folder) or `lavis` (a .safetensors file, or a folder
    with one), and return {export, layout, vision, files, bytes}. `vision`: whether it sees pixels.

    ArtifactError if there is no run, `out` is taken and not to be overwritten, or the layout cannot hold the model;
    EncoderError if the encoder that the run was trained on is not to be had, or has changed."""
    if layout not in LAYOUTS:
        raise ArtifactError(f"--to {layout}: use {' or '.join(LAYOUTS)}")
    if out.suffix in (".pth", ".pt", ".bin"):
        raise ArtifactError(f"{out}: qf writes no pickle; name a .safetensors file or a folder")
    manifest = read_manifest(run, RUN)
    if (out.is_file() or (out.is_dir() and any(out.iterdir()))) and not overwrite:
        raise ArtifactError(f"{out} is there already; choose another name, or replace it with --overwrite")
    if is_artifact(out if out.is_dir() else out.parent):
        raise ArtifactError(f"{out} is in a folder of qf's own; choose another name")
    model = load_qformer(run)
    tokens = Tokens.load(run / "tokenizer.json")
    state = model.state_dict()
    if layout == "lavis":
        file = out if out.suffix == ".safetensors" else out / WEIGHTS
        file.parent.mkdir(parents=True, exist_ok=True)
        renamed = {LAVIS_NAMES.theirs(key): value for key, value in state.items()}
        _save(file, renamed, {"model": asdict(model.config), "tokenizer": tokens.tokenizer.to_str()})
        files, sees = [file], False
    else:
        if out.is_file():
            raise ArtifactError(f"{out} is a file; --to huggingface writes a folder")
        files, sees = _to_huggingface(out, model.config, state, tokens, manifest["encoder"])
    return {
        "export": str(out),
        "layout": layout,
        "vision": sees,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _to_huggingface(
    out: Path, config: QFormerConfig, state: dict[str, Tensor], tokens: Tokens, encoder: dict[str, Any]
) -> tuple[list[Path], bool]:
    """The files of the folder, config.json last, and whether the vision model is among them."""
    from transformers import Blip2Config

    heads = config.num_attention_heads
    if config.head_dim not in (None, config.hidden_size / heads):
        raise ArtifactError(
            f"heads of {config.head_dim} x {heads} do not make {config.hidden_size}, as Hugging Face's layout needs; use --to lavis"
        )
    vision, tensors, processor = _vision(encoder, config)
    settings = Blip2Config(
        vision_config=vision,
        qformer_config={size: getattr(config, size) for size in QFORMER_SIZES} | {"use_qformer_text_input": True},
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.embed_dim,
        architectures=["Blip2ForImageTextRetrieval"],
        dtype="float32",
    )
    beside = {key: value for key, value in state.items() if key == "temp" or key.startswith("cls.")}
    shared = {HUGGINGFACE_NAMES.theirs(key): value for key, value in state.items() if key not in beside}

    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json", f"{WEIGHTS}.index.json"):  # of what is overwritten
        (out / name).unlink(missing_ok=True)
    _save(out / WEIGHTS, tensors | shared)
    _save(out / STAGE1_HEADS, beside, {"model": asdict(config)})
    tokens.save(out / "tokenizer.json")
    write_json(out / "tokenizer_config.json", _tokenizer_settings(tokens, config))
    files = [WEIGHTS, STAGE1_HEADS, "tokenizer.json", "tokenizer_config.json"]
    if processor is not None:
        write_json(out / "preprocessor_config.json", processor)
        files.append("preprocessor_config.json")
    write_json(out / "config.json", json.loads(settings.to_json_string(use_diff=False)))
    return [out / name for name in (*files, "config.json")], bool(tensors)


def _vision(
    encoder: dict[str, Any], config: QFormerConfig
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Settings, weights and image processor of the BLIP-2 vision model that made the features, up to their layer.

    Of any other encoder the layout has no place for the weights: settings of a model without layers, which is said."""
    folder = encoder_folder(encoder["id"])
    if (folder / "model.onnx").is_file() or VISION_MODELS.get(str(model_type(folder))) is not BLIP_2:
        log.warning(
            "encoder %s is no BLIP-2 vision model: the export holds the Q-Former alone, and transformers will start a vision "
            "model without layers at random",
            encoder["id"],
        )
        settings = {
            "hidden_size": config.encoder_hidden_size,
            "num_hidden_layers": 0,
            "layer_norm_eps": config.ln_vision_eps,
        }
        return settings, {}, None
    if weights_sha256(folder) != encoder["sha256"]:
        raise EncoderError(
            f"encoder {encoder['id']} is no longer the one that made the features; extract and train again, or restore it"
        )
    model, _ = load_model(BLIP_2.model, folder)
    layers = model.encoder.layers
    depth = encoder["layer"] % (len(layers) + 1)
    del layers[depth:]
    settings = model.config.to_dict() | {"num_hidden_layers": depth}
    if settings["layer_norm_eps"] != config.ln_vision_eps:
        log.warning(
            "the run's LayerNorm over the features has epsilon %g; Hugging Face's layout gives it the vision model's, %g",
            config.ln_vision_eps,
            settings["layer_norm_eps"],
        )
    state = {f"vision_model.{key}": value for key, value in model.state_dict().items()}
    return settings, state, {"image_processor_type": "BlipImageProcessor"} | read_processor(folder)


def _tokenizer_settings(tokens: Tokens, config: QFormerConfig) -> dict[str, Any]:
    """What transformers wants to know besides tokenizer.json."""
    special = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK, "bos": DEC}
    known = tokens.tokenizer.get_vocab()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Blip2Processor",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_position_embeddings,
        **{f"{name}_token": token for name, token in special.items() if token in known},
    }


def _save(path: Path, tensors: dict[str, Tensor], info: dict[str, Any] | None = None) -> None:
    """Tensors as a safetensors file, atomically; `info` is for `pretrained.read_weights`."""
    metadata = {"format": "pt"} | ({"qf": json.dumps(info)} if info else {})
    with atomic_file(path) as file:
        file.write(save({key: value.contiguous() for key, value in tensors.items()}, metadata))
