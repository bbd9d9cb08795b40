"""Cached features and captions to batches. A batch is a pure function of the step, so that resuming needs no state."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
class Batch:
    """B images with M captions. `image_rows` (M,) says whose caption each is."""

    encoded: Encoded  # the images' features as they are on disk; `decode` makes (B, T, W) of them
    input_ids: Tensor  # (M, L)
    attention_mask: Tensor  # (M, L)
    image_rows: Tensor  # (M,)
    matched: Tensor  # (m,) the texts for matching and generation

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; on CUDA through pinned memory, without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        encoded = {name: move(tensor) for name, tensor in self.encoded.items()}
        return Batch(encoded, *map(move, (self.input_ids, self.attention_mask, self.image_rows, self.matched)))


class Batches:
    """The training batches of some rows of the features, shuffled anew each epoch from the seed.

    Each image brings `captions_per_image` of its captions (0: all), the first `matched_captions` (0: all) of them also for
    matching and generation; over the epochs every caption comes equally often to both."""

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
    ) -> None:
        if len(rows) < 2:
            raise TrainingError(
                f"{features.folder} has {len(rows)} training images; contrastive training needs at least 2"
            )
        self.features, self.rows, self.tokens, self.seed = features, rows, tokens, seed
        self.batch_size = min(batch_size, len(rows))
        self.captions_per_image, self.matched_captions = captions_per_image, matched_captions
        self.steps_per_epoch = len(rows) // self.batch_size
        texts = [caption for row in rows for caption in features.captions[row]]
        ids = iter(tokens.ids(texts, max_text_length))
        self.ids = [[next(ids) for _ in features.captions[row]] for row in rows]  # per image, per caption
        rng = np.random.default_rng([seed, 1])
        self.orders = [rng.permutation(len(captions)) for captions in self.ids]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.rows))
        chosen = np.sort(order[within * self.batch_size : (within + 1) * self.batch_size])  # sorted: reads go forward
        ids: list[list[int]] = []
        image_rows: list[int] = []
        matched: list[int] = []
        for row, image in enumerate(chosen):
            captions = self.orders[image]
            count = min(self.captions_per_image or len(captions), len(captions))
            first = epoch * count if count < len(captions) else epoch * (self.matched_captions or count)
            for n in range(count):
                if n < (self.matched_captions or count):
                    matched.append(len(ids))
                ids.append(self.ids[image][captions[(first + n) % len(captions)]])
                image_rows.append(row)
        input_ids, attention_mask = self.tokens.pad(ids)
        encoded = self.features.encoded(self.rows[chosen])
        return Batch(encoded, input_ids, attention_mask, torch.tensor(image_rows), torch.tensor(matched))

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop`, made ahead in a thread."""
        with ThreadPoolExecutor(1) as pool:
            yield from map_ahead(pool, self.batch, range(start, stop), PREFETCH)
