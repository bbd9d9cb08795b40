"""How much faster is a stage-1 step of qf than the same step built from transformers' modules?

    OMP_NUM_THREADS=1 python benchmarks/stage1_step.py --captions-file captions.csv      # column `caption`; else the sample's

A step is forward, backward, gradient clipping and AdamW with all three objectives. Features, captions, sizes and precision agree.

- `qf` is `stage1_losses` on B images with C captions each.
- `plain` is LAVIS's stage 1 with transformers' Blip2QFormerModel and Blip2TextEmbeddings on the same B x C (image, caption) pairs. It
  has four passes: queries; text; 3 B C matched pairs with repeated images; queries and text under a causal mask. Each pass computes
  the keys and values of its images again. Text is padded to 32 tokens. LAVIS caches keys and values of the queries for the last
  pass; transformers' Q-Former has no such cache.
- `encoder` is the forward pass of a CLIP ViT-L/14 vision model with random weights in the same precision. Trainers without cached
  features run it on the image of every pair.

The script first compares losses and gradients of both steps in float32, with the same weights and negatives and without dropout. Each
step then has its own process, and so its own peak memory: the process's on a CPU, torch's allocator's on CUDA. The processes take
turns, step by step, so that other load slows all of them alike.

Prints one JSON object: median seconds, the median ratio of plain to qf within a turn, peak memory, and FLOP/s. FLOP/s counts the
matrix products of qf's step (torch's counter) and stands beside the best rate of one large product on the device."""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import device_name, wait
from plain import Batch, Plain
from qf.data.scenes import captions as sample_captions
from qf.data.scenes import make_scene
from qf.pipeline.device import autocast, resolve_device, resolve_precision
from qf.trainer.config import PRESETS, QFormerConfig
from qf.trainer.objectives import itc_loss, stage1_losses
from qf.trainer.qformer import QFormer
from qf.trainer.tokens import Tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

PADDED = 32  # tokens of each text in the plain step
VOCABULARY = 30_523  # tokens: BERT's and [DEC]
EACH = 5  # captions an image
CHECKED = 3  # images in the batch on which the losses are compared
RATES = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.05}


def as_pairs(batch: Batch) -> Batch:
    """Returns the batch of the plain step: one image for every text, texts padded to PADDED tokens."""
    embeds, input_ids, attention_mask, image_rows = batch
    missing = PADDED - input_ids.shape[1]
    return embeds[image_rows], F.pad(input_ids, (0, missing)), F.pad(attention_mask, (0, missing)), image_rows


def qf_losses(model: QFormer, batch: Batch, negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    return stage1_losses(model, *batch[:3], negatives=negatives, image_rows=batch[3])


def captions_of(file: Path | None, images: int) -> list[str]:
    """Returns five captions for each of `images` pictures, in order of the pictures."""
    if file is None:
        return [caption for n in range(images) for caption in sample_captions(make_scene(0, "train", n))]
    with open(file, newline="") as lines:
        return [row["caption"] for row in csv.DictReader(lines)][: images * EACH]


@cache
def vocabulary(file: Path | None, images: int, vocab_size: int) -> tuple[list[str], Tokens]:
    """Returns the captions of `images` pictures and a tokenizer trained on them."""
    texts = captions_of(file, images)
    return texts, Tokens.train(texts, vocab_size)


def make_batch(arguments: argparse.Namespace, images: int, captions: int, device: torch.device) -> Batch:
    """Returns random features of `images` images with the first `captions` captions of each picture."""
    texts, tokens = vocabulary(arguments.captions_file, max(images, 1000), arguments.vocab_size)
    chosen = [texts[image * EACH + n] for image in range(images) for n in range(captions)]
    input_ids, attention_mask = tokens(chosen, PADDED)
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(images, arguments.tokens, arguments.width, generator=draw)
    image_rows = torch.arange(images).repeat_interleave(captions)
    return embeds.to(device), input_ids.to(device), attention_mask.to(device), image_rows.to(device)


def model_config(arguments: argparse.Namespace, dropout: float) -> QFormerConfig:
    return QFormerConfig(
        vocab_size=arguments.vocab_size,
        encoder_hidden_size=arguments.width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **PRESETS[arguments.preset],
    )


def compare(arguments: argparse.Namespace, captions: int) -> dict[str, float]:
    """Returns the relative difference of each loss and of all gradients between the two steps in float32.

    With several captions the plain ITC counts an image once for each caption, which is another loss. The comparison
    therefore takes ITC of the plain similarities with each image once. Raises RuntimeError if a difference exceeds 1e-3."""
    torch.manual_seed(0)
    device = resolve_device(arguments.device)
    batch = make_batch(arguments, CHECKED, captions, device)
    model = QFormer(model_config(arguments, 0.0)).to(device)
    plain = Plain(model.config).to(device)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not name.endswith(("position_ids", "decoder.weight", "decoder.bias")) for name in missing):
        raise RuntimeError(f"the two models differ: {missing}, {unexpected}")
    count = len(batch[3])
    rows = torch.arange(count, device=device)
    negatives = (rows + captions) % count, (rows + 2 * captions) % count  # of the next image, of the one after
    ours = qf_losses(model, batch, (batch[3][negatives[0]], negatives[1]))
    theirs = plain.losses(as_pairs(batch), negatives)
    positive = batch[3][::captions, None] == batch[3][None]
    theirs["loss_itc"] = itc_loss(theirs["similarity"][::captions], positive)
    sum(ours.values()).backward()
    sum(theirs[name] for name in ours).backward()
    gradients = dict(plain.named_parameters())
    pairs = [(p.grad, gradients[name].grad) for name, p in model.named_parameters()]
    apart = sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt()
    found = {name: abs(ours[name].item() / theirs[name].item() - 1) for name in ours} | {"gradients": apart.item()}
    if max(found.values()) > 1e-3:
        raise RuntimeError(f"the two steps do not compute the same: {found}")
    return {name: float(f"{value:.1e}") for name, value in found.items()}


