"""Stage 1 on cached features: what it gives to the loop, and `train`, which takes a run from its settings to its manifest."""

import math
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ...pipeline.errors import TrainingError
from ...pipeline.features.reader import Features
from ...pipeline.formatting import counted
from ...pipeline.results import OnStatus, no_status
from ..config import PRESETS, QFormerConfig, Stage1Config
from ..distributed.processes import ALONE, Processes
from ..loader.batches import Batch, Batches
from ..loader.cache import Cache, cached
from ..loop import planned_steps
from ..manifest import TOKENIZER
from ..metrics.retrieval import RetrievalSet, mean_recall_at_1, recalls, retrieval
from ..objectives import LOSS_TEACH, LOSSES
from ..qformer import QFormer
from ..runs.folder import Trained, begin, finish
from ..runs.log import Report, no_report, summary_writer
from ..session import conduct, run_lock, trained, training_precision
from ..tokens import Tokens
from ..weights.start import find_start
from .embedder import Embedder, rerank, similarity_matrix
from .plan import chosen_losses, itc_only_steps, losses_at, plan
from .step import Stage1Step, backward
from .teacher import SpaceTeacher, find_teacher, resolve_teacher

FEW_STEPS = 200  # fewer steps than these are worth a hint
MATCHED_TEXTS, MATCHED_IMAGES = 250, 16  # validation re-ranks about so many texts, with so many images for each


