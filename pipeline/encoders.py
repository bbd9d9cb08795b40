"""Frozen encoders: pixels to token features, and a text tower where there is a joint space.

`load_encoder` takes `builtin`, a Hugging Face id or local folder of a CLIP model, or a folder with an ONNX export.
Tokens are the chosen layer's output before the final layer norm, class token included, as BLIP-2 takes them
(Li et al. 2023, section 3.1: the second-last layer)."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .artifacts import sha256_file
from .device import autocast
from .errors import EncoderError
from .images import Preprocessing

BUILTIN = Path(__file__).resolve().parent.parent / "data" / "clip"
DEFAULT_ENCODER = "openai/clip-vit-base-patch32"


class FrozenEncoder(Protocol):
    """What extraction needs of an encoder."""

    preprocessing: Preprocessing

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two encoders' features interchangeable: id, sha256, layer, tokens, width, joint, preprocessing."""
        ...

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> tokens (B, T, W) float32, and pooled (B, P) float32, L2-normalised, or None."""
        ...


def encoder_folder(name: str) -> Path:
    """The local folder of an encoder: `builtin`, a folder, or a Hugging Face id (downloaded or from the local cache)."""
    if name == "builtin":
        return BUILTIN
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise EncoderError(
            f"encoder {name}: no such folder; give builtin, a folder, or a Hugging Face id such as {DEFAULT_ENCODER}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.onnx"]))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model is not here
        raise EncoderError(
            f"encoder {name} cannot be fetched from Hugging Face ({type(error).__name__}); check the id and the "
            "network, or use --encoder builtin or a local folder"
        ) from error


def load_encoder(name: str, device: torch.device, dtype: torch.dtype, layer: int | None = None) -> FrozenEncoder:
    """The image side of an encoder, ready to encode. EncoderError if it is none that qf knows."""
    folder = encoder_folder(name)
    if (folder / "model.onnx").is_file():
        return OnnxEncoder(name, folder, device, layer)
    kind = _config(folder / "config.json").get("model_type")
    if kind != "clip":
        raise EncoderError(f"encoder {name} is of type {kind!r}; qf takes CLIP models and ONNX exports")
    return ClipEncoder(name, folder, device, dtype, -2 if layer is None else layer)


def _config(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path.parent} is no encoder: {path.name} cannot be read ({error})") from error
    return value


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a model's weight file; of several, the hash of their hashes in order of name."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.onnx"))
    if not files:
        raise EncoderError(f"{folder} holds no model.safetensors and no model.onnx")
    if len(files) == 1:
        return sha256_file(files[0])
    import hashlib

    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


class ClipEncoder:
    """The image tower of a transformers CLIP."""

    def __init__(self, name: str, folder: Path, device: torch.device, dtype: torch.dtype, layer: int) -> None:
        from transformers import CLIPVisionModelWithProjection

        self.preprocessing = Preprocessing.from_config(_config(folder / "preprocessor_config.json"))
        self.model = _quietly_load(CLIPVisionModelWithProjection, folder).to(device)
        self.device, self.dtype, self.name, self.layer = device, dtype, name, layer
        config = self.model.config
        layers = config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise EncoderError(f"--layer {layer}: {name} has {layers} layers; use {-layers - 1} to {layers}")
        self.tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.sha256 = weights_sha256(folder)
        self.mean, self.std = _normalisation(self.preprocessing, device)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "sha256": self.sha256,
            "layer": self.layer,
            "tokens": self.tokens,
            "width": self.model.config.hidden_size,
            "joint": self.model.config.projection_dim,
            "preprocessing": asdict(self.preprocessing),
        }

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        values = batch.to(self.device, non_blocking=True).float()
        values = (values * self.preprocessing.rescale_factor - self.mean) / self.std  # (B, 3, H, W)
        with autocast(self.device, self.dtype):
            out = self.model(pixel_values=values, output_hidden_states=True)
        pooled = torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
        return out.hidden_states[self.layer].float().cpu().numpy(), pooled.cpu().numpy()


class OnnxEncoder:
    """An image encoder as ONNX: input `pixel_values`, outputs `last_hidden_state` and optionally `image_embeds`."""

    def __init__(self, name: str, folder: Path, device: torch.device, layer: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EncoderError(
                f"encoder {name} is an ONNX model; install onnxruntime: pip install 'qf[onnx]'"
            ) from error
        if layer not in (None, -1):
            raise EncoderError(f"--layer {layer}: an ONNX encoder gives its last layer only; leave --layer out")
        self.preprocessing = Preprocessing.from_config(_config(folder / "preprocessor_config.json"))
        available = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=[p for p in wanted if p in available] + ["CPUExecutionProvider"],
        )
        outputs = {output.name: output.shape for output in self.session.get_outputs()}
        if "last_hidden_state" not in outputs or "pixel_values" not in {i.name for i in self.session.get_inputs()}:
            raise EncoderError(
                f"{folder / 'model.onnx'} needs an input pixel_values and an output last_hidden_state (it gives {', '.join(outputs)})"
            )
        self.outputs = ["last_hidden_state"] + (["image_embeds"] if "image_embeds" in outputs else [])
        self.name, self.sha256 = name, sha256_file(folder / "model.onnx")
        self.mean, self.std = (t.numpy() for t in _normalisation(self.preprocessing, torch.device("cpu")))
        blank = np.zeros((1, 3, self.preprocessing.height, self.preprocessing.width), np.uint8)
        tokens, pooled = self.encode(blank)  # shapes in the file may be symbolic: one forward tells
        self.tokens, self.width = tokens.shape[1:]
        self.joint = None if pooled is None else pooled.shape[1]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "sha256": self.sha256,
            "layer": -1,
            "tokens": self.tokens,
            "width": self.width,
            "joint": self.joint,
            "preprocessing": asdict(self.preprocessing),
        }

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        values = (pixels.astype(np.float32) * np.float32(self.preprocessing.rescale_factor) - self.mean) / self.std
        tokens, *joint = self.session.run(self.outputs, {"pixel_values": values})
        if tokens.ndim != 3:
            raise EncoderError(
                f"encoder {self.name}: last_hidden_state has shape {tokens.shape}, not (batch, tokens, width)"
            )
        pooled = joint[0] / np.maximum(np.linalg.norm(joint[0], axis=1, keepdims=True), 1e-12) if joint else None
        return tokens.astype(np.float32, copy=False), pooled


def _normalisation(preprocessing: Preprocessing, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return mean, std


def _quietly_load(model_class: Any, folder: Path) -> Any:
    """`from_pretrained` of one tower; its report on the other tower's weights is not for the user."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # safetensors, JSON and shape errors alike mean a broken model folder
        raise EncoderError(f"encoder {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(level)


class TextTower:
    """The text side of an encoder with a joint space: captions to unit vectors beside `pooled`."""

    def __init__(self, identity: dict[str, Any], device: torch.device) -> None:
        """`identity` is the encoder's, from a features manifest. EncoderError if the weights are other ones, or have no text tower."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        name = identity["id"]
        if identity["joint"] is None:
            raise EncoderError(f"encoder {name} has no text tower; train a model first: qf train")
        folder = encoder_folder(name)
        if (folder / "model.onnx").is_file():
            raise EncoderError(
                f"encoder {name} is an ONNX image encoder without a text tower; train a model first: qf train"
            )
        if weights_sha256(folder) != identity["sha256"]:
            raise EncoderError(
                f"encoder {name} is no longer the one that made the features; extract again with --overwrite"
            )
        self.model = _quietly_load(CLIPTextModelWithProjection, folder).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = device

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """(M,) texts -> (M, P) float32, L2-normalised; longer texts are cut at the tower's limit."""
        limit = self.model.config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                texts[start : start + batch_size], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.device)
            out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds
            parts.append(torch.nn.functional.normalize(out, dim=-1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.projection_dim), np.float32)
