"""Searching with a trained model and without one."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from qf.pipeline.config import ComputeOptions
from qf.pipeline.encoders.picture import encode_picture
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import EncoderError, QfError
from qf.pipeline.features.reader import Features
from qf.pipeline.workspace import Workspace
from qf.retrieval.searcher import open_searcher, untrained_searcher
from qf.retrieval.sheet import contact_sheet

from conftest import COLOURS, draw, run_extract  # isort: skip

CPU, ON = torch.device("cpu"), ComputeOptions("cpu", "float32")


@pytest.fixture(scope="module")
def searcher(trained):
    return open_searcher(Workspace(trained), ON)


def test_a_text_finds_what_it_was_trained_on(searcher):
    best = [searcher.text(f"a {colour} square", 1)[0].key for colour in COLOURS]
    assert sum(key.startswith(colour) for key, colour in zip(best, COLOURS, strict=True)) >= 3


def test_hits_are_ranked_and_say_what_they_show(searcher, trained):
    hits = searcher.text("a red bar", 5)
    assert [a.rank for a in hits] == [1, 2, 3, 4, 5]
    assert all(a.score >= b.score for a, b in zip(hits, hits[1:], strict=False))
    assert set(hits[0].to_json()) == {"rank", "key", "score", "image", "captions"}
    features = Features(trained / "features")
    image = searcher.encoder.embedder.images(features, features.rows()).numpy()
    text = searcher.encoder.embedder.texts(["a red bar"]).numpy()[0]
    naive = (image @ text).max(1)
    assert [a.key for a in hits] == [features.keys[i] for i in np.argsort(-naive, kind="stable")[:5]]


def test_reranking_orders_by_matching_plus_first_score(searcher):
    first = {a.key: a.score for a in searcher.text("the square is blue", 8)}
    hits = searcher.text("the square is blue", 8, rerank=3)
    assert {a.key: a.itc for a in hits} == first
    assert [a.score for a in hits] == sorted((a.score for a in hits), reverse=True)
    assert hits[0].score == pytest.approx(hits[0].itc + hits[0].itm, abs=1e-4)
    assert {"itc", "itm"} < set(hits[0].to_json())


def test_a_picture_finds_itself_and_its_captions(searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 3)[0].key == "green-pole-0.png"
    texts = searcher.captions(tmp_path / "query.png", 4)
    assert all(len(a.captions) == 1 for a in texts)
    assert any("green" in a.captions[0] for a in texts)


def test_a_query_picture_is_prepared_as_the_features_were(pictures, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "encoder")
    searcher = untrained_searcher(run_extract(pictures, tmp_path / "encoder", tmp_path / "features"), ON)
    draw("red", "bar").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 1)[0].key == "red-bar-0.png"
    config = next((tmp_path / "encoder").glob("*processor_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(EncoderError, match="its preprocessing has changed; restore it"):
        searcher.image(tmp_path / "query.png", 1)


def test_before_training_the_encoders_own_space_is_searched(features, clip_folder, tmp_path):
    searcher = untrained_searcher(features, ON)
    text = TextModel(features.encoder, CPU).encode(["a red bar"])[0]
    naive = features.pooled @ text
    assert [a.key for a in searcher.text("a red bar", 4)] == [features.keys[i] for i in np.argsort(-naive)[:4]]
    draw("red", "bar").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 1)[0].key == "red-bar-0.png"
    captions = [caption for some in features.captions for caption in some]
    query = encode_picture(tmp_path / "query.png", features.encoder, CPU).pooled.numpy()[0]
    naive = TextModel(features.encoder, CPU).encode(captions) @ query
    first = searcher.captions(tmp_path / "query.png", 3)
    assert [a.captions for a in first] == [[captions[i]] for i in np.argsort(-naive, kind="stable")[:3]]
    with pytest.raises(QfError, match="needs a trained model.*qf train"):
        searcher.text("x", 1, rerank=3)


def test_a_text_longer_than_the_encoders_text_model_reads_is_truncated_with_a_warning(features, caplog):
    searcher = untrained_searcher(features, ON)
    searcher.text("a red bar", 1)
    assert caplog.text == ""
    searcher.text("a red bar " * 9, 1)
    assert "the text is truncated: the encoder's text model reads its first 16 tokens" in caplog.text


def test_an_encoder_without_text_says_to_train(pictures, onnx_folder, tmp_path):
    with pytest.raises(EncoderError, match="no joint space.*qf train"):
        untrained_searcher(run_extract(pictures, onnx_folder, tmp_path / "features"), ON)


def test_wrong_queries(searcher, tmp_path):
    with pytest.raises(QfError, match="the query is empty"):
        searcher.text("  ", 3)
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(QfError, match=r"x\.jpg: not an image"):
        searcher.image(tmp_path / "x.jpg", 3)


def test_a_contact_sheet_shows_every_hit(searcher, tmp_path):
    searches = [(query, searcher.text(query, 4)) for query in ("a red bar", "a very long query " * 9_000)]
    contact_sheet(searches, tmp_path / "sheet.png", [searches[0][1][0].key, "none"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        assert sheet.width > 4 * 160
    assert (pixels == (38, 140, 70)).all(1).sum() > 1000  # the frame of what was wanted
    assert (np.abs(pixels.astype(int) - COLOURS["red"]).sum(1) < 30).any()
