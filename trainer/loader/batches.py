"""Cached features and captions to batches. A batch is a pure function of the step, so that resuming needs no state."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from ...pipeline.errors import TrainingError
from ...pipeline.features.codecs import Encoded
from ...pipeline.features.reader import Empty, Features, empty_array
from ...pipeline.prefetch import map_ahead
from ..config import Stage1Config
from ..tokens import Tokens

PREFETCH = 4
PLACES = 16  # a window of the shuffle mixes rows from at least so many places
TOKENISED = 10_000  # captions at once
CPU = torch.device("cpu")
# rows of the training images (0 … n - 1), their views, memory for the result -> the codec's columns
Source = Callable[[np.ndarray, np.ndarray, Empty], Encoded]


@dataclass(frozen=True)
class Part:
    """Images of a batch that go through the network at once, with their captions."""

    encoded: slice  # of the rows that this process holds
    images: slice  # of the batch's B images
    texts: slice  # of its M texts
    matched: slice  # of its m matched texts


@dataclass(frozen=True)
class Batch:
    """B images with M captions, in the order of their images; this process holds the features of its n images alone."""

    encoded: Encoded  # features as they are on disk; `decode` makes (n, T, W) of them
    input_ids: Tensor  # (M, L)
    attention_mask: Tensor  # (M, L)
    image_rows: Tensor  # (M,) whose caption each is
    text_id: Tensor  # (M,) equal for texts that read the same
    matched: Tensor  # (m,) the texts for matching and generation
    texts_of: list[int]  # how many of the texts each process has
    parts: list[Part]  # of this process

    def tensors(self) -> list[Tensor]:
        texts = [self.input_ids, self.attention_mask, self.image_rows, self.text_id, self.matched]
        return [*self.encoded.values(), *texts]


def epoch_order(shards: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """The positions 0 … n - 1 of an epoch, shuffled: the shards, then the rows within each `window` of what results.

    `shards` (n,): the shard of each position, ascending. One larger than a sixteenth of the window is cut into pieces of
    that size, so that every window mixes many places. A window of n or more is a full shuffle."""
    count = len(shards)
    begins = np.flatnonzero(np.diff(shards, prepend=-1))
    within = np.arange(count) - np.repeat(begins, np.diff(begins, append=count))
    pieces = np.cumsum(within % -(-window // PLACES) == 0) - 1  # (n,): the piece of each position
    order = np.argsort(rng.permutation(pieces[-1] + 1)[pieces], kind="stable")
    for start in range(0, count, window):
        rng.shuffle(order[start : start + window])
    return order


class BufferPool:
    """Memory for tensors that is used again once they are gone: the kernel takes as long to clear new memory as it takes to
    copy features there."""

    def __init__(self) -> None:
        self.spare: dict[tuple[tuple[int, ...], torch.dtype], list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        spare = self.spare.setdefault((shape, dtype), [])
        memory = spare.pop() if spare else empty_array(shape, dtype).numpy()
        lent = memory.view()  # the tensor holds on to it
        finalize(lent, spare.append, memory).atexit = False
        return torch.from_numpy(lent)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that CUDA copies from without waiting; PyTorch uses such memory again by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Batches:
    """The training batches of some rows of the features, shuffled anew each epoch from the seed (`epoch_order`).

    Each image brings `captions_per_image` of its captions (0: all), the first `matched_captions` (0: all) of them also for
    matching and generation; over the epochs every caption comes equally often to both. Where the features hold augmented
    views, each epoch takes another one of an image, and the plain picture in its turn; every caption comes with every view.

    Of `world_size` processes each gets the features of the images that are its `rank`'s, in parts of `part_size`: together
    they see what one alone would. The captions are everyone's.
    Batches are on `device`. `source` gives their features, from disk unless `cache.py` holds them in memory."""

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
        part_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        source: Source | None = None,
    ) -> None:
        """TrainingError if there are too few rows, or a batch cannot be shared evenly among the processes."""
        if len(rows) < 2:
            splits = ", ".join(f"{count:,} {split}" for split, count in features.manifest["splits"].items())
            raise TrainingError(
                f"{features.folder} has too few training images ({splits}); contrastive training needs at least 2: extract "
                "some of the split train, or draw the splits anew with `qf extract --redraw-splits --overwrite`"
            )
        self.batch_size = min(batch_size, len(rows) // world_size * world_size)
        if self.batch_size % world_size or not self.batch_size:
            raise TrainingError(
                f"a batch of {min(batch_size, len(rows))} images cannot be shared evenly by {world_size} processes; "
                f"use a --batch-size that is a multiple of {world_size}, and at least as many training images"
            )
        self.share = self.batch_size // world_size  # images of a batch that a process holds
        self.part_size = part_size or self.share
        self.captions_per_image, self.matched_captions = captions_per_image, matched_captions
        self.rank, self.world_size, self.device = rank, world_size, device
        self.steps_per_epoch = len(rows) // self.batch_size
        self.views = 1 + features.views
        self.source = source or (lambda chosen, views, empty: features.read(rows[chosen], views, empty))
        self.empty = pinned if device.type == "cuda" else BufferPool().empty
        shards = features.shard_numbers(rows)
        self.order = lru_cache(maxsize=1)(
            lambda epoch: epoch_order(shards, shuffle_window, np.random.default_rng([seed, 0, epoch]))
        )

        texts = [caption for row in rows for caption in features.captions[row]]
        self.input_ids = np.full((len(texts), max_text_length), tokens.pad_token_id, np.int32)  # of all captions
        self.lengths = np.zeros(len(texts), np.int64)
        for start in range(0, len(texts), TOKENISED):
            input_ids, attention_mask = tokens(texts[start : start + TOKENISED], max_text_length)
            self.input_ids[start : start + len(input_ids), : input_ids.shape[1]] = input_ids
            self.lengths[start : start + len(input_ids)] = attention_mask.sum(1)
        numbers: dict[bytes, int] = {}  # of captions that differ
        self.text_id = np.array([numbers.setdefault(ids.tobytes(), len(numbers)) for ids in self.input_ids])
        self.counts = np.array([len(features.captions[row]) for row in rows])  # captions of each image
        self.firsts = np.cumsum(self.counts) - self.counts  # and the number of its first
        rng = np.random.default_rng([seed, 1])
        images = np.repeat(np.arange(len(rows)), self.counts)
        # numbers of captions: image by image, in an order drawn
        self.captions = np.lexsort((rng.random(len(texts)), images))
        self.first_views = rng.integers(0, self.views, len(rows))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        chosen = np.sort(chosen)  # reads go forward
        own = chosen[self.rank * self.share : (self.rank + 1) * self.share]
        # views go with captions in turn, and a view further once the same pairs would come again
        rounds = epoch // np.lcm(self.views, self.counts[own])
        encoded = self.source(own, (self.first_views[own] + epoch + rounds) % self.views, self.empty)

        there = self.counts[chosen]
        count = np.minimum(self.captions_per_image or there, there)  # (B,): captions of each
        matched = np.minimum(self.matched_captions or count, count)
        # in the image's own order, which begins again at its end; where that is how it began, one caption further
        turn, pace = epoch % there, np.where(count < there, count, matched)
        first = turn * pace + turn // (there // np.gcd(pace, there))
        image_rows = np.repeat(np.arange(len(chosen)), count)  # (M,)
        nth = np.arange(len(image_rows)) - (np.cumsum(count) - count)[image_rows]  # 0, 1 … of each image
        captions = self.captions[self.firsts[chosen][image_rows] + (first[image_rows] + nth) % there[image_rows]]
        lengths = self.lengths[captions]
        longest = lengths.max(initial=1)
        matched_texts = np.flatnonzero(nth < matched[image_rows])
        return Batch(
            {name: self._move(column) for name, column in encoded.items()},
            self._move(self.input_ids[captions, :longest].astype(np.int64)),
            self._move((np.arange(longest) < lengths[:, None]).astype(np.int64)),
            self._move(image_rows),
            self._move(self.text_id[captions]),
            self._move(matched_texts),
            *self._shares(image_rows, matched_texts),
        )

    def _shares(self, image_rows: np.ndarray, matched: np.ndarray) -> tuple[list[int], list[Part]]:
        """How many texts each process has, and the parts of this one."""

        def cut(images: slice) -> tuple[slice, slice]:
            texts = slice(*np.searchsorted(image_rows, [images.start, images.stop]).tolist())
            return texts, slice(*np.searchsorted(matched, [texts.start, texts.stop]).tolist())

        shares = [cut(slice(n * self.share, (n + 1) * self.share))[0] for n in range(self.world_size)]
        parts = []
        for start in range(0, self.share, self.part_size):
            encoded = slice(start, min(start + self.part_size, self.share))
            images = slice(self.rank * self.share + encoded.start, self.rank * self.share + encoded.stop)
            parts.append(Part(encoded, images, *cut(images)))
        return [texts.stop - texts.start for texts in shares], parts

    def _move(self, values: np.ndarray | Tensor) -> Tensor:
        """To the device, without waiting for it."""
        tensor = torch.as_tensor(values)
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # what is pinned already stays as it is

    def steps(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of steps `start` to `stop`, made ahead in a thread; on CUDA in a stream of its own."""
        with ThreadPoolExecutor(1) as pool:
            if self.device.type != "cuda":
                yield from map_ahead(pool, self.batch, range(start, stop), PREFETCH)
                return
            copies = torch.cuda.Stream(self.device)

            def load(step: int) -> tuple[Batch, torch.cuda.Event]:
                with torch.cuda.stream(copies):  # of this thread, which is then on the right device, too
                    return self.batch(step), copies.record_event()

            for batch, there in map_ahead(pool, load, range(start, stop), PREFETCH):
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(there)
                for tensor in batch.tensors():
                    tensor.record_stream(stream)  # its memory is not used again before the step is through with it
                yield batch
