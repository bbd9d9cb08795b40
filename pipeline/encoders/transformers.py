"""Vision models of transformers, frozen: pixels to the tokens of one layer, and to the joint embedding."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import autocast
from ..errors import EncoderError
from ..failures import out_of_memory
from .identity import (
    check_whole,
    describe,
    normalisation,
    origin,
    read_config,
    read_processor,
    safetensors_files,
    weights_sha256,
)
from .preprocessing import Preprocessing


@dataclass(frozen=True)
class VisionModel:
    """How transformers names a kind of vision model: its class, the default layer, the output with the joint embedding."""

    model: str
    layer: int
    joint: str | None = None


CLIP = VisionModel("CLIPVisionModelWithProjection", -2, "image_embeds")
METACLIP_2 = VisionModel("MetaClip2VisionModelWithProjection", -2, "image_embeds")
SIGLIP = VisionModel("SiglipVisionModel", -2, "pooler_output")  # fixed-resolution SigLIP 2 as well
BLIP_2 = VisionModel("Blip2VisionModel", -1)
VISION_MODELS = {  # by model_type in config.json
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "metaclip_2": METACLIP_2,
    "metaclip_2_vision_model": METACLIP_2,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "blip-2": BLIP_2,
    "blip_2_vision_model": BLIP_2,
    "dinov2": VisionModel("Dinov2Model", -2),
    "dinov2_with_registers": VisionModel("Dinov2WithRegistersModel", -2),
    "dinov3_vit": VisionModel("DINOv3ViTModel", -2),
}


class TransformersEncoder:
    """The vision model of a transformers folder. Other parts, such as BLIP-2's Q-Former and language model, are not read."""

    def __init__(
        self, name: str, folder: Path, model: VisionModel, device: torch.device, dtype: torch.dtype, layer: int | None
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.kept = threading.local()
        self.preprocessing = Preprocessing.from_config(read_processor(folder))
        self.sha256 = weights_sha256(folder)
        self.model, missing = load_model(model.model, folder)
        # a folder saved from CLIPVisionModel has no projection, hence no joint space
        self.joint_output = None if missing == {"visual_projection.weight"} else model.joint
        if missing and self.joint_output == model.joint:
            raise EncoderError(f"encoder {name} lacks {len(missing)} weights of {model.model}, such as {min(missing)}")
        self.layer = model.layer if layer is None else layer
        self._keep_layer()
        if dtype != torch.float32:
            for module in self.model.modules():  # convert once; autocast would convert in every forward pass
                if isinstance(module, torch.nn.Linear):
                    module.to(dtype)
        self.model.to(device)
        self.mean, self.std = normalisation(self.preprocessing, device)
        height, width = self.preprocessing.height, self.preprocessing.width
        try:  # the number of tokens depends on the model and on the picture's size: one forward pass tells
            tokens, pooled = self.encode(np.zeros((1, 3, height, width), np.uint8))
        except (ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise EncoderError(
                f"encoder {name} does not take the {height}x{width} pixels that its preprocessor_config.json makes; give it the "
                f"file that came with the model, from {origin(folder)}"
            ) from error
        self.tokens, self.width = tokens.shape[1:]
        self.joint = None if pooled is None else pooled.shape[1]

    def _keep_layer(self) -> None:
        """Have `self.kept.hidden` set to the chosen layer's output by each forward pass, and drop layers that nothing needs."""
        layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        count = len(layers)
        if not -count - 1 <= self.layer <= count:
            raise EncoderError(f"--layer {self.layer}: {self.name} has {count} layers; use {-count - 1} to {count}")
        depth = self.layer % (count + 1)  # the number of layers to compute; 0 takes the input of the first

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
        return describe(self, self.layer, str(self.dtype).removeprefix("torch."))

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


def load_model(model_class: str, folder: Path) -> tuple[Any, set[str]]:
    """One part of the model in `folder`, in float32 and for inference, and the names of its weights that the files lack.

    Tensors of other parts are not read; transformers' report on them is not for the user. EncoderError if it cannot be
    loaded."""
    import transformers
    from transformers.utils import logging

    config = read_config(folder / "config.json")
    # CLIPModel takes projection_dim from the whole configuration; a part that is loaded alone would take its own
    whole = "vision_config" in config and "projection_dim" in config
    joint = {"projection_dim": config["projection_dim"]} if whole else {}

    check_whole(safetensors_files(folder))
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below names them
            # transformers itself strips this prefix for the other models
            key_mapping={r"^vision_model\.": ""} if model_class == BLIP_2.model else None,
            **joint,
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # transformers raises errors of many kinds for sizes that do not go together
        raise EncoderError(
            f"encoder {folder} cannot be loaded: its config.json does not make a {model_class} of these weights; copy the "
            f"files again from {origin(folder)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    if info["mismatched_keys"]:
        raise EncoderError(
            f"encoder {folder} cannot be loaded: {len(info['mismatched_keys'])} weights are not of the sizes in config.json, "
            f"such as {min(info['mismatched_keys'])[0]}"
        )
    return model.eval(), set(info["missing_keys"])