def make_step(
    name: str, arguments: argparse.Namespace, captions: int, device: torch.device, compiled: bool = False
) -> Callable[[], None]:
    """Returns a function that runs one step of `qf` or `plain`, or one forward pass of `encoder`.

    `compiled` compiles the blocks of `qf`, as `qf train --compile` does."""
    torch.manual_seed(0)
    dtype = resolve_precision(arguments.precision, device)
    if name == "encoder":
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).to(device, dtype).eval()
        pixels = torch.randn(arguments.batch_size, 3, 224, 224, device=device, dtype=dtype)
        return torch.no_grad()(lambda: encoder(pixels) and None)
    batch = make_batch(arguments, arguments.batch_size, captions, device)
    config = model_config(arguments, 0.1)
    model = (QFormer(config) if name == "qf" else Plain(config)).to(device).train()
    if compiled and isinstance(model, QFormer):
        model.compile_blocks()
    if name == "plain":
        batch = as_pairs(batch)
    optimizer = torch.optim.AdamW(model.parameters(), **RATES, fused=True)

    def step() -> None:
        with autocast(device, dtype):
            losses = qf_losses(model, batch) if isinstance(model, QFormer) else model.losses(batch)
        (losses["loss_itc"] + losses["loss_itm"] + losses["loss_itg"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(device: torch.device) -> float:
    """Returns the peak memory in MB: torch's allocator's on CUDA, the process's on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def work(pipe: Connection, name: str, arguments: argparse.Namespace, captions: int) -> None:
    """Runs in its own process. Answers `step` with seconds, `flops` with the FLOPs of a step and `memory` with the peak in MB."""
    device = resolve_device(arguments.device)
    step = make_step(name, arguments, captions, device)
    while (asked := pipe.recv()) != "end":
        if asked == "memory":
            pipe.send(peak_memory(device))
        elif asked == "flops":
            with FlopCounterMode(display=False) as counter:
                step()
            pipe.send(counter.get_total_flops())
        else:
            started = time.perf_counter()
            step()
            wait(device)
            pipe.send(time.perf_counter() - started)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the best FLOP/s of several large matrix products: the rate that this device reaches."""
    size, times = (8192, 20) if device.type == "cuda" else (2048, 8)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(times):
        started = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def measure(arguments: argparse.Namespace, captions: int) -> dict[str, Any]:
    """Returns the figures of both steps, and of the encoder unless --no-encoder is given. All take turns."""
    names = ["qf", "plain", *([] if arguments.no_encoder else ["encoder"])]
    context = get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, name, arguments, captions)))
        processes[-1].start()
        theirs.close()  # recv then raises EOFError if the process dies

    def ask(name: str, what: str) -> float:
        pipes[name].send(what)
        return pipes[name].recv()

    for name in names:
        ask(name, "step")  # to warm up
    turns = [{name: ask(name, "step") for name in names} for _ in range(arguments.steps)]
    memory = {name: ask(name, "memory") for name in names}
    flops = ask("qf", "flops")  # last: the counter takes memory and time
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("end")
        process.join()

    pairs = arguments.batch_size * captions
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in names}
    found: dict[str, Any] = {
        "captions_per_image": captions,
        "pairs": pairs,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times_faster": round(statistics.median(turn["plain"] / turn["qf"] for turn in turns), 2),
        "peak_memory_MB": {name: round(value) for name, value in memory.items()},
        "qf_TFLOP_per_step": round(flops / 1e12, 3),
        "qf_TFLOP_per_second": round(flops / seconds["qf"] / 1e12, 3),
    }
    if "encoder" in names:  # on the image of every pair
        with_encoder = statistics.median((turn["plain"] + turn["encoder"] * captions) / turn["qf"] for turn in turns)
        found["times_faster_with_encoder"] = round(with_encoder, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--tokens", type=int, default=257, help="of an image")
    parser.add_argument("--width", type=int, default=1024, help="of the encoder")
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[1, EACH], help="an image; measured one after the other"
    )
    parser.add_argument(
        "--captions-file", type=Path, help="CSV of real captions, five rows an image; the sample's unless given"
    )
    parser.add_argument("--steps", type=int, default=5, help="of each kind, after one to warm up")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY)
    parser.add_argument("--no-encoder", action="store_true", help="leave the frozen encoder's forward pass out")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_precision(arguments.precision, device)
    with get_context("spawn").Pool(1) as apart:  # in another process, whose memory is freed at its end
        differences = {str(n): apart.apply(compare, (arguments, n)) for n in arguments.captions}
    result = {
        **{name: getattr(arguments, name) for name in ("preset", "tokens", "width", "batch_size", "steps")},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "matmul_TFLOP_per_second": round(matmul_flops(device, dtype) / 1e12, 3),
        "relative_difference": differences,
        "steps_compared": [measure(arguments, captions) for captions in arguments.captions],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
