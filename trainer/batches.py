"""Cached features and captions to batches. A batch is a pure function of its number, so that resuming needs no state."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..pipeline.ahead import map_ahead
from ..pipeline.codecs import Encoded
from ..pipeline.errors import TrainingError
from ..pipeline.features import Features
from .tokens import Tokens

PREFETCH = 4


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

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; on CUDA through pinned memory, without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        encoded = {name: move(tensor) for name, tensor in self.encoded.items()}
        return replace(
            self,
            encoded=encoded,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            image_rows=move(self.image_rows),
            text_id=move(self.text_id),
            matched=move(self.matched),
        )


class Batches:
    """The training batches of some rows of the features, shuffled anew each epoch from the seed.

    Each image brings `captions_per_image` of its captions (0: all), the first `matched_captions` (0: all) of them also for
    matching and generation; over the epochs every caption comes equally often to both. Where the features hold augmented
    views, each epoch takes another one of an image, and the plain picture in its turn.

    Of several processes each reads its share of the images, in parts of `part_size`; the captions are everyone's."""

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
        part_size: int | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if len(rows) < 2:
            raise TrainingError(
                f"{features.folder} has {len(rows)} training images; contrastive training needs at least 2"
            )
        self.features, self.rows, self.tokens, self.seed = features, rows, tokens, seed
        self.rank, self.processes = rank, processes
        self.share = min(batch_size, len(rows)) // processes  # images of a batch that a process holds
        self.batch_size = self.share * processes
        self.part_size = part_size or self.share
        self.captions_per_image, self.matched_captions = captions_per_image, matched_captions
        self.steps_per_epoch = len(rows) // self.batch_size
        texts = [caption for row in rows for caption in features.captions[row]]
        ids = iter(tokens.ids(texts, max_text_length))
        self.ids = [[next(ids) for _ in features.captions[row]] for row in rows]  # per image, per caption
        numbers: dict[tuple[int, ...], int] = {}  # of captions that differ
        self.numbers = [[numbers.setdefault(tuple(one), len(numbers)) for one in several] for several in self.ids]
        rng = np.random.default_rng([seed, 1])
        self.orders = [rng.permutation(len(captions)) for captions in self.ids]
        self.first_views = rng.integers(0, 1 + features.views, len(rows))

    def batch(self, number: int) -> Batch:
        """A batch, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.rows))
        chosen = np.sort(order[within * self.batch_size : (within + 1) * self.batch_size])  # sorted: reads go forward
        ids: list[list[int]] = []
        text_id: list[int] = []
        image_rows: list[int] = []
        matched: list[int] = []
        for row, image in enumerate(chosen):
            captions = self.orders[image]
            count = min(self.captions_per_image or len(captions), len(captions))
            first = epoch * count if count < len(captions) else epoch * (self.matched_captions or count)
            for n in range(count):
                if n < (self.matched_captions or count):
                    matched.append(len(ids))
                caption = captions[(first + n) % len(captions)]
                ids.append(self.ids[image][caption])
                text_id.append(self.numbers[image][caption])
                image_rows.append(row)
        input_ids, attention_mask = self.tokens.pad(ids)
        own = chosen[self.rank * self.share : (self.rank + 1) * self.share]
        views = (self.first_views[own] + epoch) % (1 + self.features.views)
        return Batch(
            self.features.encoded(self.rows[own], views),
            input_ids,
            attention_mask,
            torch.tensor(image_rows),
            torch.tensor(text_id),
            torch.tensor(matched),
            *self._shares(np.array(image_rows), np.array(matched)),
        )

    def _shares(self, image_rows: np.ndarray, matched: np.ndarray) -> tuple[list[int], list[Part]]:
        """How many texts each process has, and the parts of this one."""

        def cut(images: slice) -> tuple[slice, slice]:
            texts = slice(*np.searchsorted(image_rows, [images.start, images.stop]).tolist())
            return texts, slice(*np.searchsorted(matched, [texts.start, texts.stop]).tolist())

        shares = [cut(slice(n * self.share, (n + 1) * self.share))[0] for n in range(self.processes)]
        parts = []
        for start in range(0, self.share, self.part_size):
            encoded = slice(start, min(start + self.part_size, self.share))
            images = slice(self.rank * self.share + encoded.start, self.rank * self.share + encoded.stop)
            parts.append(Part(encoded, images, *cut(images)))
        return [texts.stop - texts.start for texts in shares], parts

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches `start` to `stop`, made ahead in a thread."""
        with ThreadPoolExecutor(1) as pool:
            yield from map_ahead(pool, self.batch, range(start, stop), PREFETCH)
