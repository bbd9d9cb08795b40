"""Stage 2 on cached features: what it gives to the loop, and `train`, which takes a run from its settings to its manifest."""

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...pipeline.errors import TrainingError
from ...pipeline.features.codecs import Encoded, decode
from ...pipeline.features.reader import Empty, Features
from ...pipeline.formatting import counted
from ..config import PRESETS, QFormerConfig, Stage2Config
from ..decoding import Decoding
from ..distributed.processes import ALONE, Processes
from ..loader.batches import FeatureSource
from ..loader.cache import cached
from ..loop import planned_steps
from ..manifest import TOKENIZER
from ..metrics.captions import caption_scores
from ..metrics.vqa import accuracies
from ..runs.folder import Trained, begin, finish
from ..runs.log import Report, no_report, summary_writer
from ..session import conduct, run_lock, trained, training_precision
from ..tokens import Tokens
from ..weights.names import Weights
from ..weights.read import fill, read_weights
from ..weights.start import check_fits
from .batches import Stage2Batch, Stage2Batches, example, instructions_of, rows_to_learn, text_counts
from .generate import Generator as TextGenerator
from .language_model import LanguageModel, load_language_model
from .model import VisualPrompt
from .prompts import default_prompt
from .step import LOSS, Stage2Step, soft_prompts

log = logging.getLogger(__name__)
VALIDATED = 250  # images that texts are generated for in a validation, at most
GROUP = 64  # images validated at once
ANSWER = {"caption": 30, "vqa": 10, "chat": 60}  # most tokens of a text in a validation


class Stage2:
    """Stage 2 for `loop.train_stage`: the soft prompt of a frozen language model, trained by its cross-entropy."""

    losses = (LOSS,)

    def __init__(
        self,
        features: Features,
        config: Stage2Config,
        model: VisualPrompt,
        language_model: LanguageModel,
        batches: Stage2Batches,
        dtype: torch.dtype,
        device: torch.device,
        processes: Processes,
        queries_known: bool,
    ) -> None:
        self.features, self.config, self.model, self.source = features, config, model, batches
        self.language_model, self.dtype, self.device, self.processes = language_model, dtype, device, processes
        self.batches_per_epoch = batches.per_epoch
        self.total = planned_steps(batches.per_epoch, config)
        model.qformer.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            model.qformer.compile_blocks()
        self.generator = TextGenerator(
            model, language_model, batches.prompt, batches.tokens, config.max_text_length, dtype
        )
        self.validation = rows_to_learn(features, "val", config.task)[: min(VALIDATED, config.max_val_images)]
        # which text of each validation image is generated: of one image the first, of the next the second
        counts = text_counts(features, self.validation, config.task)
        self.numbers: list[int] = (np.arange(len(counts)) % counts).tolist()
        self.validates = len(self.validation) > 0
        step = Stage2Step(
            model, language_model, dtype, config.token_dropout, config.seed, processes.rank, queries_known
        )
        self.module = processes.wrap(step, all_used=False)

    def batches(self, start: int, stop: int) -> Generator[Stage2Batch, None, None]:
        """See `loop.Stage`."""
        return self.source.between(start, stop)

    def step(self, batch: Stage2Batch, number: int, weight: float, last: bool) -> dict[str, Tensor]:
        """See `loop.Stage`."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last
        loss = self.module(batch, number)
        (loss * (weight * self.processes.count)).backward()
        return {LOSS: loss.detach()}

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The loss with each image and with another image in its place, and CIDEr or accuracy of generated texts."""
        self.model.eval()
        right: list[float] = []
        wrong: list[float] = []
        texts: list[str] = []
        how = Decoding(max_length=ANSWER[self.config.task])
        rows = self.validation
        found = [
            example(self.features, row, number, self.config, self.source.prompt, 0.0)
            for row, number in zip(rows.tolist(), self.numbers, strict=True)
        ]
        for start in range(0, len(rows), GROUP):
            some = slice(start, start + GROUP)
            examples, embeds = found[some], self._embeds(rows[some])
            ids = [self.language_model.example_ids(e.prompt, e.target, self.config.max_text_length) for e in examples]
            text = self.language_model.batch(ids, 1).to(lambda tensor: tensor.to(self.device))
            questions = [e.question for e in examples]
            read = instructions_of(self.source.tokens, questions, self.config.max_text_length, self.device)
            order = torch.arange(len(examples), device=self.device)
            seen, other = (
                soft_prompts(self.model, embeds, images, read, self.dtype) for images in (order, order.roll(1))
            )
            for losses, prompts in ((right, seen), (wrong, other)):
                losses += (self.language_model.losses(prompts, text) / (text.labels >= 0).sum(1)).tolist()
            texts += self.generator.continued(seen, [e.prompt for e in examples], how)
        metrics = {
            "loss_val": float(np.mean(right)),
            "loss_shuffled": float(np.mean(wrong)),
            "empty": sum(not text for text in texts),
        }
        metrics |= self._scores(texts)
        return {name: round(value, 4) for name, value in metrics.items()}

    def _embeds(self, rows: np.ndarray) -> Tensor:
        return decode({name: column.to(self.device) for name, column in self.features.read(rows).items()})

    def _scores(self, texts: list[str]) -> dict[str, float]:
        """The metric of the task: CIDEr of captions, accuracy of answers in percent; none of a chat."""
        rows = self.validation.tolist()
        if self.config.task == "caption":
            return {"CIDEr": caption_scores(texts, [self.features.captions[row] for row in rows])["CIDEr"]}
        if self.config.task == "vqa":
            asked = [self.features.questions[row][n] for row, n in zip(rows, self.numbers, strict=True)]
            return {"accuracy": accuracies(texts, [question.answers for question in asked])["accuracy"]}
        return {}

    def better(self, step: int, metrics: dict[str, float]) -> float | None:
        """CIDEr, accuracy, or for a chat the mean probability of a token."""
        return metrics.get("CIDEr", metrics.get("accuracy", math.exp(-metrics["loss_val"])))


