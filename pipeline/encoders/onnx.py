"""The encoder that runs an ONNX export with onnxruntime: pixels to the tokens of its last layer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EncoderError
from .identity import describe, normalisation, read_processor, weights_sha256
from .preprocessing import Preprocessing


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
        except Exception as error:  # onnxruntime's errors have no common base class
            raise EncoderError(
                f"{folder / 'model.onnx'} cannot be loaded: onnxruntime {onnxruntime.__version__} does not take it; export it "
                "again, with all its weights beside it"
            ) from error
        outputs = {output.name: output.shape for output in self.session.get_outputs()}
        if "last_hidden_state" not in outputs or "pixel_values" not in {i.name for i in self.session.get_inputs()}:
            raise EncoderError(
                f"{folder / 'model.onnx'} needs an input pixel_values and an output last_hidden_state (it gives {', '.join(outputs)})"
            )
        self.outputs = ["last_hidden_state"] + (["image_embeds"] if "image_embeds" in outputs else [])
        self.name, self.sha256 = name, weights_sha256(folder)
        self.mean, self.std = (t.numpy() for t in normalisation(self.preprocessing, torch.device("cpu")))
        blank = np.zeros((1, 3, self.preprocessing.height, self.preprocessing.width), np.uint8)
        tokens, pooled = self.encode(blank)  # the file's shapes may be symbolic; a forward pass gives real ones
        self.tokens, self.width = tokens.shape[1:]
        self.joint = None if pooled is None else pooled.shape[1]

    @property
    def identity(self) -> dict[str, Any]:
        return describe(self, -1, "float32")

    def encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        values = (pixels.astype(np.float32) * np.float32(self.preprocessing.rescale_factor) - self.mean) / self.std
        try:
            tokens, *joint = self.session.run(self.outputs, {"pixel_values": values})
        except Exception as error:  # onnxruntime's errors have no common base class
            raise EncoderError(
                f"encoder {self.name} does not take {len(pixels)} x 3 x {pixels.shape[2]} x {pixels.shape[3]} float32 pixels, as its "
                "preprocessor_config.json and --batch-size make them; export it for them"
            ) from error
        if tokens.ndim != 3:
            raise EncoderError(
                f"encoder {self.name}: last_hidden_state has shape {tokens.shape}, not (batch, tokens, width)"
            )
        if joint and joint[0].ndim != 2:
            raise EncoderError(f"encoder {self.name}: image_embeds has shape {joint[0].shape}, not (batch, width)")
        pooled = F.normalize(torch.from_numpy(joint[0]).float(), dim=-1) if joint else None
        return torch.from_numpy(tokens).float(), pooled
