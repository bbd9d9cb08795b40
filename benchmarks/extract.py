"""Images/s of `qf extract`, from JPEG files to finished shards, beside the bare forward pass of its encoder on ready tensors.

    python benchmarks/extract.py PHOTOS [--encoder vit-b32|vit-l14|FOLDER|ID] [--copies 6] [--device auto] [--precision auto]

PHOTOS is a folder of pictures; copies of them make the run long enough. Same model, batch size and precision, one process, in
turns. Encoders `vit-b32` and `vit-l14` are CLIP's vision models of those sizes with random weights, which cost what trained ones do.
Prints one JSON object."""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qf.pipeline.config import ExtractOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.device import autocast, resolve_device, resolve_precision
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.transformers import TransformersEncoder
from qf.pipeline.extract.extract import extract
from qf.pipeline.features.codecs import CODECS
from qf.pipeline.images import load_image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES: dict[str, dict[str, int]] = {
    "vit-b32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32},
    "vit-l14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip


def random_clip(size: str, folder: Path) -> str:
    """A vision model of CLIP's layout, never trained; the folder's name."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES[size], image_size=224, projection_dim=512)  # type: ignore[arg-type]
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return str(folder)


def dataset_of(photos: Path, copies: int, folder: Path) -> Path:
    """`copies` files of each picture, with a caption each; the CSV."""
    folder.mkdir()
    pictures = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    lines = ["image,caption"]
    for copy in range(copies):
        for picture in pictures:
            name = f"{copy}-{picture.name}"
            shutil.copyfile(picture, folder / name)
            lines.append(f"{name},a photograph")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


@torch.inference_mode()
def bare(encoder: TransformersEncoder, pixels: np.ndarray, seconds: float) -> float:
    """Images/s of the model alone, on a batch that lies ready on the device."""
    values = torch.from_numpy(pixels).to(encoder.device).float()
    values = (values * encoder.preprocessing.rescale_factor - encoder.mean) / encoder.std

    def wait() -> None:
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)

    count = 0
    wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        with autocast(encoder.device, encoder.dtype):
            encoder.model(pixel_values=values)
        wait()
        count += len(pixels)
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--encoder", default="vit-b32")
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--codec", default="float16", choices=CODECS)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the bare forward pass, each turn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_precision(arguments.precision, device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = arguments.encoder
        encoder = load_encoder(random_clip(name, folder / "clip") if name in SIZES else name, device, dtype)
        if not isinstance(encoder, TransformersEncoder):
            parser.error("the bare forward pass is measured of transformers models only")
        source = dataset_of(arguments.photos, arguments.copies, folder / "photos")
        records = read(source).records
        first = [load_image(folder / "photos" / record.image) for record in records[: arguments.batch_size]]
        pixels = np.stack([encoder.preprocessing(image) for image in first])
        bare(encoder, pixels, 1.0)  # warm
        turns: list[dict[str, Any]] = []
        for _ in range(arguments.turns):
            alone = bare(encoder, pixels, arguments.seconds)
            options = ExtractOptions(
                codec=arguments.codec, batch_size=arguments.batch_size, workers=arguments.workers, overwrite=True
            )
            summary = extract(read(source), str(source), encoder, folder / "features", options)
            rate = summary.images_per_second
            turns.append(
                {"bare": round(alone, 2), "extract": rate, "share": round(rate / alone, 3), "waited": summary.waited}
            )
    shares = sorted(turn["share"] for turn in turns)
    print(
        json.dumps(
            {
                "encoder": name,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores",
                "precision": str(dtype).removeprefix("torch."),
                "batch_size": arguments.batch_size,
                "images": len(records),
                "turns": turns,
                "median_share": shares[len(shares) // 2],
            }
        )
    )


if __name__ == "__main__":
    main()
