"""How much of its encoder's speed does `qf extract` reach? Compares it with the bare forward pass on ready pixels.

    python benchmarks/extract.py PHOTOS [--encoder vit-b32|vit-l14|FOLDER|ID] [--copies 6] [--device auto] [--precision auto]

PHOTOS is a folder of pictures; copies of them make the run long enough. Both take turns in one process, with the same model, batch
size and precision. Encoders `vit-b32` and `vit-l14` are CLIP vision models of these sizes. Their weights are random, which costs as
much time as trained ones. Prints one JSON object: for each turn the images/s of both and their ratio; then `median_share`."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIZES, device_name, random_clip, seconds_a_call
from qf.pipeline.config import ExtractOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.device import autocast, resolve_device, resolve_precision
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.transformers import TransformersEncoder
from qf.pipeline.extract.extract import extract
from qf.pipeline.features.codecs import CODECS
from qf.pipeline.images import load_image


def dataset_of(photos: Path, copies: int, folder: Path) -> Path:
    """Write `copies` files of each picture, with one caption each; returns the path of their CSV."""
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
    """Images/s of the model alone, on a batch that is already on the device."""
    values = torch.from_numpy(pixels).to(encoder.device).float()
    values = (values * encoder.preprocessing.rescale_factor - encoder.mean) / encoder.std

    def forward() -> None:
        with autocast(encoder.device, encoder.dtype):
            encoder.model(pixel_values=values)

    forward()  # warm-up
    return len(pixels) / seconds_a_call(forward, encoder.device, seconds)


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
            parser.error("this benchmark measures transformers models only")
        source = dataset_of(arguments.photos, arguments.copies, folder / "photos")
        records = read(source).records
        first = [load_image(folder / "photos" / record.image) for record in records[: arguments.batch_size]]
        pixels = np.stack([encoder.preprocessing(image) for image in first])
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
                "device": device_name(device),
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
