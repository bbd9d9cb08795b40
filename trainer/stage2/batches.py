"""Batches of stage 2: features and texts to learn. A batch is a function of its number, so that resuming needs no state.

Letters as in language_model.py; n images and N texts of this process."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...pipeline.errors import TrainingError
from ...pipeline.features.codecs import Encoded
from ...pipeline.features.reader import Features
from ..config import Stage2Config
from ..distributed.processes import Processes
from ..loader.batches import BufferPool, FeatureSource, pinned
from ..loader.feed import made_ahead, moved
from ..loader.sampling import Sampler
from ..tokens import Tokens
from .language_model import LanguageModel, TextBatch
from .prompts import Example, asked, dialog, split_caption

NEEDED = {"caption": "captions", "vqa": "questions", "chat": "conversations"}


@dataclass(frozen=True)
class Instructions:
    """The questions that the Q-Former reads, as its own tokens."""

    input_ids: Tensor  # (N, L)
    attention_mask: Tensor  # (N, L)


@dataclass(frozen=True)
class Stage2Batch:
    """n images of this process with N texts to learn."""

    encoded: Encoded  # features as they are on disk; `decode` turns them into (n, T, W)
    image_rows: Tensor  # (N,) the image of each text, among the n
    text: TextBatch
    instructions: Instructions | None
    pairs: int  # texts of all processes

    def __len__(self) -> int:
        return self.pairs

    def tensors(self) -> list[Tensor]:
        """All its tensors, features first."""
        read = [] if self.instructions is None else [self.instructions.input_ids, self.instructions.attention_mask]
        text = [self.text.input_ids, self.text.attention_mask, self.text.labels]
        return [*self.encoded.values(), self.image_rows, *text, *read]


def rows_to_learn(features: Features, split: str, task: str) -> np.ndarray:
    """The rows (n,) of a split whose images have texts of the task."""
    return features.rows(split, captioned=task == "caption", asked=task == "vqa", conversing=task == "chat")


def text_counts(features: Features, rows: np.ndarray, task: str) -> np.ndarray:
    """The number of texts (n,) of the task that each row has."""
    texts: Sequence[Sequence[object]] = getattr(features, NEEDED[task])
    return np.array([len(texts[row]) for row in rows])


def example(features: Features, row: int, number: int, config: Stage2Config, prompt: str, draw: float) -> Example:
    """Text `number` of the image in a row, as the task learns it. `draw`, from 0 to 1, chooses where there are several ways: the
    answer, equally often as people gave it, the turn of a dialog, or the place where a caption is split."""
    if config.task == "caption":
        caption = features.captions[row][number]
        return split_caption(prompt, caption, draw) if config.prefix_lm else Example(prompt, caption)
    if config.task == "vqa":
        question = features.questions[row][number]
        answer = question.answers[int(draw * len(question.answers))]
        return Example(asked(prompt, question.question), answer, question.question)
    turns = features.conversations[row][number]
    at = 2 * int(draw * (len(turns) // 2)) + 1  # of an answer
    return Example(dialog(prompt, turns[:at]), turns[at], turns[at - 1])


class Stage2Batches:
    """The training batches of this process. Together the processes see what a single one would."""

    def __init__(
        self,
        features: Features,
        config: Stage2Config,
        prompt: str,
        language_model: LanguageModel,
        tokens: Tokens | None,
        queries: int,
        device: torch.device,
        processes: Processes,
        source: FeatureSource | None = None,
    ) -> None:
        """`tokens` is the Q-Former's tokenizer, where it reads questions; `queries` its number of query tokens.

        TrainingError if too few images have texts of the task, or if the processes cannot share a batch."""
        self.features, self.config, self.prompt = features, config, prompt
        self.language_model, self.tokens, self.queries = language_model, tokens, queries
        self.rows = rows_to_learn(features, "train", config.task)
        if not len(self.rows):
            raise TrainingError(
                f"{features.folder} has no training images with {NEEDED[config.task]}, which --task {config.task} learns from; "
                "extract a dataset that has some, or choose another --task"
            )
        count = processes.count
        self.batch_size = min(config.batch_size, len(self.rows) // count * count)
        if not self.batch_size or self.batch_size % count:
            raise TrainingError(f"{count} processes cannot share a batch of {self.batch_size} images evenly")
        self.share = slice(processes.rank * self.batch_size // count, (processes.rank + 1) * self.batch_size // count)
        self.device, self.images = device, len(self.rows)
        self.source = source or (lambda chosen, views, empty: features.read(self.rows[chosen], views, empty))
        self.empty = pinned if device.type == "cuda" else BufferPool().empty
        self.sampler = Sampler(
            text_counts(features, self.rows, config.task),
            features.shard_numbers(self.rows),
            batch_size=self.batch_size,
            captions_per_image=config.matched_captions,
            matched_captions=0,
            views=1 + features.views,
            seed=config.seed,
            shuffle_window=config.shuffle_window,
        )
        self.per_epoch = self.sampler.per_epoch

    def examples(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Example]]:
        """The images (B,) of batch `number`, their views (B,), the image (M,) of each text among them, and the M texts."""
        sample = self.sampler.sample(number)
        draws = np.random.default_rng([self.config.seed, 3, number]).random(len(sample.captions))
        nth = sample.captions - self.sampler.firsts[sample.images][sample.image_rows]  # of the image's texts
        rows = self.rows[sample.images[sample.image_rows]]
        found = [
            example(self.features, row, text, self.config, self.prompt, draw)
            for row, text, draw in zip(rows.tolist(), nth.tolist(), draws.tolist(), strict=True)
        ]
        return sample.images, sample.views, sample.image_rows, found

    def batch(self, number: int) -> Stage2Batch:
        """Batch `number`, which counts from 0 over all epochs."""
        images, views, image_rows, examples = self.examples(number)
        ids = [self.language_model.example_ids(e.prompt, e.target, self.config.max_text_length) for e in examples]
        for prompt, target in ids:
            self.language_model.check_window(self.queries, prompt, len(target), "a text of the training")
        own = (image_rows >= self.share.start) & (image_rows < self.share.stop)
        mine = np.flatnonzero(own).tolist()
        move: Callable[[np.ndarray | Tensor], Tensor] = lambda values: moved(values, self.device)  # noqa: E731
        encoded = self.source(images[self.share], views[self.share], self.empty)
        text = self.language_model.batch([ids[m] for m in mine], sum(len(target) for _, target in ids))
        return Stage2Batch(
            {name: move(column) for name, column in encoded.items()},
            move(image_rows[own] - self.share.start),
            text.to(move),
            instructions_of(
                self.tokens, [examples[m].question for m in mine], self.config.max_text_length, self.device
            ),
            len(examples),
        )

    def between(self, start: int, stop: int) -> Generator[Stage2Batch, None, None]:
        """The batches `start` to `stop` - 1; see `made_ahead`."""
        return made_ahead(self.batch, self.device, start, stop)


def instructions_of(
    tokens: Tokens | None, questions: Sequence[str], max_text_length: int, device: torch.device
) -> Instructions | None:
    """The questions (N) for a Q-Former that reads text; None without a tokenizer."""
    if tokens is None:
        return None
    input_ids, attention_mask = tokens(questions, max_text_length)
    return Instructions(moved(input_ids, device), moved(attention_mask, device))
