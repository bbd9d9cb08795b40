"""The identity of an encoder: its folder, its checksum, and whether it is still the one that made the features.

Imports no PyTorch: a search asks these questions, too."""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import EncoderError
from ..files import sha256_file
from ..lfs import CURE, is_lfs_pointer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from .preprocessing import Preprocessing

BUILTIN = Path(__file__).resolve().parents[2] / "data" / "clip"
DEFAULT_ENCODER = "openai/clip-vit-base-patch32"
# The fields of an identity that must be equal, for each purpose.
WEIGHTS = ("sha256",)  # for another part of the same model
SAME_INPUT = ("sha256", "preprocessing")  # for a query picture, encoded like the dataset
SAME_FEATURES = ("sha256", "layer", "preprocessing", "tokens", "width")  # for a run on features it was not trained on
NAMES = {"sha256": "weights have", "preprocessing": "preprocessing has"}  # for messages
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.onnx", "*.onnx_data", "*.onnx.data")


class FrozenEncoder(Protocol):
    """An encoder as extraction uses it."""

    preprocessing: "Preprocessing"
    device: "torch.device"

    @property
    def identity(self) -> dict[str, Any]:
        """The properties that decide the features: id, sha256, layer, precision, tokens T, width W, joint width P or None,
        preprocessing."""
        ...

    def encode(self, pixels: "np.ndarray") -> "tuple[Tensor, Tensor | None]":
        """(B, 3, H, W) uint8 -> tokens (B, T, W) float32, and pooled (B, P) float32, L2-normalised, or None: on the device,
        without waiting for it. Several threads may encode at once."""
        ...


def encoder_folder(name: str, files: Sequence[str] = MODEL_FILES, cached: bool = False) -> Path:
    """The local folder of an encoder: `builtin`, a folder, or a Hugging Face id (downloaded or from the local cache), of
    which `files` are wanted. With `cached` a copy in the cache is taken without asking the hub for a newer one.

    EncoderError if there is none, or if Git LFS left a pointer in it."""
    if name == "builtin":
        return BUILTIN
    if Path(name).is_dir():
        if pointer := pointer_in(Path(name)):
            raise EncoderError(f"{pointer} {CURE}")
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise EncoderError(
            f"encoder {name}: no such folder; give builtin, a folder, or a Hugging Face id such as {DEFAULT_ENCODER}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
        allowed, variants = list(files), ["*/*"]
        return Path(snapshot_download(name, allow_patterns=allowed, ignore_patterns=variants, local_files_only=local))

    if cached:
        with suppress(LocalEntryNotFoundError):
            return snapshot(True)
    try:
        return snapshot(False)
    except Exception as error:  # the hub's client raises many types; each means that the model is not here
        raise EncoderError(
            f"encoder {name} cannot be fetched from Hugging Face ({type(error).__name__}); check the id and the "
            "network, or use --encoder builtin or a local folder"
        ) from error


def pointer_in(folder: Path) -> Path | None:
    """A file of the model in `folder` that is a Git LFS pointer, or None."""
    files = (file for pattern in MODEL_FILES for file in sorted(folder.glob(pattern)))
    return next(filter(is_lfs_pointer, files), None)


def origin(folder: Path) -> str:
    """Where the files of a model folder come from, in words: its page, if config.json names one."""
    try:
        name = str(read_config(folder / "config.json").get("_name_or_path"))
    except EncoderError:
        name = ""
    page = f"https://huggingface.co/{name}" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else "the model's page"
    return f"{page}, or write it with save_pretrained of transformers"


def model_type(folder: Path) -> str:
    """The model type in config.json."""
    return str(read_config(folder / "config.json").get("model_type"))


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. EncoderError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        source = (
            "copy it from the model's page" if path.name == "config.json" else f"copy it from {origin(path.parent)}"
        )
        raise EncoderError(
            f"{path.parent} is no encoder: {path.name} cannot be read (there is no such file); {source}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EncoderError(
            f"{path.parent} is no encoder: {path.name} cannot be read (it is not JSON); copy it again from the model's page"
        ) from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path.parent} is no encoder: {path.name} is not a JSON object")
    return value


