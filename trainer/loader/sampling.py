"""Which images, views and captions come in each batch: NumPy arithmetic on the number of the batch, and no reading.

B images of a batch, M captions of these, m captions that matching and generation see."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MOST_CAPTIONS = 16  # of an image in a batch: thousands would take gigabytes a step
STRETCHES = 16  # a window of the shuffle mixes rows from at least so many places of the dataset


def epoch_order(shards: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """The positions 0 … n - 1 of an epoch, (n,): stretches of the shards shuffled, then the rows within each `window`.

    `shards` (n,) holds the shard of each position, ascending. A stretch is a shard, or a sixteenth of the window where the
    shard is larger, so that every window mixes many places. A window of n or more is a full shuffle."""
    count = len(shards)
    begins = np.flatnonzero(np.diff(shards, prepend=-1))
    within = np.arange(count) - np.repeat(begins, np.diff(begins, append=count))
    stretches = np.cumsum(within % -(-window // STRETCHES) == 0) - 1  # (n,): the stretch of each position
    order = np.argsort(rng.permutation(stretches[-1] + 1)[stretches], kind="stable")
    for start in range(0, count, window):
        rng.shuffle(order[start : start + window])
    return order


@dataclass(frozen=True)
class Sample:
    """The composition of a batch. Captions are numbered through, image by image."""

    images: np.ndarray  # (B,) positions of the images, ascending
    views: np.ndarray  # (B,) the view of each image; 0 is the plain picture
    captions: np.ndarray  # (M,) numbers of captions, in the order of their images
    image_rows: np.ndarray  # (M,) the place in `images` of each caption's image
    matched: np.ndarray  # (m,) the places in `captions` that matching and generation see


class Sampler:
    """The samples of a dataset of n images, shuffled anew each epoch. A sample depends on the seed and its number alone.

    Each image brings `captions_per_image` of its captions (0: all, MOST_CAPTIONS at most). The first `matched_captions` (0: all)
    of these also go to matching and generation. Over the epochs every caption comes equally often to both. Each epoch takes
    another view of an image, and every caption comes with every view."""

    def __init__(
        self,
        caption_counts: np.ndarray,
        shards: np.ndarray,
        *,
        batch_size: int,
        captions_per_image: int,
        matched_captions: int,
        views: int,
        seed: int,
        shuffle_window: int,
    ) -> None:
        """caption_counts (n,): captions of each image; shards (n,): the shard of each image, ascending; views: 1 or more."""
        self.counts, self.views, self.batch_size = caption_counts, views, batch_size
        self.captions_per_image, self.matched_captions = captions_per_image, matched_captions
        self.per_epoch = len(caption_counts) // batch_size
        self.order = lru_cache(maxsize=1)(
            lambda epoch: epoch_order(shards, shuffle_window, np.random.default_rng([seed, 0, epoch]))
        )
        self.firsts = np.cumsum(self.counts) - self.counts  # (n,) the number of each image's first caption
        rng = np.random.default_rng([seed, 1])
        images = np.repeat(np.arange(len(self.counts)), self.counts)
        self.captions = np.lexsort((rng.random(len(images)), images))  # each image's captions in a random order
        self.first_views = rng.integers(0, views, len(self.counts))

    def sample(self, number: int) -> Sample:
        """The sample of batch `number`, which counts from 0 over all epochs."""
        epoch, within = divmod(number, self.per_epoch)
        images = self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        images = np.sort(images)  # reads from disk go forward
        return Sample(images, self._views(images, epoch), *self._captions(images, epoch))

    def _views(self, images: np.ndarray, epoch: int) -> np.ndarray:
        """Views (B,). They advance by one each epoch, and by one more whenever pairs of view and caption would repeat."""
        rounds = epoch // np.lcm(self.views, self.counts[images])
        return (self.first_views[images] + epoch + rounds) % self.views

    def _captions(self, images: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Captions (M,), their image_rows (M,), and which are matched (m,).

        An epoch continues where the last one stopped in the image's own order of captions, which is a ring. Where that would repeat
        an earlier epoch, it begins one caption further."""
        there = self.counts[images]
        count = np.minimum(self.captions_per_image or MOST_CAPTIONS, there)  # (B,) captions of each image in this batch
        matched = np.minimum(self.matched_captions or count, count)
        turn, pace = epoch % there, np.where(count < there, count, matched)
        first = turn * pace + turn // (there // np.gcd(pace, there))
        image_rows = np.repeat(np.arange(len(images)), count)  # (M,)
        nth = np.arange(len(image_rows)) - (np.cumsum(count) - count)[image_rows]  # 0, 1 … within each image
        captions = self.captions[self.firsts[images][image_rows] + (first[image_rows] + nth) % there[image_rows]]
        return captions, image_rows, np.flatnonzero(nth < matched[image_rows])
