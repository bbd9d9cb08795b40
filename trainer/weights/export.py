"""Weights out: a run as a folder for transformers' Blip2ForImageTextRetrieval, or as one file under LAVIS's names.

Both hold the whole model, so that `QFormer.from_pretrained` restores it to the bit. Neither holds a pickle."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ...pipeline.artifacts import is_artifact, read_manifest
from ...pipeline.encoders.identity import check_weights, encoder_folder, model_type, read_processor
from ...pipeline.encoders.transformers import BLIP_2, VISION_MODELS, load_model
from ...pipeline.errors import ArtifactError
from ...pipeline.files import atomic_file, locked, write_json
from ...pipeline.formatting import size
from ...pipeline.results import Result
from ..config import QFormerConfig
from ..manifest import RUN
from ..tokens import CLS, DEC, MASK, PAD, SEP, UNK, Tokens
from .names import HUGGINGFACE_NAMES, LAVIS_NAMES, QFORMER_SIZES, STAGE1_HEADS
from .read import read_weights

log = logging.getLogger(__name__)
LAYOUTS = ("huggingface", "lavis")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported(Result):
    """The files that `export` wrote."""

    export: str  # the file or folder
    layout: str
    vision: bool  # whether the vision model is among the weights
    files: int
    bytes: int

    def __str__(self) -> str:
        return self.line("Q-Former and vision model" if self.vision else "Q-Former")

    def line(self, parts: str) -> str:
        """One line about an export that holds these parts."""
        return f"export    {self.export}: {parts} in the layout of {self.layout}; {size(self.bytes)}"


def export(run: Path, out: Path, layout: str, overwrite: bool = False) -> Exported:
    """Write the run's model to `out` in the layout `huggingface` (a folder) or `lavis` (a .safetensors file, or a folder with one).

    ArtifactError if there is no run or its weights have changed, if `out` exists without `overwrite`, or if the layout cannot
    hold the model. EncoderError if the encoder that made the features cannot be loaded or has changed."""
    check_place(out, layout, overwrite)
    manifest = read_manifest(run, RUN)
    state = read_weights(str(run)).state
    config = QFormerConfig(**manifest["model"])
    tokens = Tokens.load(run / "tokenizer.json")
    if layout == "lavis":
        file = lavis_file(out)
        renamed = {LAVIS_NAMES.theirs(key): value for key, value in state.items()}
        with locked(file):
            save_tensors(file, renamed, {"model": asdict(config), "tokenizer": tokens.tokenizer.to_str()})
        files, vision = [file], False
    else:
        with locked(out / WEIGHTS):
            files, vision = _to_huggingface(out, config, state, tokens, manifest["encoder"])
    return Exported(str(out), layout, vision, len(files), sum(file.stat().st_size for file in files))


def check_place(out: Path, layout: str, overwrite: bool) -> None:
    """ArtifactError unless the layout is known and `out` is a place for an export."""
    if layout not in LAYOUTS:
        raise ArtifactError(f"--to {layout}: use {' or '.join(LAYOUTS)}")
    if out.suffix in (".pth", ".pt", ".bin"):
        raise ArtifactError(f"{out}: qf writes no pickle; give a .safetensors file or a folder")
    if (out.is_file() or (out.is_dir() and any(out.iterdir()))) and not overwrite:
        raise ArtifactError(f"{out} is there already; choose another name, or replace it with --overwrite")
    if is_artifact(out if out.is_dir() else out.parent):
        raise ArtifactError(f"{out} is in a folder of qf's own; choose another name")
    if layout == "huggingface" and out.is_file():
        raise ArtifactError(f"{out} is a file; --to huggingface writes a folder")


def lavis_file(out: Path) -> Path:
    """Where the weights go under LAVIS's names: `out` is a .safetensors file or a folder."""
    return out if out.suffix == ".safetensors" else out / WEIGHTS


def _to_huggingface(
    out: Path, config: QFormerConfig, state: dict[str, Tensor], tokens: Tokens, encoder: dict[str, Any]
) -> tuple[list[Path], bool]:
    """Write the folder. Returns its files, config.json last, and whether the vision model is among the weights."""
    from transformers import Blip2Config

    heads = config.num_attention_heads
    if config.head_dim not in (None, config.hidden_size / heads):
        raise ArtifactError(
            f"heads of {config.head_dim} x {heads} do not make {config.hidden_size}, as Hugging Face's layout needs; use --to lavis"
        )
    vision, tensors, processor = vision_part(encoder, config)
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

    for name in ("config.json", "preprocessor_config.json", f"{WEIGHTS}.index.json"):  # of an earlier export
        (out / name).unlink(missing_ok=True)
    save_tensors(out / WEIGHTS, tensors | shared)
    save_tensors(out / STAGE1_HEADS, beside, {"model": asdict(config)})
    tokens.save(out / "tokenizer.json")
    write_json(out / "tokenizer_config.json", _tokenizer_settings(tokens, config))
    files = [WEIGHTS, STAGE1_HEADS, "tokenizer.json", "tokenizer_config.json"]
    if processor is not None:
        write_json(out / "preprocessor_config.json", processor)
        files.append("preprocessor_config.json")
    write_json(out / "config.json", json.loads(settings.to_json_string(use_diff=False)))
    return [out / name for name in (*files, "config.json")], bool(tensors)


def vision_part(
    encoder: dict[str, Any], config: QFormerConfig
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Settings, weights and image processor of the BLIP-2 vision model that made the features, up to their layer.

    The layout has no place for any other encoder: the settings are then of a model without layers, with a warning."""
    folder = encoder_folder(encoder["id"])
    if (folder / "model.onnx").is_file() or VISION_MODELS.get(model_type(folder)) is not BLIP_2:
        log.warning(
            "encoder %s is no BLIP-2 vision model: the export holds the Q-Former alone, and transformers will add a vision "
            "model without layers, at random",
            encoder["id"],
        )
        settings = {
            "hidden_size": config.encoder_hidden_size,
            "num_hidden_layers": 0,
            "layer_norm_eps": config.ln_vision_eps,
        }
        return settings, {}, None
    check_weights(encoder, folder)
    model, _ = load_model(BLIP_2.model, folder)
    layers = model.encoder.layers
    depth = encoder["layer"] % (len(layers) + 1)
    del layers[depth:]
    settings = model.config.to_dict() | {"num_hidden_layers": depth}
    if settings["layer_norm_eps"] != config.ln_vision_eps:
        log.warning(
            "the run's LayerNorm over the features has epsilon %g; Hugging Face's layout uses the vision model's, %g",
            config.ln_vision_eps,
            settings["layer_norm_eps"],
        )
    state = {f"vision_model.{key}": value for key, value in model.state_dict().items()}
    return settings, state, {"image_processor_type": "BlipImageProcessor"} | read_processor(folder)


def _tokenizer_settings(tokens: Tokens, config: QFormerConfig) -> dict[str, Any]:
    """The content of the tokenizer_config.json that transformers reads beside tokenizer.json."""
    special = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK, "bos": DEC}
    known = tokens.tokenizer.get_vocab()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Blip2Processor",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_position_embeddings,
        **{f"{name}_token": token for name, token in special.items() if token in known},
    }


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any] | None = None) -> None:
    """Write tensors as a safetensors file, atomically. `info` becomes metadata that `read_weights` reads."""
    metadata = {"format": "pt"} | ({"qf": json.dumps(info)} if info else {})
    with atomic_file(path) as file:
        file.write(save({key: value.contiguous() for key, value in tensors.items()}, metadata))