def read_processor(folder: Path) -> dict[str, Any]:
    """The configuration of the model's image processor. transformers saves it in processor_config.json since version 5, in
    preprocessor_config.json before."""
    nested = folder / "processor_config.json"
    config = read_config(nested).get("image_processor") if nested.is_file() else None
    return config if config and isinstance(config, dict) else read_config(folder / "preprocessor_config.json")


def first_difference(recorded: dict[str, Any], now: dict[str, Any], fields: Sequence[str]) -> str | None:
    """The first of the fields in which two identities differ, or None."""
    return next((name for name in fields if recorded[name] != now[name]), None)


def check_unchanged(recorded: dict[str, Any], now: dict[str, Any], fields: Sequence[str]) -> None:
    """EncoderError if the encoder `now` differs in one of the fields from the one `recorded` with the features."""
    if changed := first_difference(recorded, now, fields):
        raise EncoderError(
            f"encoder {recorded['id']} is no longer the one that made the features: its {NAMES[changed]} changed; restore it, "
            "or extract again with --overwrite"
        )


def check_weights(recorded: dict[str, Any], folder: Path, sha256: Callable[[Path], str] = sha256_file) -> None:
    """EncoderError if the weights in the encoder's `folder` are not those that made the features. `sha256` hashes a file."""
    check_unchanged(recorded, {"sha256": weights_sha256(folder, sha256)}, WEIGHTS)


def weights_sha256(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str:
    """The SHA-256 of a model's weight file, or of the hashes of several files in order of name. `sha256` hashes a file.

    The external weights of an ONNX model count as weight files. EncoderError if there are none."""
    onnx = folder / "model.onnx"
    files = sorted([onnx, *_external_weights(onnx)]) if onnx.is_file() else safetensors_files(folder)
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def safetensors_files(folder: Path) -> list[Path]:
    """The .safetensors files of a model in order of name. EncoderError if there is none, or if a shard is missing."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    shards = read_config(index).get("weight_map") if index.is_file() else None
    listed = {folder / str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    if missing := sorted(listed - set(files)):
        raise EncoderError(
            f"{folder} has no {missing[0].name}, which {index.name} lists; copy it from {origin(folder)}"
        )
    if not files:
        pickled = (folder / "pytorch_model.bin").is_file()
        cure = "qf reads no pickle such as pytorch_model.bin: save the model again with save_pretrained of transformers"
        raise EncoderError(
            f"{folder} holds no model.safetensors and no model.onnx; {cure if pickled else f'copy it from {origin(folder)}'}"
        )
    return files


def check_whole(files: Sequence[Path]) -> None:
    """EncoderError if one of the .safetensors files is damaged or incomplete, as far as its header tells."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise EncoderError(
                f"{file} cannot be loaded: it is damaged or incomplete; copy it again from {origin(file.parent)}"
            ) from error


def _external_weights(model: Path) -> set[Path]:
    """The files beside an ONNX model that hold its tensors. Its entries `location` name them (onnx.proto, external_data)."""
    found = set()
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in re.finditer(rb"\x0a\x08location\x12([\x01-\x7f])", data):  # key, then value with its length
            name = data[entry.end() : entry.end() + entry[1][0]]
            if b"\0" not in name and (model.parent / os.fsdecode(name)).is_file():
                found.add(model.parent / os.fsdecode(name))
    return found


def describe(encoder: Any, layer: int, precision: str) -> dict[str, Any]:
    """The identity of an encoder that has been loaded, as `FrozenEncoder.identity` gives it."""
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


def normalisation(preprocessing: "Preprocessing", device: "torch.device") -> "tuple[Tensor, Tensor]":
    """Mean and standard deviation of the pixels, each (1, 3, 1, 1) float32, on the device."""
    import torch

    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return mean, std
