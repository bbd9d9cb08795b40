"""The contact sheet, looked at pixel by pixel."""

import numpy as np
from PIL import Image
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.searcher import open_searcher
from qf.retrieval.sheet import contact_sheet

from conftest import COLOURS  # isort: skip


def test_a_contact_sheet_shows_every_hit_and_frames_the_wanted_one(trained, tmp_path):
    searcher = open_searcher(Workspace(trained), ComputeOptions("cpu", "float32"))
    searches = [(query, searcher.text(query, 4)) for query in ("a red bar", "a very long query " * 9_000)]
    contact_sheet(searches, tmp_path / "sheet.png", [searches[0][1][0].key, "none"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        assert sheet.width > 4 * 160
    assert (pixels == (38, 140, 70)).all(1).sum() > 1000  # the frame of the wanted hit
    assert (np.abs(pixels.astype(int) - COLOURS["red"]).sum(1) < 30).any()
