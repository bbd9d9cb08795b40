"""How far the R@1 of each scorer on a split can be believed, and what a query costs."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .bootstrap import Interval, interval, resampled
from .measure import Both
from .mix_file import TEXT_TO_IMAGE, WAYS


@dataclass(frozen=True)
class Certainty:
    """How far the R@1 of a scorer in one direction can be believed, and what a query costs."""

    interval: Interval  # of R@1, 95 %
    gain: float | None  # R@1 less that of the encoder
    gain_interval: Interval | None
    milliseconds: float  # to rank a query, without embedding it

    def cells(self) -> tuple[str, str]:
        """Interval and gain, for people."""
        low, high = self.interval
        gain = ""
        if self.gain is not None and self.gain_interval is not None:
            gain = "{:+.1f} ({:+.1f}, {:+.1f})".format(self.gain, *self.gain_interval)
        return f"{low:.1f}-{high:.1f}", gain


def certainties(rankings: Mapping[str, Both], owners: np.ndarray) -> dict[str, dict[str, Certainty]]:
    """How far the R@1 of each scorer can be believed, and what a query costs, by direction.

    `owners` (M,): the image of each text, of N images from 0 on, each with a text."""
    found: dict[str, dict[str, Certainty]] = {name: {} for name in rankings}
    for way in WAYS:
        asking = owners if way == TEXT_TO_IMAGE else np.unique(owners)  # the image of each query
        counts = np.bincount(asking)  # (N,)
        hits = np.stack([np.bincount(asking, both[way].ranks.numpy() < 1) for both in rankings.values()])  # (S, N)
        at_1 = dict(zip(rankings, 100 * hits.sum(1) / counts.sum(), strict=True))
        shares = dict(zip(rankings, resampled(hits, counts).T, strict=True))
        for name, both in rankings.items():
            gain = within = None
            if name != "clip" and "clip" in rankings:
                gain = round(float(at_1[name] - at_1["clip"]), 2)
                within = interval(shares[name] - shares["clip"])
            found[name][way] = Certainty(interval(shares[name]), gain, within, both[way].milliseconds)
    return found
