"""Frozen encoders: pixels to token features, and to the joint embedding where there is a joint space with text.

`load_encoder` takes `builtin`, a Hugging Face id or local folder of a transformers vision model, told by its config.json,
or a folder with an ONNX export. Tokens are the chosen layer's output before the final layer norm, class and register
tokens included. The default is the second-last layer, which served BLIP-2 better than the last (Li et al. 2023, section
3.1), also for DINO; BLIP-2's own vision model was saved without its last layer, so there it is the last."""

import hashlib
import json
import mmap
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .artifacts import sha256_file
from .device import autocast
from .errors import EncoderError
from .images import Preprocessing

BUILTIN = Path(__file__).resolve().parent.parent / "data" / "clip"
DEFAULT_ENCODER = "openai/clip-vit-base-patch32"
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.onnx", "*.onnx_data", "*.onnx.data")


class FrozenEncoder(Protocol):
    """What extraction needs of an encoder."""

    preprocessing: Preprocessing
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two encoders' features interchangeable: id, sha256, layer, precision, tokens T, width W, joint width
        P or None, preprocessing."""
        ...

    def encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) uint8 -> tokens (B, T, W) float32, and pooled (B, P) float32, L2-normalised, or None: on the device,
        without waiting for it. Several threads may encode at once."""
        ...


@dataclass(frozen=True)
class Tower:
    """How transformers names a kind of vision model: its class, the default layer, the output with the joint embedding."""

    model: str
    layer: int
    joint: str | None = None


CLIP = Tower("CLIPVisionModelWithProjection", -2, "image_embeds")
METACLIP_2 = Tower("MetaClip2VisionModelWithProjection", -2, "image_embeds")
SIGLIP = Tower("SiglipVisionModel", -2, "pooler_output")  # fixed-resolution SigLIP 2 as well
BLIP_2 = Tower("Blip2VisionModel", -1)
TOWERS = {  # by the model_type of config.json
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "metaclip_2": METACLIP_2,
    "metaclip_2_vision_model": METACLIP_2,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "blip-2": BLIP_2,
    "blip_2_vision_model": BLIP_2,
    "dinov2": Tower("Dinov2Model", -2),
    "dinov2_with_registers": Tower("Dinov2WithRegistersModel", -2),
    "dinov3_vit": Tower("DINOv3ViTModel", -2),
}


