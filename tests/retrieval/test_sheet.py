"""The contact sheet, looked at pixel by pixel."""

import numpy as np
from PIL import Image
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.searcher import open_searcher
from qf.retrieval.sheet import contact_sheet

from conftest import COLOURS  # isort: skip


GREEN = (38, 140, 70)


def drawn(searches, path, *wanted):
    contact_sheet(searches, path, *wanted)
    with Image.open(path) as sheet:
        return np.asarray(sheet.convert("RGB"))


def green(pixels):
    return int((pixels == GREEN).all(-1).sum())


def test_a_contact_sheet_shows_every_hit_and_frames_the_wanted_ones(trained, tmp_path):
    searcher = open_searcher(Workspace(trained), ComputeOptions("cpu", "float32"))
    searches = [(query, searcher.text(query, 4)) for query in ("a red bar", "a very long query " * 9_000)]
    plain = drawn(searches, tmp_path / "plain.png")
    assert plain.shape[1] > 4 * 160
    assert green(plain) == 0
    assert (np.abs(plain.astype(int) - COLOURS["red"]).sum(-1) < 30).any()

    keys = [hit.key for hit in searches[0][1]]
    none = drawn(searches, tmp_path / "none.png", [{"elsewhere"}, set()])
    one = drawn(searches, tmp_path / "one.png", [{keys[0]}, set()])
    three = drawn(searches, tmp_path / "three.png", [set(keys[:3]), set()])
    assert 0 < green(none) < 1000  # "0 of 4"
    assert green(one) - green(none) > 2000
    assert green(three) - green(none) > 6000
    half = len(three) // 2
    assert green(three[half:]) == green(none[half:])  # the other search has no frame