def train(
    features: Features,
    folder: Path,
    config: Stage2Config,
    device: torch.device,
    overwrite: bool = False,
    report: Report = no_report,
    processes: Processes = ALONE,
    *,
    cache_on_device: bool = False,
    say: Callable[[str], None] = lambda text: None,
    tensorboard: bool = False,
) -> Trained:
    """Train a soft prompt for a frozen language model into the run `folder`, or resume it there; as `stage1.stage.train`.

    TrainingError if the language model cannot be loaded, if the features have no texts of the task, or if training diverges."""
    config.check()
    writer = summary_writer() if tensorboard and processes.first else None

    def run(place: Path) -> None:
        torch.manual_seed(config.seed)
        model, tokens = make_model(features, config, language_model.width, language_model.scale)
        stage = None
        if config.epochs:
            model = model.to(device)
            source: FeatureSource | None = None
            rows = rows_to_learn(features, "train", config.task)
            known = model.qformer_is_frozen and tokens is None and not features.views
            if known:
                say("reading the images with the frozen Q-Former, once")
                source = KnownQueries(model, features, rows, device)
            elif cache_on_device:
                source = cached(features, rows, device, processes.count, say)
            queries = model.config.num_query_tokens
            batches = Stage2Batches(
                features, config, prompt, language_model, tokens, queries, device, processes, source
            )
            stage = Stage2(features, config, model, language_model, batches, dtype, device, processes, known)
        if processes.first:
            begin(place, settings)
            if tokens is not None:
                tokens.save(place / TOKENIZER)
        processes.agree(True, device)  # all ranks wait until the place is ready
        state, total, steps_per_epoch = trained(stage, outlook, place, config, device, processes, say, report, writer)
        if processes.first:
            stopped = f"validation got no better, --patience {config.patience}" if state.step < total else None
            more = {"language_model": language_model.identity | {"width": language_model.width}, "prompt": prompt}
            sizes = asdict(model.config)
            finish(place, 2, model, sizes, config, features, state, total, steps_per_epoch, stopped, more)

    with run_lock(folder, processes):
        dtype = training_precision(config, folder, overwrite, processes, device)
        assert config.llm is not None
        language_model = load_language_model(config.llm, config.llm_precision, device)
        prompt = default_prompt(config.task, language_model.encoder_decoder) if config.prompt is None else config.prompt
        _check(features, config, language_model)
        settings = {
            "train": asdict(config),
            "features": features.identity,
            "precision": str(dtype),
            "language_model": language_model.identity,
        }
        return conduct(folder, settings, overwrite, processes, device, say, run)


