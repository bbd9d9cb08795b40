"""Trains the small CLIP that ships in data/clip: `python -m qf.data.train_clip --out FOLDER --minutes 19`.

It renders its own scenes, with another seed than the sample's. None of them has the content of a val or test scene (see
`make_scene`). A patch loss supports CLIP's contrastive loss at first and fades out: a linear head predicts from each patch
token which thing covers the patch. With it the vision model learns shapes within minutes on a CPU. The head is not saved.

Letters: B batch, T tokens of an image, L text length, E joint width, N images, M texts.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .scene_model import COLOURS, PICTURE, RADII, SHAPES
from .scenes import Scene, captions, make_scene, render

IMAGE_SIZE, PATCH_SIZE = 96, 16
VISION_WIDTH, VISION_LAYERS = 192, 5
TEXT_WIDTH, TEXT_LAYERS, TEXT_LENGTH = 192, 3, 48
JOINT_WIDTH, HEAD_WIDTH = 192, 32
START, END = "<|startoftext|>", "<|endoftext|>"
MEAN, STD = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std
TEXTS = 2  # captions drawn for an image at each step
TRAIN_SEED = 1  # the sample's is 0
CHUNK = 1000  # scenes that one worker renders at a time
PATCH_FACTS = (len(SHAPES) + 1, len(COLOURS) + 1, len(RADII) + 1)  # classes of each fact; 0: nothing covers the patch


@dataclass(frozen=True)
class Corpus:
    """Rendered scenes and their tokenised captions."""

    pixels: NDArray[np.uint8]  # (N, IMAGE_SIZE, IMAGE_SIZE, 3)
    patches: NDArray[np.uint8]  # (N, T - 1, 3): shape, colour and size of the thing that covers each patch
    input_ids: NDArray[np.int16]  # (N, 5, L), padded with the end token


def learning_rate(progress: float, peak: float, warmup: float = 0.04) -> float:
    """Linear warm-up to `peak`, then half a cosine to zero. `progress` and `warmup` are shares of the training, 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    return float(peak * 0.5 * (1 + np.cos(np.pi * min(1.0, (progress - warmup) / (1 - warmup)))))


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy of (B, E) images and (B, E) texts, both normalised. Row n of both is a pair."""
    logits = logit_scale.exp() * image_features @ text_features.T  # (B, B)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def recalls(image_features: Tensor, text_features: Tensor, owner: Tensor) -> dict[str, float]:
    """R@1, 5, 10 in percent, both ways, of (N, E) images and (M, E) texts. Text m belongs to image owner[m]."""
    scores = text_features @ image_features.T  # (M, N)
    own = scores.gather(1, owner[:, None])
    text_rank = (scores > own).sum(1)
    belongs = owner == torch.arange(len(image_features))[:, None]  # (N, M)
    best = scores.T.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
    image_rank = (best < scores.T).sum(1)
    ranks = {"text_to_image": text_rank, "image_to_text": image_rank}
    return {f"{way}_R@{k}": 100 * (rank < k).float().mean().item() for way, rank in ranks.items() for k in (1, 5, 10)}


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's layout. It knows every byte; each word of the captions is one token; start and end are last."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    def tower(width: int, layers: int) -> dict[str, object]:
        heads = width // HEAD_WIDTH
        size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**size, "num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": JOINT_WIDTH}

    config = CLIPConfig(
        vision_config=tower(VISION_WIDTH, VISION_LAYERS) | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        text_config=tower(TEXT_WIDTH, TEXT_LAYERS)
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TEXT_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=JOINT_WIDTH,
        attn_implementation="eager",  # on CPU, the backward pass of sdpa is several times slower
    )
    return CLIPModel(config)


def render_corpus(count: int, folder: Path, workers: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Render `count` training scenes into `folder`, unless they are there. Returns pixels, patch labels and captions (five a scene)."""
    done = folder / f"captions-{IMAGE_SIZE}-{count}.json"
    pixels_path, patches_path = (
        folder / f"pixels-{IMAGE_SIZE}-{count}.npy",
        folder / f"patches-{IMAGE_SIZE}-{count}.npy",
    )
    if not done.exists():
        side = IMAGE_SIZE // PATCH_SIZE
        np.lib.format.open_memmap(pixels_path, "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3)).flush()
        np.lib.format.open_memmap(patches_path, "w+", np.uint8, (count, side * side, len(PATCH_FACTS))).flush()
        with ProcessPoolExecutor(workers) as pool:
            work = partial(_render_chunk, count=count, pixels_path=pixels_path, patches_path=patches_path)
            texts = [text for chunk in pool.map(work, range(0, count, CHUNK)) for text in chunk]
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(texts))
        os.replace(temporary, done)
    return np.load(pixels_path, mmap_mode="r"), np.load(patches_path, mmap_mode="r"), json.loads(done.read_text())


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> NDArray[np.int16]:
    """Token ids (texts, L), padded with the end token to the longest text."""
    ids = [
        np.array(
            tokenizer(texts[n : n + CHUNK], padding="max_length", return_attention_mask=False)["input_ids"], np.int16
        )
        for n in range(0, len(texts), CHUNK)
    ]
    together = np.concatenate(ids)
    longest = int((together != together.max()).sum(1).max()) + 1
    return together[:, :longest]


