"""How far a share can be believed: intervals by the bootstrap over images (Efron 1979), pure functions on counts.

Captions of one picture succeed and fail together, so images are drawn anew with replacement, each with all its captions. Letters:
S scorers, N images, R replicates. All scorers see the same drawn images: so the difference of two is a paired one."""

import numpy as np

REPLICATES, SEED = 2000, 0
CONFIDENCE = 0.95
DRAWN = 2**21  # images drawn at once, over replicates
Interval = tuple[float, float]


def resampled(hits: np.ndarray, counts: np.ndarray, replicates: int = REPLICATES, seed: int = SEED) -> np.ndarray:
    """hits (S, N), counts (N,) -> (R, S): the share of each scorer's hits, in percent, in each replicate.

    `hits` are the queries of each image that a scorer found, `counts` all its queries, one at least."""
    random, images = np.random.default_rng(seed), len(counts)
    table = np.stack([*hits, counts]).astype(float)  # (S + 1, N)
    shares = np.empty((replicates, len(hits)))
    step = max(1, DRAWN // images)
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        drawn = random.integers(images, size=(rows, images))
        drawn += images * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)  # each image was drawn
        sums = times @ table.T  # (rows, S + 1)
        shares[start : start + rows] = 100 * sums[:, :-1] / sums[:, -1:]
    return shares


def interval(values: np.ndarray) -> Interval:
    """values (R,) -> the bounds between which 95 % of them lie, and as many above as below."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return round(float(low), 2), round(float(high), 2)