def _check(features: Features, config: Stage2Config, language_model: LanguageModel) -> None:
    """TrainingError if the options do not go together, or not with the features or the language model."""
    if config.preset not in PRESETS:
        raise TrainingError(f"--preset {config.preset}: use {', '.join(PRESETS)}")
    if config.prefix_lm and (config.task != "caption" or not language_model.encoder_decoder):
        raise TrainingError("--prefix-lm is for captions and encoder-decoder models, such as T5; leave it out")
    if config.instruct and config.task == "caption":
        raise TrainingError("--instruct reads questions, and captions have none; use --task vqa or chat")
    if config.patience and not len(rows_to_learn(features, "val", config.task)):
        raise TrainingError(
            f"--patience {config.patience}: the split val has nothing of --task {config.task} to judge by"
        )


class KnownQueries:
    """The output of a frozen Q-Former for all training images, computed once. A `FeatureSource` whose tokens are (Q, D)."""

    def __init__(self, model: VisualPrompt, features: Features, rows: np.ndarray, device: torch.device) -> None:
        """Computes them in float32, and keeps them in host memory."""
        config = model.config
        self.output = torch.empty(len(rows), config.num_query_tokens, config.hidden_size)
        model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), GROUP):
                columns = features.read(rows[start : start + GROUP])
                embeds = decode({name: column.to(device) for name, column in columns.items()})
                self.output[start : start + GROUP] = model.queries(embeds).cpu()

    def __call__(self, chosen: np.ndarray, views: np.ndarray, empty: Empty) -> Encoded:
        """The output of some images."""
        return {"tokens": self.output[torch.from_numpy(chosen)]}


def make_model(
    features: Features, config: Stage2Config, width: int, scale: float
) -> tuple[VisualPrompt, Tokens | None]:
    """The model that training starts with, and the Q-Former's tokenizer where it reads questions.

    Its soft prompts begin as large as the language model's embeddings, whose root mean square is `scale`. TrainingError if the
    weights of `config.init` do not fit the features or the options; ArtifactError if they cannot be read."""
    weights = None if config.init in (None, "none") else read_weights(str(config.init), stage=2)
    sizes = dict(PRESETS[config.preset]) | {"encoder_hidden_size": features.encoder["width"], "vocab_size": 1}
    if config.num_query_tokens is not None:
        sizes["num_query_tokens"] = config.num_query_tokens
    if weights is None:
        log.warning("the Q-Former starts afresh: without stage 1 it learns little (train one first, or give --init)")
        if config.instruct:
            raise TrainingError("--instruct needs the text side of a run of stage 1: give it with --init")
    else:
        check_fits(config, features.encoder["width"], weights)
        sizes |= weights.sizes
    sizes |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    sizes["vocab_size"] = max(1, sizes.get("vocab_size") or 1)
    qformer_config = QFormerConfig(**sizes)
    tokens = None
    if config.instruct:
        assert weights is not None
        if weights.tokenizer is None or weights.vocab_size is None:
            raise TrainingError(f"--instruct: --init {config.init} has no text side; give a run of stage 1")
        tokens = Tokens.parse(weights.tokenizer, f"the tokenizer of --init {config.init}", weights.vocab_size)
    model = VisualPrompt(qformer_config, width, config.instruct)
    torch.nn.init.normal_(model.language_projection.weight, std=scale / qformer_config.hidden_size**0.5)
    torch.nn.init.zeros_(model.language_projection.bias)
    if weights is not None:
        own = model.qformer.state_dict()
        fill(model.qformer, replace(weights, state={key: weights.state[key] for key in own if key in weights.state}))
        _fill_projection(model, weights)
    if config.parts == "projection":
        model.freeze_qformer()
    return model, tokens


def _fill_projection(model: VisualPrompt, weights: Weights) -> None:
    """Copy the projection of the weights, if they have one to a language model as wide as this one; else it starts afresh."""
    found, own = weights.projection, model.language_projection.state_dict()
    if {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in own.items()}:
        model.language_projection.load_state_dict(found)
    elif found:
        log.warning("%s projects to another language model: the projection starts afresh", weights.name)


def outlook(stage: Stage2, done: int) -> str:
    """A line about the training ahead: images, steps, and the language model. `done` steps are behind it."""
    config, source = stage.config, stage.source
    text = f"training on {source.images:,} images, {source.batch_size * config.accumulate:,} a step: {counted(stage.total, 'step')}"
    if done:
        text += f", of which {done:,} are done"
    trained = sum(parameter.numel() for parameter in stage.model.trained())
    return f"{text}; {trained:,} parameters, {config.llm} frozen"