def _render_chunk(start: int, count: int, pixels_path: Path, patches_path: Path) -> list[str]:
    pixels, patches = np.load(pixels_path, mmap_mode="r+"), np.load(patches_path, mmap_mode="r+")
    texts = []
    for index in range(start, min(start + CHUNK, count)):
        scene = make_scene(TRAIN_SEED, "train", index)
        # The pictures are square, so the processor would resize in the same way and crop nothing.
        pixels[index] = np.asarray(render(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        patches[index] = patch_facts(scene)
        texts += captions(scene)
    return texts


def patch_facts(scene: Scene) -> NDArray[np.uint8]:
    """(T - 1, 3): numbers, from 1, of the shape, colour and size of the thing on each patch; 0 where there is none.

    A thing is on a patch if it covers the patch's centre or lies within the patch."""
    side = IMAGE_SIZE // PATCH_SIZE
    pitch = PICTURE / side
    centres = (np.arange(side) + 0.5) * pitch
    facts = np.zeros((side, side, len(PATCH_FACTS)), np.uint8)
    for thing in scene.things:
        rows, columns = (np.abs(centres - centre) <= max(thing.r, pitch / 2) for centre in (thing.y, thing.x))
        kind = SHAPES.index(thing.shape), COLOURS.index(thing.colour), list(RADII).index(thing.size)
        facts[np.ix_(rows, columns)] = np.array(kind) + 1
    return facts.reshape(side * side, len(PATCH_FACTS))


def batches(corpus: Corpus, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: pixel_values (B, 3, H, H), input_ids (2 B, L), patch facts (B, T - 1, 3)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    while True:
        order = rng.permutation(len(corpus.pixels))
        for start in range(0, len(order) - size + 1, size):
            rows = np.sort(order[start : start + size])
            pixels = torch.from_numpy(corpus.pixels[rows]).permute(0, 3, 1, 2)
            chosen = rng.permuted(np.tile(np.arange(corpus.input_ids.shape[1]), (size, 1)), axis=1)[:, :TEXTS]  # (B, 2)
            input_ids = corpus.input_ids[rows, chosen.T].reshape(TEXTS * size, -1)
            longest = (input_ids != corpus.input_ids.max()).sum(1).max()
            input_ids = input_ids[:, : longest + 1]  # the end token included
            patches = torch.from_numpy(corpus.patches[rows]).long()
            yield (pixels.float() / 255 - mean) / std, torch.from_numpy(input_ids).long(), patches


def train(
    model: CLIPModel, tokenizer: CLIPTokenizer, corpus: Corpus, log_path: Path, options: argparse.Namespace
) -> int:
    """Train for options.minutes; returns the number of images seen."""
    patch_head = nn.Linear(VISION_WIDTH, sum(PATCH_FACTS))
    parameters = [*model.parameters(), *patch_head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    validation = [make_scene(TRAIN_SEED, "val", index) for index in range(250)]
    start, next_check, seen = time.time(), options.check_every, 0
    with log_path.open("w") as log:

        def write(**fields: object) -> None:
            line = json.dumps({"seconds": round(time.time() - start, 1), **fields})
            print(line, file=sys.stderr)
            log.write(line + "\n")
            log.flush()

        data = batches(corpus, options.batch, np.random.default_rng(options.seed))
        for step, (pixel_values, input_ids, patches) in enumerate(data, 1):
            progress = (time.time() - start) / (60 * options.minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, options.lr)
            with torch.autocast("cpu", torch.bfloat16):
                seeing = model.vision_model(pixel_values=pixel_values)
                reading = model.text_model(input_ids=input_ids)
                image_features = F.normalize(model.visual_projection(seeing.pooler_output).float(), dim=-1)
                text_features = F.normalize(model.text_projection(reading.pooler_output).float(), dim=-1)
                facts = patch_head(seeing.last_hidden_state[:, 1:]).float()  # (B, T - 1, classes of all facts)
            pairs = [contrastive_loss(image_features, texts, model.logit_scale) for texts in text_features.chunk(TEXTS)]
            loss = torch.stack(pairs).mean()
            guesses = zip(facts.split(PATCH_FACTS, dim=-1), patches.unbind(-1), strict=True)
            loss_patch = torch.stack([F.cross_entropy(g.flatten(0, 1), truth.flatten()) for g, truth in guesses]).sum()
            optimizer.zero_grad()
            (loss + options.patch_weight * (1 - progress) * loss_patch).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100))
            seen += options.batch

            if step % 50 == 0:
                rate = round(optimizer.param_groups[0]["lr"], 7)
                write(
                    step=step, loss=round(loss.item(), 4), loss_patch=round(loss_patch.item(), 4), lr=rate, images=seen
                )
            if time.time() - start >= next_check:
                next_check += options.check_every
                write(step=step, split="val", **evaluate(model, tokenizer, image_processor(), validation))
    return seen


def image_processor() -> CLIPImageProcessorPil:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)


@torch.inference_mode()
def evaluate(
    model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil, scenes: list[Scene]
) -> dict[str, float]:
    """R@1, 5, 10 of zero-shot retrieval among the scenes and their captions, through transformers' own interface alone."""
    texts = [text for scene in scenes for text in captions(scene)]
    owner = torch.arange(len(scenes)).repeat_interleave(len(texts) // len(scenes))
    images = [
        processor([render(scene) for scene in scenes[n : n + 125]], return_tensors="pt")
        for n in range(0, len(scenes), 125)
    ]
    image_features = torch.cat([model.get_image_features(**batch).pooler_output for batch in images])
    text_batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    text_features = model.get_text_features(**text_batch).pooler_output
    measured = recalls(F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1), owner)
    return {name: round(value, 2) for name, value in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qf.data.train_clip", description="Train the small CLIP of the built-in sample."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its log and its results")
    parser.add_argument(
        "--minutes", type=float, default=19, help="training time; the schedule ends with it (default %(default)s)"
    )
    parser.add_argument("--scenes", type=int, default=80_000, help="training scenes to render (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images of a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument(
        "--patch-weight", type=float, default=0.5, help="weight of the patch loss at the start (default %(default)s)"
    )
    parser.add_argument(
        "--check-every", type=float, default=300, help="seconds between validations (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads and rendering processes (default: all cores)"
    )
    parser.add_argument(
        "--cache", type=Path, help="keep the rendered scenes here for the next run (default: a temporary folder)"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        pixels, patches, texts = render_corpus(options.scenes, cache, options.threads)
        tokenizer = train_tokenizer(texts[:100_000])
        ids = tokenise(tokenizer, texts)
        corpus = Corpus(pixels, patches, ids.reshape(len(pixels), -1, ids.shape[1]))
        model = build_model(tokenizer)
        start = time.time()
        seen = train(model, tokenizer, corpus, options.out / "train_log.jsonl", options)
    seconds = time.time() - start

    model.set_attn_implementation("sdpa")
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    image_processor().save_pretrained(options.out)
    loaded = CLIPModel.from_pretrained(options.out, dtype=torch.float32)
    test = [make_scene(0, "test", index) for index in range(500)]
    measured = evaluate(
        loaded, AutoTokenizer.from_pretrained(options.out), AutoImageProcessor.from_pretrained(options.out), test
    )
    results = {
        **measured,
        "chance_text_to_image_R@1": 100 / len(test),
        "split": "test",
        "images": len(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": seen,
        "seconds": round(seconds),
        "images_per_second": round(seen / seconds, 1),
        "threads": options.threads,
        "command": f"python -m qf.data.train_clip --out data/clip --minutes {options.minutes:g} --scenes {options.scenes}"
        f" --batch {options.batch} --lr {options.lr:g} --patch-weight {options.patch_weight:g} --seed {options.seed}",
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
