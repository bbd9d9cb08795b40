"""Frozen encoders: pixels to token features, and to the joint embedding where there is a joint space with text.

`load_encoder` takes `builtin`, a Hugging Face id or local folder of a transformers vision model (its config.json decides which),
or a folder with an ONNX export. Tokens are the chosen layer's output before the final layer norm, class and register
tokens included. The default is the second-last layer, which served BLIP-2 better than the last (Li et al. 2023, section
3.1), also for DINO; BLIP-2's own vision model was saved without its last layer, so there it is the last."""

from pathlib import Path

import torch

from ..errors import EncoderError
from .identity import FrozenEncoder, encoder_folder, model_type
from .onnx import OnnxEncoder
from .transformers import VISION_MODELS, TransformersEncoder


def load_encoder(name: str, device: torch.device, dtype: torch.dtype, layer: int | None = None) -> FrozenEncoder:
    """The vision model of an encoder, ready to encode. EncoderError if qf does not know it."""
    folder = encoder_folder(name)
    if name != "builtin" and Path(name).is_dir():
        name = str(folder.resolve())  # an absolute path is valid from any folder
    if (folder / "model.onnx").is_file():
        return OnnxEncoder(name, folder, device, layer)
    kind = model_type(folder)
    if kind in VISION_MODELS:
        return TransformersEncoder(name, folder, VISION_MODELS[kind], device, dtype, layer)
    if kind == "siglip2":
        raise EncoderError(
            f"encoder {name} is a NaFlex SigLIP 2, whose pictures have different numbers of tokens; use one of fixed "
            "resolution, such as google/siglip2-base-patch16-224"
        )
    raise EncoderError(
        f"encoder {name} is of type {kind!r}; qf takes ONNX exports and the transformers models {', '.join(VISION_MODELS)}"
    )