def encoder_folder(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local folder of an encoder: `builtin`, a folder, or a Hugging Face id (downloaded or from the local cache), of
    which `files` are wanted."""
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
        # no folders of variants
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model is not here
        raise EncoderError(
            f"encoder {name} cannot be fetched from Hugging Face ({type(error).__name__}); check the id and the "
            "network, or use --encoder builtin or a local folder"
        ) from error


def load_encoder(name: str, device: torch.device, dtype: torch.dtype, layer: int | None = None) -> FrozenEncoder:
    """The image side of an encoder, ready to encode. EncoderError if it is none that qf knows."""
    folder = encoder_folder(name)
    if name != "builtin" and Path(name).is_dir():
        name = str(folder.resolve())  # which finds it again from anywhere
    if (folder / "model.onnx").is_file():
        return OnnxEncoder(name, folder, device, layer)
    kind = model_type(folder)
    if kind in TOWERS:
        return TransformersEncoder(name, folder, TOWERS[kind], device, dtype, layer)
    if kind == "siglip2":
        raise EncoderError(
            f"encoder {name} is a NaFlex SigLIP 2, whose tokens differ in number from picture to picture; use one of fixed "
            "resolution, such as google/siglip2-base-patch16-224"
        )
    raise EncoderError(
        f"encoder {name} is of type {kind!r}; qf takes ONNX exports and the transformers models {', '.join(TOWERS)}"
    )


def model_type(folder: Path) -> str | None:
    """What config.json says the model is."""
    kind: str | None = read_config(folder / "config.json").get("model_type")
    return kind


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. EncoderError if it is not there or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EncoderError(f"{path.parent} is no encoder: {path.name} cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path.parent} is no encoder: {path.name} is not a JSON object")
    return value


def read_processor(folder: Path) -> dict[str, Any]:
    """What the model's image processor does, from where transformers saves it: nested in processor_config.json since
    version 5, preprocessor_config.json before."""
    nested = folder / "processor_config.json"
    config = read_config(nested).get("image_processor") if nested.is_file() else None
    return config or read_config(folder / "preprocessor_config.json")


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a model's weight file; of several, the hash of their hashes in order of name. An ONNX model counts with the
    files of its external weights."""
    onnx = folder / "model.onnx"
    files = sorted([onnx, *_external_weights(onnx)] if onnx.is_file() else folder.glob("*.safetensors"))
    if not files:
        raise EncoderError(f"{folder} holds no model.safetensors and no model.onnx")
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def _external_weights(model: Path) -> set[Path]:
    """The files beside an ONNX model that hold tensors of it: what its entries `location` name (onnx.proto, external_data)."""
    found = set()
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in re.finditer(rb"\x0a\x08location\x12([\x01-\x7f])", data):  # key, then value with its length
            name = data[entry.end() : entry.end() + entry[1][0]]
            if b"\0" not in name and (model.parent / os.fsdecode(name)).is_file():
                found.add(model.parent / os.fsdecode(name))
    return found


class TransformersEncoder:
    """The vision model of a transformers folder, alone: of a BLIP-2 neither Q-Former nor language model is read."""

    def __init__(
        self, name: str, folder: Path, tower: Tower, device: torch.device, dtype: torch.dtype, layer: int | None
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.kept = threading.local()
        self.preprocessing = Preprocessing.from_config(read_processor(folder))
        self.sha256 = weights_sha256(folder)
        self.model, missing = load_tower(tower.model, folder)
        # a folder saved from CLIPVisionModel has no projection, hence no joint space
        self.joint_output = None if missing == {"visual_projection.weight"} else tower.joint
        if missing and self.joint_output == tower.joint:
            raise EncoderError(f"encoder {name} lacks {len(missing)} weights of {tower.model}, such as {min(missing)}")
        self.layer = tower.layer if layer is None else layer
        self._keep_layer()
        if dtype != torch.float32:
            for module in self.model.modules():  # once, what autocast would do again in every forward pass
                if isinstance(module, torch.nn.Linear):
                    module.to(dtype)
        self.model.to(device)
        self.mean, self.std = _normalisation(self.preprocessing, device)
        height, width = self.preprocessing.height, self.preprocessing.width
        try:  # the number of tokens depends on the model and on the picture's size: one forward pass tells
            tokens, pooled = self.encode(np.zeros((1, 3, height, width), np.uint8))
        except (ValueError, RuntimeError) as error:
            raise EncoderError(
                f"encoder {name} does not take the {height}x{width} pixels that its preprocessor_config.json makes: {first_line(error)}"
            ) from error
        self.tokens, self.width = tokens.shape[1:]
        self.joint = None if pooled is None else pooled.shape[1]

    def _keep_layer(self) -> None:
        """Have `self.kept.hidden` set to the chosen layer's output by each forward pass, and drop layers that nothing needs."""
        layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        count = len(layers)
        if not -count - 1 <= self.layer <= count:
            raise EncoderError(f"--layer {self.layer}: {self.name} has {count} layers; use {-count - 1} to {count}")
        depth = self.layer % (count + 1)  # layers to go through; 0 is what enters the first

        def keep(hidden: Tensor) -> None:
            self.kept.hidden = hidden

        if depth:
            layers[depth - 1].register_forward_hook(lambda module, inputs, output: keep(output))
        else:
            layers[0].register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
        if self.joint_output is None:
            del layers[max(depth, 1) :]

    @property
    def identity(self) -> dict[str, Any]:
        return _identity(self, self.layer, str(self.dtype).removeprefix("torch."))

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        values = batch.to(self.device, non_blocking=True).float()
        values = (values * self.preprocessing.rescale_factor - self.mean) / self.std  # (B, 3, H, W)
        with autocast(self.device, self.dtype):
            out = self.model(pixel_values=values)
        joint = None if self.joint_output is None else getattr(out, self.joint_output)
        return self.kept.hidden.float(), None if joint is None else F.normalize(joint.float(), dim=-1)


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
        self.preprocessing, self.device = Preprocessing.from_config(read_processor(folder)), torch.device("cpu")
        available = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # extraction runs several batches at once
        providers = [p for p in wanted if p in available] + ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no common base
            raise EncoderError(f"{folder / 'model.onnx'} cannot be loaded: {first_line(error)}") from error
        outputs = {output.name: output.shape for output in self.session.get_outputs()}
        if "last_hidden_state" not in outputs or "pixel_values" not in {i.name for i in self.session.get_inputs()}:
            raise EncoderError(
                f"{folder / 'model.onnx'} needs an input pixel_values and an output last_hidden_state (it gives {', '.join(outputs)})"
            )
        self.outputs = ["last_hidden_state"] + (["image_embeds"] if "image_embeds" in outputs else [])
        self.name, self.sha256 = name, weights_sha256(folder)
        self.mean, self.std = (t.numpy() for t in _normalisation(self.preprocessing, torch.device("cpu")))
        blank = np.zeros((1, 3, self.preprocessing.height, self.preprocessing.width), np.uint8)
        tokens, pooled = self.encode(blank)  # shapes in the file may be symbolic: one forward tells
        self.tokens, self.width = tokens.shape[1:]
        self.joint = None if pooled is None else pooled.shape[1]

    @property
    def identity(self) -> dict[str, Any]:
        return _identity(self, -1, "float32")

    def encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        values = (pixels.astype(np.float32) * np.float32(self.preprocessing.rescale_factor) - self.mean) / self.std
        try:
            tokens, *joint = self.session.run(self.outputs, {"pixel_values": values})
        except Exception as error:  # onnxruntime's have no common base
            raise EncoderError(
                f"encoder {self.name} does not take {len(pixels)} x 3 x {pixels.shape[2]} x {pixels.shape[3]} float32 pixels, as its "
                f"preprocessor_config.json and --batch-size make them: {first_line(error)}"
            ) from error
        if tokens.ndim != 3:
            raise EncoderError(
                f"encoder {self.name}: last_hidden_state has shape {tokens.shape}, not (batch, tokens, width)"
            )
        if joint and joint[0].ndim != 2:
            raise EncoderError(f"encoder {self.name}: image_embeds has shape {joint[0].shape}, not (batch, width)")
        pooled = F.normalize(torch.from_numpy(joint[0]).float(), dim=-1) if joint else None
        return torch.from_numpy(tokens).float(), pooled


def _identity(encoder: TransformersEncoder | OnnxEncoder, layer: int, precision: str) -> dict[str, Any]:
    return {
        "id": encoder.name,
        "sha256": encoder.sha256,
        "layer": layer,
        "precision": precision,
        "tokens": encoder.tokens,
        "width": encoder.width,
        "joint": encoder.joint,
        "preprocessing": asdict(encoder.preprocessing),
    }


def _normalisation(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return mean, std


def load_tower(model_class: str, folder: Path) -> tuple[Any, set[str]]:
    """One tower of the model in `folder`, in float32 and for inference, and which of its weights the files lack.

    Tensors of other parts are not read; transformers' report on them is not for the user. EncoderError if it cannot be
    loaded."""
    import transformers
    from transformers.utils import logging

    config = read_config(folder / "config.json")
    # CLIPModel heeds this one, and not those of its towers, which is what transformers makes a tower alone by
    whole = "vision_config" in config and "projection_dim" in config
    joint = {"projection_dim": config["projection_dim"]} if whole else {}

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            # transformers itself strips this prefix for the other models
            key_mapping={r"^vision_model\.": ""} if model_class == BLIP_2.model else None,
            **joint,
        )
    except Exception as error:  # safetensors, JSON and shape errors alike mean a broken model folder
        raise EncoderError(f"encoder {folder} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    if info["mismatched_keys"]:
        raise EncoderError(
            f"encoder {folder} cannot be loaded: {len(info['mismatched_keys'])} weights are not of the sizes in config.json, "
            f"such as {min(info['mismatched_keys'])[0]}"
        )
    return model.eval(), set(info["missing_keys"])


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