class Stage1:
    """Stage 1 for `loop.train_stage`: the Q-Former alone, trained with ITC, ITM and ITG."""

    def __init__(
        self, features: Features, config: Stage1Config, embedder: Embedder, batches: Batches, processes: Processes
    ) -> None:
        self.features, self.config, self.embedder, self.source = features, config, embedder, batches
        self.model, self.batches_per_epoch = embedder.model, batches.per_epoch
        self.losses = LOSSES if batches.teacher is None else (*LOSSES, LOSS_TEACH)
        self.total = planned_steps(batches.per_epoch, config)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            self.model.compile_blocks()
        self.validation = RetrievalSet.of(features, "val", config.max_val_images)
        self.validates = len(self.validation.rows) > 0
        step = Stage1Step(self.model, processes, embedder.dtype, config.token_dropout, config.seed)
        all_losses = chosen_losses(config) == list(LOSSES) and not itc_only_steps(self.total, config)
        self.module = processes.wrap(step, all_used=all_losses)

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """See `loop.Stage`."""
        return self.source.between(start, stop)

    def step(self, batch: Batch, number: int, weight: float, last: bool) -> dict[str, Tensor]:
        """See `loop.Stage`."""
        return backward(self.module, batch, plan(number, self.total, self.config), weight, last)

    def validate(self, step: int) -> dict[str, float]:
        """R@K of ITC, both ways; where ITM is trained, also text to image after re-ranking, for some of the texts."""
        embedder, data = self.embedder, self.validation
        images = embedder.images(self.features, data.rows)
        scores = similarity_matrix(images, embedder.texts(data.texts))  # (N, M)
        metrics = retrieval(scores, data.image_rows)
        if "loss_itm" in losses_at(step, self.total, self.config):
            some = torch.arange(0, scores.shape[1], max(1, scores.shape[1] // MATCHED_TEXTS))
            scores = scores.T[some]  # (m, N)
            candidates = scores.topk(min(MATCHED_IMAGES, scores.shape[1])).indices
            pairs = torch.stack([candidates.flatten(), some.repeat_interleave(candidates.shape[1])], 1)
            matching = embedder.matching(self.features, data.rows, data.texts, pairs.numpy()).view_as(candidates)
            relevant = data.image_rows[some, None] == torch.arange(scores.shape[1])
            metrics |= recalls(rerank(scores, candidates, matching), relevant, "reranked_text_to_image")
        return metrics

    def better(self, step: int, metrics: dict[str, float]) -> float | None:
        """The mean R@1; None while ITC trains alone, because weights of all losses are what the run is for."""
        if losses_at(step, self.total, self.config) != chosen_losses(self.config):
            return None
        return mean_recall_at_1(metrics)


def train(
    features: Features,
    folder: Path,
    config: Stage1Config,
    device: torch.device,
    overwrite: bool = False,
    report: Report = no_report,
    processes: Processes = ALONE,
    *,
    cache_on_device: bool = False,
    say: Callable[[str], None] = lambda text: None,
    tensorboard: bool = False,
    progress: OnStatus = no_status,
) -> Trained:
    """Train a Q-Former into the run `folder`, or resume it there. Returns the result, also of a run that is finished already.

    All `processes` call it; rank 0 writes, and calls `report` with each line of the log, `say` with other messages and
    `progress` while captions are embedded for a teacher.
    `cache_on_device` keeps the features in memory and `tensorboard` writes the log for TensorBoard; neither changes the run.

    With `overwrite` a run that is there stays until the new one is finished.

    ArtifactError if the folder holds a run with other settings. TrainingError if the features are too few, if the processes
    cannot share a batch, or if training diverges."""
    _check(features, config, processes)
    writer = summary_writer() if tensorboard and processes.first else None

    def run(place: Path) -> None:
        teacher = _teacher(features, config, device, processes, say, progress)
        torch.manual_seed(config.seed)
        model, tokens = make_model(features, config, teacher)
        stage = None
        if config.epochs:
            model = model.to(device)  # before the cached features take what is free there
            cache = None
            if cache_on_device:
                cache = cached(features, features.rows("train", captioned=True), device, processes.count, say)
            batches = make_batches(features, config, tokens, device, processes, cache, teacher)
            embedder = Embedder(model, tokens, device, dtype, config.max_text_length)
            stage = Stage1(features, config, embedder, batches, processes)
        if processes.first:
            begin(place, settings)
            tokens.save(place / TOKENIZER)
        processes.agree(True, device)  # all ranks wait until the place is ready
        state, total, steps_per_epoch = trained(stage, outlook, place, config, device, processes, say, report, writer)
        if processes.first:
            stopped = f"validation R@1 got no better, --patience {config.patience}" if state.step < total else None
            sizes = asdict(model.config)
            finish(place, 1, model, sizes, config, features, state, total, steps_per_epoch, stopped)

    with run_lock(folder, processes):
        dtype = training_precision(config, folder, overwrite, processes, device)
        config = replace(config, teach=resolve_teacher(config, features))
        settings = {"train": asdict(config), "features": features.identity, "precision": str(dtype)}
        return conduct(folder, settings, overwrite, processes, device, say, run)


def _check(features: Features, config: Stage1Config, processes: Processes) -> None:
    """TrainingError if the options do not go together, or not with the features or the number of processes."""
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
    if config.patience and not len(features.rows("val", captioned=True)):
        raise TrainingError(
            f"--patience {config.patience}: {features.folder} has no images with captions in the split val to judge by"
        )


def _teacher(
    features: Features,
    config: Stage1Config,
    device: torch.device,
    processes: Processes,
    say: Callable[[str], None],
    progress: OnStatus,
) -> SpaceTeacher | None:
    """The teacher of all processes. Rank 0 embeds the captions, the others wait for it."""
    rows = features.rows("train", captioned=True)
    teacher = find_teacher(config.teach, features, rows, device, say, progress) if processes.first else None
    processes.agree(True, device)
    return teacher if processes.first else find_teacher(config.teach, features, rows, device, say, progress)


def make_model(features: Features, config: Stage1Config, teacher: SpaceTeacher | None = None) -> tuple[QFormer, Tokens]:
    """The model that training starts with, and its tokenizer. It draws random numbers of PyTorch.

    The shared space is as wide as the teacher's. TrainingError if that of `config.init` is not; others as of `find_start`."""
    captions = [caption for row in features.rows("train", captioned=True) for caption in features.captions[row]]
    embed_dim = QFormerConfig.embed_dim if teacher is None else teacher.width
    start = find_start(config, features, captions, embed_dim)
    if teacher is not None and start.model.embed_dim != embed_dim:
        raise TrainingError(
            f"--teach {config.teach}: its space is {embed_dim} wide, that of --init {config.init} is {start.model.embed_dim}; "
            "leave one of them out"
        )
    return QFormer.from_weights(start.model, start.weights), start.tokens


def make_batches(
    features: Features,
    config: Stage1Config,
    tokens: Tokens,
    device: torch.device,
    processes: Processes,
    cache: Cache | None,
    teacher: SpaceTeacher | None = None,
) -> Batches:
    """The training batches of this process, from `cache` if there is one. TrainingError if there are too few images."""
    return Batches(
        features,
        features.rows("train", captioned=True),
        tokens,
        batch_size=config.contrastive_batch or config.batch_size,
        captions_per_image=config.captions_per_image,
        matched_captions=config.matched_captions,
        max_text_length=config.max_text_length,
        seed=config.seed,
        shuffle_window=config.shuffle_window,
        micro_batch_size=config.batch_size // processes.count,
        rank=processes.rank,
        world_size=processes.count,
        device=device,
        source=cache,
        teacher=teacher,
    )


def outlook(stage: Stage1, done: int) -> str:
    """A line about the training ahead: images, steps, and a hint if the steps are few. `done` steps are behind it."""
    config, source = stage.config, stage.source
    text = f"training on {source.images:,} images, {source.batch_size * config.accumulate:,} a step: "
    text += counted(stage.total, "step")
    if done:
        text += f", of which {done:,} are done"
    if stage.total < FEW_STEPS:
        options = {"--accumulate": config.accumulate > 1, "--contrastive-batch": config.contrastive_batch}
        smaller = next((option for option, given in options.items() if given), "--batch-size")
        text += f"; so few steps teach it little: raise --epochs or lower {smaller}"
    return text
