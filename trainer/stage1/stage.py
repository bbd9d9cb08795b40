"""Stage 1 on cached features: set up, then a page of straight code.

A run folder holds config.json from the start and manifest.json from the end; in between, the same command goes on from the
last checkpoint, to the bit on a CPU: batches are a function of the step, and all that is random is, too."""

import json
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...pipeline.artifacts import (
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
from ...pipeline.device import resolve_precision
from ...pipeline.errors import ArtifactError, TrainingError
from ...pipeline.features.reader import Features
from ...pipeline.formatting import counted
from ..config import PRESETS, Stage1Config
from ..distributed.processes import ALONE, Processes
from ..loader.batches import Batches, Source
from ..loader.cache import cached
from ..manifest import RUN
from ..metrics.retrieval import mean_recall_at_1, recalls, retrieval
from ..objectives import LOSSES
from ..qformer import QFormer
from ..runs.checkpoints import BEST, load_checkpoint, load_info, save_checkpoint, save_tensors, steps
from ..runs.curves import draw_curves
from ..runs.log import TENSORBOARD, Log, Report, read_log, summary_writer
from ..tokens import Tokens
from ..weights.names import load_tensors
from ..weights.start import make_model
from .embedder import Embedder, rerank, similarity_matrix
from .step import Stage1, StepPlan, backward

FEW_STEPS = 200
MATCHED_TEXTS, MATCHED_AT = 250, 16  # of validation: how many texts are matched, with how many images each


def learning_rate(step: int, total: int, config: Stage1Config) -> float:
    """Linear warm-up, then half a cosine down to `min_lr`: a function of the step alone."""
    warmup = min(config.warmup_steps, total // 4)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def contrast_steps(total: int, config: Stage1Config) -> int:
    """How many of the first steps train the contrast alone."""
    return int(config.contrast_first * total)


def losses_at(step: int, total: int, config: Stage1Config) -> list[str]:
    """The losses of a step: at first the contrast alone, if `contrast_first` says so and it is among them."""
    names = chosen_losses(config)
    return names[:1] if names[0] == "loss_itc" and step < contrast_steps(total, config) else names


def hardness(step: int, total: int, config: Stage1Config) -> float:
    """The share of hard negatives for matching: from 0 (drawn evenly) to 1 (as BLIP-2 draws them), by the step alone.

    From hard negatives alone matching never leaves its prior on small data; see benchmarks/results.md."""
    begin = contrast_steps(total, config)
    ramp = config.easy_negatives * (total - begin)
    return min(1.0, max(0, step - begin) / ramp) if ramp else 1.0


def chosen_losses(config: Stage1Config) -> list[str]:
    """The losses that the run sums, in the order of LOSSES."""
    chosen = [f"loss_{name.strip()}" for name in config.losses.split(",")]
    if not set(chosen) <= set(LOSSES):
        raise TrainingError(f"--losses {config.losses}: use some of itc,itm,itg")
    return [name for name in LOSSES if name in chosen]


def make_optimizer(model: QFormer, config: Stage1Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


@dataclass(frozen=True)
class RetrievalSet:
    """The images and captions that R@K is measured on."""

    rows: np.ndarray
    texts: list[str]
    image_rows: Tensor  # (M,) position in `rows` of each text's image

    @classmethod
    def of(cls, features: Features, split: str, limit: int | None = None) -> "RetrievalSet":
        """All captions of the first `limit` images of a split."""
        rows = features.rows(split)[:limit]
        texts = [caption for row in rows for caption in features.captions[row]]
        return cls(
            rows,
            texts,
            torch.tensor([n for n, row in enumerate(rows) for _ in features.captions[row]], dtype=torch.long),
        )


def validate(embedder: Embedder, features: Features, validation: RetrievalSet, match: bool) -> dict[str, float]:
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
    config: Stage1Config,
    device: torch.device,
    overwrite: bool = False,
    report: Report = lambda line, total: None,
    processes: Processes = ALONE,
    *,
    cache_on_device: bool = False,
    say: Callable[[str], None] = lambda text: None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train a Q-Former into the run `folder` and return a summary (fields of contract 2). An unfinished run goes on.

    All `processes` call it; the first one writes and reports. What follows is no part of what the run is: `cache_on_device`
    keeps the features in memory, which changes nothing but the speed, and `say` is told where; `tensorboard` writes the
    scalars of metrics.jsonl for TensorBoard, too.

    ArtifactError if the folder holds a run made otherwise; TrainingError if the features are too few, the batch cannot be
    split over the processes, or training diverges."""
    dtype = resolve_precision(config.precision, device)
    if dtype == torch.float16:
        raise TrainingError("--precision float16 cannot train (its gradients underflow); use bfloat16 or float32")
    chosen_losses(config)
    if config.preset not in PRESETS:
        raise TrainingError(f"--preset {config.preset}: use {', '.join(PRESETS)}")
    contrasted = config.contrastive_batch or config.batch_size
    if config.batch_size % processes.count or contrasted % config.batch_size:
        raise TrainingError(
            f"--batch-size {config.batch_size} must be a multiple of the number of processes, {processes.count}, "
            f"and --contrastive-batch {contrasted} a multiple of --batch-size"
        )
    if not math.isfinite(config.epochs):
        raise TrainingError(f"--epochs {config.epochs}: give a number")
    if config.patience and not len(features.rows("val")):
        raise TrainingError(
            f"--patience {config.patience}: {features.folder} has no images in the split val to judge by"
        )
    writer = summary_writer() if tensorboard and processes.first else None
    settings = json.loads(json.dumps({"train": asdict(config), "features": features.identity, "precision": str(dtype)}))
    with locked(folder) if processes.first else nullcontext():
        finished = processes.first and _finished(folder, settings, overwrite)
        if finished:
            say(f"{folder} is finished: nothing to train; --overwrite trains it anew")
        if not processes.agree(finished, device):
            torch.manual_seed(config.seed)
            rows = features.rows("train")
            model, tokens = make_model(config, features, [text for row in rows for text in features.captions[row]])
            cache = partial(cached, processes=processes.count, say=say) if cache_on_device else None
            batches = None
            if config.epochs:
                model = model.to(device)  # before the features may take what is free there
                batches = make_batches(config, features, rows, tokens, device, processes, cache)
            if processes.first:
                if overwrite or not steps(folder / "checkpoints"):
                    _clear(folder)
                write_json(folder / "config.json", settings)
                tokens.save(folder / "tokenizer.json")
            processes.agree(True, device)  # the others wait for that
            open_log = partial(Log, report=report, writer=writer)
            if batches:
                embedder = Embedder(model, tokens, device, dtype, config.max_text_length)
                _train(features, folder, config, embedder, batches, processes, open_log, say)
            elif processes.first:  # the weights as they came
                with open_log(folder, 0, 0.0, 0):
                    _finish(folder, model, features, config)
        processes.agree(True, device)  # and for the manifest
        return _summary(folder, read_manifest(folder, RUN))


def _finished(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run is there already and stays. ArtifactError if it is another one, finished or with a checkpoint."""
    if overwrite:
        return False
    if has_manifest(folder) or steps(folder / "checkpoints"):
        changed = difference(read_json(folder / "config.json"), settings)
        if changed:
            if changed.startswith("features "):
                changed = "the features are not the same any more"
            raise ArtifactError(
                f"run {folder} was made otherwise: {changed}; choose another --name, or replace it with --overwrite"
            )
    return has_manifest(folder)


def _clear(folder: Path) -> None:
    """Take away a run. Wherever that is interrupted, what is left is unfinished, and no checkpoint outlives its settings."""
    config, insides = folder / "config.json", [*folder.glob("checkpoints/*"), *folder.glob(f"{TENSORBOARD}/*")]
    others = [path for path in folder.glob("*.*") if path.name != LOCK and path != config]
    for path in [folder / MANIFEST, *insides, *others, config]:
        path.unlink(missing_ok=True)


def make_batches(
    config: Stage1Config,
    features: Features,
    rows: np.ndarray,
    tokens: Tokens,
    device: torch.device,
    processes: Processes,
    cache: Callable[..., Source | None] | None,
) -> Batches:
    """The batches of a run for this process; TrainingError as of `Batches`."""
    return Batches(
        features,
        rows,
        tokens,
        batch_size=config.contrastive_batch or config.batch_size,
        captions_per_image=config.captions_per_image,
        matched_captions=config.matched_captions,
        max_text_length=config.max_text_length,
        seed=config.seed,
        shuffle_window=config.shuffle_window,
        part_size=config.batch_size // processes.count,
        rank=processes.rank,
        world_size=processes.count,
        device=device,
        source=cache(features, rows, device) if cache else None,
    )


def _train(
    features: Features,
    folder: Path,
    config: Stage1Config,
    embedder: Embedder,
    batches: Batches,
    processes: Processes,
    open_log: Callable[..., Log],
    say: Callable[[str], None],
) -> None:
    model, device = embedder.model, embedder.device
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        model.compile_blocks()
    optimizer = make_optimizer(model, config)
    validation = RetrievalSet.of(features, "val", config.max_val_images)
    steps_per_epoch = batches.steps_per_epoch / config.accumulate
    total = max(1, round(config.epochs * steps_per_epoch))
    validate_every = config.validate_every or max(1, round(steps_per_epoch))
    names = chosen_losses(config)
    stage: nn.Module = Stage1(model, processes, embedder.dtype, config.token_dropout, config.seed)
    stage = processes.wrap(stage, all_used=names == list(LOSSES) and not contrast_steps(total, config))

    checkpoints = folder / "checkpoints"
    so_far = Progress()
    if saved := steps(checkpoints):
        so_far = Progress(**load_checkpoint(saved[-1], model, optimizer, device))
    start, began = so_far.step, time.perf_counter() - so_far.seconds
    say(_outlook(batches, config, total, start))
    means = _Means(names, device)
    last, last_pairs, last_waited = time.perf_counter(), so_far.pairs, so_far.waited
    source = closing(batches.steps(start * config.accumulate, total * config.accumulate))
    logged = open_log(folder, start, so_far.seconds, total) if processes.first else nullcontext()
    with source as feed, logged as log:
        for step in range(start, total):
            if out_of_patience(so_far.stale, config):
                break
            # ---- one step --------------------------------------------------------------------------------------------
            lr = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            active = losses_at(step, total, config)
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                asked = time.perf_counter()
                batch = next(feed)
                so_far.waited += time.perf_counter() - asked
                moment = StepPlan(number, active, hardness(step, total, config))
                final = number + 1 == (step + 1) * config.accumulate
                means.add(backward(stage, batch, moment, 1 / config.accumulate, final), 1 / config.accumulate)
                so_far.pairs += len(batch.input_ids)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            means.gradient += grad_norm
            optimizer.step()
            optimizer.zero_grad()
            # ------------------------------------------------------------------------------------------------------------
            done = so_far.step = step + 1
            validate_now = len(validation.rows) > 0 and (done % validate_every == 0 or done == total)
            log_now, save_now = done % config.log_every == 0, done % config.checkpoint_every == 0

            if validate_now or log_now or save_now or done == total:  # once in a while: are these still numbers?
                refuse_divergence(done, config, names, means.sums(), model)

            if validate_now:  # once in a while: how good are we?
                paused = time.perf_counter()
                if processes.first:
                    metrics = validate(embedder, features, validation, "loss_itm" in active)
                    better = active == names and mean_recall_at_1(metrics) > so_far.best
                    if better:
                        so_far.best, so_far.stale = mean_recall_at_1(metrics), 0
                        checkpoints.mkdir(exist_ok=True)
                        save_tensors(checkpoints / BEST, model.state_dict(), {"step": done, **metrics})
                    elif active == names:
                        so_far.stale += 1
                so_far.stale = processes.number(so_far.stale, device)
                last += time.perf_counter() - paused  # the rate is that of training alone

            ends = done == total or out_of_patience(so_far.stale, config)
            if log_now or ends:  # once in a while: say where we are
                losses = means.take(processes)
                now = time.perf_counter()
                line = {
                    "step": done,
                    "epoch": round(done / steps_per_epoch, 3),
                    "loss": round(sum(losses.values()), 5),
                    **{name: round(losses[name], 5) if name in losses else None for name in LOSSES},
                    "lr": lr,
                    "grad_norm": round(grad_norm.item(), 4),
                    "pairs_per_second": round((so_far.pairs - last_pairs) / (now - last), 1),
                    "wait_share": round((so_far.waited - last_waited) / (now - last), 4),
                    "seconds": round(now - began, 2),
                }
                if log:
                    log.write(line)
                last, last_pairs, last_waited = now, so_far.pairs, so_far.waited
            if validate_now and log:
                log.write({"step": done, "split": "val", **metrics, "best": better})

            so_far.seconds = time.perf_counter() - began
            if (save_now or ends) and processes.first:  # once in a while: a place to come back to
                save_checkpoint(checkpoints, model, optimizer, asdict(so_far), config.keep)

    if processes.first:
        _finish(folder, model, features, config, so_far, total, steps_per_epoch)


def _outlook(batches: Batches, config: Stage1Config, total: int, start: int) -> str:
    """What training is about to do, in words."""
    step = batches.batch_size * config.accumulate
    text = f"training on {len(batches.counts):,} images, {step:,} a step: {counted(total, 'step')}"
    if start:
        text += f", of which {start:,} are done"
    if total < FEW_STEPS:
        options = {"--accumulate": config.accumulate > 1, "--contrastive-batch": config.contrastive_batch}
        smaller = next((option for option, given in options.items() if given), "--batch-size")
        text += f"; so few teach it little: more --epochs or a smaller {smaller} make more"
    return text


@dataclass
class Progress:
    """How far training is; saved in checkpoints."""

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of the seconds, for data
    pairs: int = 0
    best: float = -1.0  # mean R@1
    stale: int = 0  # validations since the best


class _Means:
    """The losses since the last line of the log, summed on the device, and the norms of the gradient."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self._begin()

    def _begin(self) -> None:
        self.losses = {name: torch.zeros((), device=self.device) for name in self.names}
        self.weights = dict.fromkeys(self.names, 0.0)
        self.gradient = torch.zeros((), device=self.device)

    def add(self, shares: dict[str, Tensor], weight: float) -> None:
        """This process's share of the losses of a batch that counts `weight`."""
        for name, share in shares.items():
            self.losses[name] += weight * share
            self.weights[name] += weight

    def sums(self) -> Tensor:
        """(losses + 1,): this process's share of each loss, and the gradient's norm."""
        return torch.stack([*self.losses.values(), self.gradient])

    def take(self, processes: Processes) -> dict[str, float]:
        """The mean of each loss that there was; begins anew. Waits for the device."""
        sums = dict(zip(self.names, processes.total(self.sums()).tolist(), strict=False))
        means = {name: sums[name] / weight for name, weight in self.weights.items() if weight}
        self._begin()
        return means


def out_of_patience(stale: int, config: Stage1Config) -> bool:
    """Whether training stops after `stale` validations without a better mean R@1."""
    return 0 < config.patience <= stale


def refuse_divergence(step: int, config: Stage1Config, names: list[str], sums: Tensor, model: QFormer) -> None:
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
    config: Stage1Config,
    progress: Progress | None = None,
    total: int = 0,
    steps_per_epoch: float = 1.0,
) -> None:
    """The best weights become the run's, the curves are drawn, the manifest is written."""
    progress = progress or Progress()
    best: dict[str, Any] = {}
    if (folder / "checkpoints" / BEST).is_file():
        best = load_info(folder / "checkpoints" / BEST)
        model.load_state_dict(load_tensors(folder / "checkpoints" / BEST))
    save_tensors(folder / "model.safetensors", model.state_dict(), best)
    lines = list(read_log(folder / "metrics.jsonl"))
    with atomic_file(folder / "loss.png") as file:
        draw_curves(lines, file)
    files = [
        described(folder / name) for name in ("model.safetensors", "tokenizer.json", "config.json", "metrics.jsonl")
    ]
    write_manifest(
        folder,
        RUN,
        {
            "stage": 1,
            "model": asdict(model.config),
            "train": asdict(config),
            "encoder": features.encoder,
            "features": {"path": str(features.folder.resolve()), "identity": features.identity},
            "sha256": files[0]["sha256"],
            "files": files,
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "steps": progress.step,
            "planned_steps": total,
            "stopped": f"validation R@1 got no better, --patience {config.patience}" if progress.step < total else None,
            "epochs": round(progress.step / steps_per_epoch, 3),
            "pairs_per_second": round(progress.pairs / max(progress.seconds, 1e-9), 1),
            "seconds": round(progress.seconds, 2),
            "wait_share": round(progress.waited / max(progress.seconds, 1e-9), 4),
            "loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
            "best": best,
        },
    )


def _summary(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("steps", "planned_steps", "stopped", "epochs", "pairs_per_second", "seconds", "wait_share", "loss", "best")
    return {**{name: manifest[name] for name in names}, "run": str(folder)}
