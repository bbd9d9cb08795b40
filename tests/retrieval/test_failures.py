"""The sheet of failures: which texts it shows, and the pictures beside them."""

import numpy as np
import pytest
import torch
from PIL import Image
from qf.pipeline.features.reader import Features
from qf.retrieval import failures as module
from qf.retrieval.encode.available import query_encoders
from qf.retrieval.failures import failed
from qf.retrieval.measure import SplitScores, rows_of
from qf.retrieval.mix_file import ENCODER, RUN_ALONE, TEXT_TO_IMAGE
from qf.trainer.metrics.retrieval import RetrievalSet


def test_texts_that_are_found_first_are_no_failures():
    assert failed(torch.tensor([0, 3, 0, 1])) == [1, 3]
    assert failed(torch.zeros(5)) == []
    assert failed(torch.ones(100), 4) == [0, 25, 50, 75]


@pytest.fixture
def measured(trained, run):
    features = Features(trained / "features")
    scores = SplitScores(features, RetrievalSet.of(features, "val"), query_encoders(features, run, torch.device("cpu")))
    scorers = {"clip": ENCODER, "itc": RUN_ALONE}
    return scores, scorers, scores.rankings(scorers, [4])


def searches_of(measured, path, monkeypatch):
    """What the sheet is made of: searches, wanted keys, notes and title."""
    scores, scorers, rankings = measured
    found = []
    monkeypatch.setattr(module, "contact_sheet", lambda *arguments: found.append(arguments))
    module.draw_failures(scores, scorers, rankings, rows_of(rankings), path)
    ((searches, _, wanted, notes, title),) = found
    return searches, wanted, notes, title


def test_the_right_picture_comes_first_and_then_those_ranked_before_it(measured, tmp_path, monkeypatch):
    scores, _, rankings = measured
    rows = rows_of(rankings)
    best = max(rows, key=lambda name: rows[name]["text_to_image_R@1"])
    ranked = rankings[best][TEXT_TO_IMAGE]
    searches, wanted, notes, title = searches_of(measured, tmp_path / "x.png", monkeypatch)
    failing = failed(ranked.ranks)
    assert len(searches) == len(failing) > 0
    assert title.startswith(f"{'encoder' if best == 'clip' else best.upper()}: {int((ranked.ranks > 0).sum())} of 24 ")
    for query, (text, hits), keys, note in zip(failing, searches, wanted, notes, strict=True):
        row = scores.data.rows[scores.data.image_rows[query]]
        rank = int(ranked.ranks[query]) + 1
        assert (text, keys) == (scores.data.texts[query], {scores.features.keys[row]})
        assert hits[0].key == scores.features.keys[row]
        assert text in hits[0].captions
        assert (hits[0].rank, note) == (rank, f"rank {rank} of 12")
        assert [hit.rank for hit in hits[1:]] == list(range(1, min(rank, 6)))
        chosen = [scores.features.keys[scores.data.rows[item]] for item in ranked.chosen[query].tolist()]
        assert [hit.key for hit in hits[1:]] == chosen[: len(hits) - 1]
        assert "+" in best or all(hit.score >= hits[0].score for hit in hits[1:])


def test_the_sheet_frames_the_right_pictures(measured, tmp_path):
    scores, scorers, rankings = measured
    module.draw_failures(scores, scorers, rankings, rows_of(rankings), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert int((pixels == (38, 140, 70)).all(-1).sum()) > 2000
