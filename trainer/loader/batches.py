"""Cached features and captions to batches. A batch is a function of its number, so that resuming needs no state.

Letters as in sampling.py; L text length, n images of a process."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from ...pipeline.errors import TrainingError
from ...pipeline.features.codecs import Encoded
from ...pipeline.features.reader import Empty, Features, empty_array
from ..config import Stage1Config
from ..objectives import Lesson
from ..tokens import Tokens
from .feed import made_ahead, moved
from .sampling import Sample, Sampler

TOKENISED = 10_000  # captions tokenised at once
CPU = torch.device("cpu")
# positions of training images (n,), their views (n,), a function that allocates -> the columns of the codec
FeatureSource = Callable[[np.ndarray, np.ndarray, Empty], Encoded]


@dataclass(frozen=True)
class MicroBatch:
    """The images of a batch that go through the network at once, with their captions."""

    encoded: slice  # of the rows that this process holds
    images: slice  # of the batch's B images
    texts: slice  # of its M captions
    matched: slice  # of its m matched captions


@dataclass(frozen=True)
class Batch:
    """B images with M captions, in the order of their images. This process holds the features of its own n images only."""

    encoded: Encoded  # features as they are on disk; `decode` turns them into (n, T, W)
    input_ids: Tensor  # (M, L)
    attention_mask: Tensor  # (M, L)
    image_rows: Tensor  # (M,) the image of each caption
    text_id: Tensor  # (M,) equal for captions that read the same
    matched: Tensor  # (m,) the captions that matching and generation see
    texts_of: list[int]  # the number of captions of each process
    micro_batches: list[MicroBatch]  # of this process
    lesson: Lesson | None = None  # of all images and captions, where there is a teacher

    def __len__(self) -> int:
        """The number of its image-text pairs, M."""
        return len(self.input_ids)

    def tensors(self) -> list[Tensor]:
        """All its tensors, features first."""
        texts = [self.input_ids, self.attention_mask, self.image_rows, self.text_id, self.matched]
        lesson = [] if self.lesson is None else [self.lesson.images, self.lesson.texts]
        return [*self.encoded.values(), *texts, *lesson]


class Teacher(Protocol):
    """A space that holds the training images and all their captions; see `Lesson`."""

    def images(self, chosen: np.ndarray) -> np.ndarray:
        """Positions of training images (n,) -> (n, E) float32 of unit length."""

    def texts(self, chosen: np.ndarray) -> np.ndarray:
        """Numbers of their captions (m,), counted image by image -> (m, E) float32 of unit length."""


class BufferPool:
    """Memory for tensors, taken again once a tensor is gone.

    The kernel clears new memory, which takes as long as copying features into it."""

    def __init__(self) -> None:
        self.spare: dict[tuple[tuple[int, ...], torch.dtype], list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        spare = self.spare.setdefault((shape, dtype), [])
        memory = spare.pop() if spare else empty_array(shape, dtype).numpy()
        lent = memory.view()  # the tensor keeps this view alive
        finalize(lent, spare.append, memory).atexit = False
        return torch.from_numpy(lent)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that CUDA copies from without waiting. PyTorch itself pools such memory."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Batches:
    """The training batches of some rows of the features (see `Sampler`), on `device`.

    Each of `world_size` processes reads the features of its own `rank`'s images, in micro-batches of `micro_batch_size`
    images. Every process holds all captions. Together the processes see what a single one would. `source` gives the features:
    from disk, unless a `Cache` holds them in memory."""

    def __init__(
        self,
        features: Features,
        rows: np.ndarray,
        tokens: Tokens,
        *,
        batch_size: int,
        captions_per_image: int,
        matched_captions: int,
        max_text_length: int,
        seed: int,
        shuffle_window: int = Stage1Config.shuffle_window,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        source: FeatureSource | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """TrainingError if there are too few rows, or if the processes cannot share a batch evenly."""
        if len(rows) < 2 and not features.manifest["captions"]:
            search = "`qf search` works" if features.encoder["joint"] else "with a CLIP or SigLIP `qf search` works"
            raise TrainingError(
                f"{features.folder} holds no captions: {search} without training; training needs at least 2 images with "
                "captions: extract a dataset that has some, with --overwrite"
            )
        if len(rows) < 2:
            splits = ", ".join(f"{count:,} {split}" for split, count in features.manifest["splits"].items())
            raise TrainingError(
                f"{features.folder} has too few training images ({splits}; {len(rows)} of train with captions); contrastive "
                "training needs at least 2: extract some for the split train, or draw the splits again with `qf extract "
                "--redraw-splits --overwrite`"
            )
        self.batch_size = min(batch_size, len(rows) // world_size * world_size)
        if self.batch_size % world_size or not self.batch_size:
            raise TrainingError(
                f"{world_size} processes cannot share a batch of {min(batch_size, len(rows))} images evenly; "
                f"use a --batch-size that is a multiple of {world_size}, and at least as many training images"
            )
        self.share = self.batch_size // world_size  # images of a batch that a process holds
        self.micro_batch_size = micro_batch_size or self.share
        self.rank, self.world_size, self.device = rank, world_size, device
        self.source = source or (lambda chosen, views, empty: features.read(rows[chosen], views, empty))
        self.empty = pinned if device.type == "cuda" else BufferPool().empty
        self.teacher, self.images = teacher, len(rows)
        self.sampler = Sampler(
            np.array([len(features.captions[row]) for row in rows]),
            features.shard_numbers(rows),
            batch_size=self.batch_size,
            captions_per_image=captions_per_image,
            matched_captions=matched_captions,
            views=1 + features.views,
            seed=seed,
            shuffle_window=shuffle_window,
        )
        self.per_epoch = self.sampler.per_epoch

        texts = [caption for row in rows for caption in features.captions[row]]
        self.input_ids = np.full((len(texts), max_text_length), tokens.pad_token_id, np.int32)  # of all captions
        self.lengths = np.zeros(len(texts), np.int64)
        for start in range(0, len(texts), TOKENISED):
            input_ids, attention_mask = tokens(texts[start : start + TOKENISED], max_text_length)
            self.input_ids[start : start + len(input_ids), : input_ids.shape[1]] = input_ids
            self.lengths[start : start + len(input_ids)] = attention_mask.sum(1)
        numbers: dict[bytes, int] = {}  # of different captions
        self.text_id = np.array([numbers.setdefault(ids.tobytes(), len(numbers)) for ids in self.input_ids])

    def batch(self, number: int) -> Batch:
        """Batch `number`, which counts from 0 over all epochs."""
        sample = self.sampler.sample(number)
        own = slice(self.rank * self.share, (self.rank + 1) * self.share)
        encoded = self.source(sample.images[own], sample.views[own], self.empty)
        lengths = self.lengths[sample.captions]
        longest = lengths.max(initial=1)
        return Batch(
            {name: self._move(column) for name, column in encoded.items()},
            self._move(self.input_ids[sample.captions, :longest].astype(np.int64)),
            self._move((np.arange(longest) < lengths[:, None]).astype(np.int64)),
            self._move(sample.image_rows),
            self._move(self.text_id[sample.captions]),
            self._move(sample.matched),
            *self._shares(sample.image_rows, sample.matched),
            self._lesson(sample),
        )

    def _lesson(self, sample: Sample) -> Lesson | None:
        if self.teacher is None:
            return None
        return Lesson(self._move(self.teacher.images(sample.images)), self._move(self.teacher.texts(sample.captions)))

    def _shares(self, image_rows: np.ndarray, matched: np.ndarray) -> tuple[list[int], list[MicroBatch]]:
        """The number of captions of each process, and the micro-batches of this one."""

        def of(images: slice) -> tuple[slice, slice]:
            texts = slice(*np.searchsorted(image_rows, [images.start, images.stop]).tolist())
            return texts, slice(*np.searchsorted(matched, [texts.start, texts.stop]).tolist())

        texts_of = [of(slice(n * self.share, (n + 1) * self.share))[0] for n in range(self.world_size)]
        micro_batches = []
        for start in range(0, self.share, self.micro_batch_size):
            encoded = slice(start, min(start + self.micro_batch_size, self.share))
            images = slice(self.rank * self.share + encoded.start, self.rank * self.share + encoded.stop)
            micro_batches.append(MicroBatch(encoded, images, *of(images)))
        return [texts.stop - texts.start for texts in texts_of], micro_batches

    def _move(self, values: np.ndarray | Tensor) -> Tensor:
        return moved(values, self.device)

    def between(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches `start` to `stop` - 1; see `made_ahead`."""
        return made_ahead(self.batch, self.device, start, stop)
