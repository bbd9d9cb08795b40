"""The plot of R@1 against time, looked at pixel by pixel."""

import numpy as np
from PIL import Image
from qf.retrieval.certainty import Certainty
from qf.retrieval.mix_file import WAYS
from qf.retrieval.plot import draw_tradeoff


def drawn(path, **times):
    """The pixels of a plot of scorers that take so many milliseconds."""
    rows = {name.replace("_", "+itm@"): dict.fromkeys([f"{way}_R@1" for way in WAYS], 50.0) for name in times}
    certainty = {
        name: {way: Certainty((45.0, 55.0), None, None, time) for way in WAYS}
        for name, time in zip(rows, times.values(), strict=True)
    }
    draw_tradeoff(rows, certainty, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def blue(pixels):
    return int((pixels == (31, 119, 180)).all(-1).sum())


def test_each_scorer_is_drawn_and_joined_with_its_re_ranked_ones(tmp_path):
    encoder = drawn(tmp_path / "a.png", clip=0.1)
    alone = drawn(tmp_path / "b.png", clip=0.1, itc=1.0)
    joined = drawn(tmp_path / "c.png", clip=0.1, itc=1.0, itc_4=10.0, itc_16=100.0)
    assert encoder.shape == alone.shape == joined.shape
    assert blue(encoder) == 0 < blue(alone)
    assert blue(joined) > 2 * blue(alone)
