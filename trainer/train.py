"""Stage 1 on cached features: set up, then a page of straight code.

A run folder holds config.json from the start and manifest.json from the end; in between, the same command goes on from the
last checkpoint, to the bit on a CPU: batches are a function of the step, and checkpoints hold the random state."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipeline.artifacts import (
    LOCK,
    MANIFEST,
    atomic_file,
    described,
    difference,
    has_manifest,
    locked,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from ..pipeline.codecs import decode
from ..pipeline.device import autocast, resolve_precision
from ..pipeline.encoders import encoder_folder
from ..pipeline.errors import ArtifactError, EncoderError, TrainingError
from ..pipeline.features import Features
from .batches import Batches
from .checkpoints import BEST, load_checkpoint, load_info, save_checkpoint, save_tensors, steps
from .config import PRESETS, QFormerConfig, TrainConfig
from .curves import draw_curves
from .embed import Embedder, rerank, similarity_matrix
from .log import TENSORBOARD, Log, Report, summary_writer
from .metrics import mean_recall_at_1, recalls, retrieval
from .objectives import LOSSES, stage1_losses
from .qformer import QFormer
from .tokens import Tokens
from .weights import bert_sizes, load_bert, load_qformer, load_tensors

MATCHED_TEXTS, MATCHED_AT = 250, 16  # of validation: how many texts are matched, with how many images each


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to `min_lr`: a function of the step alone."""
    warmup = min(config.warmup_steps, total // 4)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def drop_tokens(image_embeds: Tensor, share: float) -> Tensor:
    """(B, T, W) -> (B, the rest of T, W): a random share of the tokens left out, the same for the whole batch.

    Masking patches as FLIP does (Li et al. 2023, arXiv:2212.00794), here against overfitting of small datasets."""
    if share == 0:
        return image_embeds
    count = image_embeds.shape[1]
    kept = torch.randperm(count, device=image_embeds.device)[: max(1, round(count * (1 - share)))]
    return image_embeds[:, kept]


def contrast_steps(total: int, config: TrainConfig) -> int:
    """How many of the first steps train the contrast alone."""
    return int(config.contrast_first * total)


def losses_at(step: int, total: int, config: TrainConfig) -> list[str]:
    """The losses of a step: at first the contrast alone, if `contrast_first` says so and it is among them."""
    names = chosen_losses(config)
    return names[:1] if names[0] == "loss_itc" and step < contrast_steps(total, config) else names


def hardness(step: int, total: int, config: TrainConfig) -> float:
    """The share of hard negatives for matching: from 0 (drawn evenly) to 1 (as BLIP-2 draws them), by the step alone.

    From hard negatives alone matching never leaves its prior on small data; see benchmarks/results.md."""
    begin = contrast_steps(total, config)
    ramp = config.easy_negatives * (total - begin)
    return min(1.0, max(0, step - begin) / ramp) if ramp else 1.0


def chosen_losses(config: TrainConfig) -> list[str]:
    """The losses that the run sums, in the order of LOSSES."""
    chosen = [f"loss_{name.strip()}" for name in config.losses.split(",")]
    if not set(chosen) <= set(LOSSES):
        raise TrainingError(f"--losses {config.losses}: use some of itc,itm,itg")
    return [name for name in LOSSES if name in chosen]


def make_optimizer(model: QFormer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def make_model(config: TrainConfig, features: Features, captions: list[str]) -> tuple[QFormer, Tokens]:
    """A new Q-Former for these features, with its tokenizer: random, from a run, or from a BERT (`config.init`)."""
    width = features.encoder["width"]
    sizes: dict[str, Any] = dict(PRESETS[config.preset])
    if config.init is not None:
        folder = _init_folder(config.init)
        if has_manifest(folder):
            return _from_run(folder, width, config.dropout), Tokens.load(folder / "tokenizer.json")
        bert = read_json(folder / "config.json")
        if bert.get("model_type") != "bert":
            raise TrainingError(
                f"--init {config.init}: a model of type {bert.get('model_type')!r}; use a run or a BERT"
            )
        sizes |= bert_sizes(bert)
        tokens = Tokens.load(folder / "tokenizer.json")
    else:
        tokens = Tokens.train(captions, config.vocab_size)
    if config.num_query_tokens is not None:
        sizes["num_query_tokens"] = config.num_query_tokens
    model = QFormer(
        QFormerConfig(
            vocab_size=len(tokens),
            encoder_hidden_size=width,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            **sizes,
        )
    )
    if config.init is not None:
        load_bert(model, folder)
    return model, tokens


def _init_folder(name: str) -> Path:
    try:
        return encoder_folder(name)
    except EncoderError as error:
        raise TrainingError(f"--init {name}: no such run, BERT folder or id that can be fetched") from error


def _from_run(folder: Path, width: int, dropout: float) -> QFormer:
    trained = load_qformer(folder)
    if trained.config.encoder_hidden_size != width:
        raise TrainingError(
            f"--init {folder} was trained on features {trained.config.encoder_hidden_size} wide; these are {width} wide"
        )
    model = QFormer(replace(trained.config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    model.load_state_dict(trained.state_dict())
    return model


@dataclass(frozen=True)
class Validation:
    """The images and captions that R@K is measured on."""

    rows: np.ndarray
    texts: list[str]
    image_rows: Tensor  # (M,) position in `rows` of each text's image

    @classmethod
    def of(cls, features: Features, split: str, limit: int | None = None) -> "Validation":
        """All captions of the first `limit` images of a split."""
        rows = features.rows(split)[:limit]
        texts = [caption for row in rows for caption in features.captions[row]]
        return cls(
            rows,
            texts,
            torch.tensor([n for n, row in enumerate(rows) for _ in features.captions[row]], dtype=torch.long),
        )


def validate(embedder: Embedder, features: Features, validation: Validation, match: bool) -> dict[str, float]:
    """R@K of the contrastive scores, both ways; with `match` also text to image after matching, on a part of the texts."""
    images = embedder.images(features, validation.rows)
    scores = similarity_matrix(images, embedder.texts(validation.texts))  # (N, M)
    metrics = retrieval(scores, validation.image_rows)
    if match:
        some = torch.arange(0, scores.shape[1], max(1, scores.shape[1] // MATCHED_TEXTS))
        scores = scores.T[some]  # (m, N)
        candidates = scores.topk(min(MATCHED_AT, scores.shape[1])).indices
        pairs = torch.stack([candidates.flatten(), some.repeat_interleave(candidates.shape[1])], 1)
        matching = embedder.matching(features, validation.rows, validation.texts, pairs.numpy()).view_as(candidates)
        relevant = validation.image_rows[some, None] == torch.arange(scores.shape[1])
        metrics |= recalls(rerank(scores, candidates, matching), relevant, "reranked_text_to_image")
    return metrics


def train(
    features: Features,
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    overwrite: bool = False,
    report: Report = lambda line, total: None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train a Q-Former into the run `folder` and return a summary (fields of contract 2). An unfinished run goes on.

    `tensorboard` writes the scalars of metrics.jsonl for TensorBoard, too; like `report` it is no part of what the run is.

    ArtifactError if the folder holds a run made otherwise; TrainingError if the features are too few or a loss is not finite."""
    dtype = resolve_precision(config.precision, device)
    if dtype == torch.float16:
        raise TrainingError("--precision float16 cannot train (its gradients underflow); use bfloat16 or float32")
    chosen_losses(config)
    if config.preset not in PRESETS:
        raise TrainingError(f"--preset {config.preset}: use {', '.join(PRESETS)}")
    if config.patience and not len(features.rows("val")):
        raise TrainingError(
            f"--patience {config.patience}: {features.folder} has no images in the split val to judge by"
        )
    writer = summary_writer() if tensorboard else None
    settings = json.loads(json.dumps({"train": asdict(config), "features": features.identity, "precision": str(dtype)}))
    with locked(folder):
        if _finished(folder, settings, overwrite):
            return _summary(folder, read_manifest(folder, "run"))
        write_json(folder / "config.json", settings)
        return _train(features, folder, config, device, dtype, report, writer)


def _finished(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run is there already. Clears it for --overwrite; ArtifactError if it is another one."""
    if overwrite:
        for path in [
            folder / MANIFEST,
            *folder.glob("*.*"),
            *folder.glob("checkpoints/*"),
            *folder.glob(f"{TENSORBOARD}/*"),
        ]:
            if path.name != LOCK:
                path.unlink(missing_ok=True)
    elif (folder / "config.json").is_file():
        changed = difference(read_json(folder / "config.json"), settings)
        if changed:
            raise ArtifactError(
                f"run {folder} was made otherwise: {changed}; choose another --name, or replace it with --overwrite"
            )
    return has_manifest(folder)


def _train(
    features: Features,
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    writer: type | None,
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    rows = features.rows("train")
    model, tokens = make_model(config, features, [c for row in rows for c in features.captions[row]])
    model = model.to(device)
    optimizer = make_optimizer(model, config)
    batches = Batches(
        features,
        rows,
        tokens,
        batch_size=config.batch_size,
        captions_per_image=config.captions_per_image,
        matched_captions=config.matched_captions,
        max_text_length=config.max_text_length,
        seed=config.seed,
    )
    embedder = Embedder(model, tokens, device, dtype, config.max_text_length)
    validation = Validation.of(features, "val", config.max_val_images)
    total = max(1, round(config.epochs * batches.steps_per_epoch))
    validate_every = config.validate_every or batches.steps_per_epoch
    tokens.save(folder / "tokenizer.json")

    checkpoints = folder / "checkpoints"
    start, seconds, best, stale, pairs = 0, 0.0, -1.0, 0, 0  # stale: validations since the best
    if saved := steps(checkpoints):
        info = load_checkpoint(saved[-1], model, optimizer, device)
        start, seconds, best, stale, pairs = (info[name] for name in ("step", "seconds", "best", "stale", "pairs"))

    began = time.perf_counter() - seconds
    names = chosen_losses(config)
    # of the losses and, last, of the gradient's norm, since the last line of the log
    sums, counts = torch.zeros(len(names) + 1, device=device), [0] * len(names)
    last, last_pairs, done = time.perf_counter(), pairs, start
    with Log(folder, start, seconds, total, report, writer) as log:
        for step, batch in enumerate(batches.steps(start, total), start=start):
            if out_of_patience(stale, config):
                break
            # ---- one step --------------------------------------------------------------------------------------------
            lr = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = batch.to(device)
            model.train()
            active = losses_at(step, total, config)
            with autocast(device, dtype):
                losses = stage1_losses(
                    model,
                    drop_tokens(decode(batch.encoded), config.token_dropout),
                    batch.input_ids,
                    batch.attention_mask,
                    image_rows=batch.image_rows,
                    losses=active,
                    matched=batch.matched,
                    hardness=hardness(step, total, config),
                )
            torch.stack([losses[name] for name in active]).sum().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            for number, name in enumerate(names):
                if name in active:
                    sums[number] += losses[name].detach()
                    counts[number] += 1
            sums[-1] += grad_norm
            pairs += len(batch.input_ids)
            # ------------------------------------------------------------------------------------------------------------
            done = step + 1

            validate_now = len(validation.rows) > 0 and (done % validate_every == 0 or done == total)
            log_now, save_now = done % config.log_every == 0, done % config.checkpoint_every == 0

            if validate_now or log_now or save_now or done == total:  # once in a while: are these still numbers?
                refuse_divergence(done, config, names, sums, model)

            if validate_now:  # once in a while: how good are we?
                paused = time.perf_counter()
                metrics = validate(embedder, features, validation, "loss_itm" in active)
                better = active == names and mean_recall_at_1(metrics) > best
                if better:
                    best, stale = mean_recall_at_1(metrics), 0
                    checkpoints.mkdir(exist_ok=True)
                    save_tensors(checkpoints / BEST, model.state_dict(), {"step": done, **metrics})
                elif active == names:
                    stale += 1
                last += time.perf_counter() - paused  # the rate is that of training alone

            ends = done == total or out_of_patience(stale, config)
            if log_now or ends:  # once in a while: say where we are
                means = {n: s / c for n, s, c in zip(names, sums.tolist(), counts, strict=False) if c}
                now = time.perf_counter()
                log.write(
                    {
                        "step": done,
                        "epoch": round(done / batches.steps_per_epoch, 3),
                        "loss": round(sum(means.values()), 5),
                        **{name: round(value, 5) for name, value in means.items()},
                        "lr": lr,
                        "grad_norm": round(grad_norm.item(), 4),
                        "pairs_per_second": round((pairs - last_pairs) / (now - last), 1),
                        "seconds": round(now - began, 2),
                    }
                )
                sums.zero_()
                counts = [0] * len(names)
                last, last_pairs = now, pairs
            if validate_now:
                log.write({"step": done, "split": "val", **metrics, "best": better})

            if save_now or ends:  # once in a while: a place to come back to
                seconds = time.perf_counter() - began
                info = {"step": done, "seconds": seconds, "best": best, "stale": stale, "pairs": pairs}
                save_checkpoint(checkpoints, model, optimizer, info, config.keep)

    seconds = time.perf_counter() - began
    return _finish(folder, model, features, config, done, total, batches.steps_per_epoch, pairs, seconds)


def out_of_patience(stale: int, config: TrainConfig) -> bool:
    """Whether training stops after `stale` validations without a better mean R@1."""
    return 0 < config.patience <= stale


def refuse_divergence(step: int, config: TrainConfig, names: list[str], sums: Tensor, model: QFormer) -> None:
    """TrainingError if a loss or gradient since the last line of the log (`sums`), or a weight now, is no number. Waits for
    the device."""
    weights = torch.nn.utils.get_total_norm(p.detach() for p in model.parameters())
    fine = torch.cat([sums, weights[None]]).isfinite().tolist()
    wrong = [what for what, well in zip([*names, "the gradient", "a weight"], fine, strict=True) if not well]
    if wrong:
        raise TrainingError(
            f"training diverged: {wrong[0]} is no longer a number at step {step}; start again with --overwrite and a lower "
            f"--lr (now {config.lr:g}) or --precision float32, if `qf verify` finds the features sound"
        )


def _finish(
    folder: Path,
    model: QFormer,
    features: Features,
    config: TrainConfig,
    done: int,
    total: int,
    steps_per_epoch: int,
    pairs: int,
    seconds: float,
) -> dict[str, Any]:
    """The best weights become the run's, the curves are drawn, the manifest is written."""
    best: dict[str, Any] = {}
    if (folder / "checkpoints" / BEST).is_file():
        best = load_info(folder / "checkpoints" / BEST)
        model.load_state_dict(load_tensors(folder / "checkpoints" / BEST))
    save_tensors(folder / "model.safetensors", model.state_dict(), best)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with atomic_file(folder / "loss.png") as file:
        draw_curves(lines, file)
    files = [
        described(folder / name) for name in ("model.safetensors", "tokenizer.json", "config.json", "metrics.jsonl")
    ]
    write_manifest(
        folder,
        "run",
        {
            "stage": 1,
            "model": asdict(model.config),
            "train": asdict(config),
            "encoder": features.encoder,
            "features": {"path": str(features.folder.resolve()), "identity": features.identity},
            "sha256": files[0]["sha256"],
            "files": files,
            "steps": done,
            "planned_steps": total,
            "stopped": f"validation R@1 got no better, --patience {config.patience}" if done < total else None,
            "epochs": round(done / steps_per_epoch, 3),
            "pairs_per_second": round(pairs / seconds, 1),
            "seconds": round(seconds, 2),
            "loss": next(line["loss"] for line in reversed(lines) if "loss" in line),
            "best": best,
        },
    )
    return _summary(folder, read_manifest(folder, "run"))


def _summary(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("steps", "planned_steps", "stopped", "epochs", "pairs_per_second", "seconds", "loss", "best")
    return {**{name: manifest[name] for name in names}, "run": str(folder)}
