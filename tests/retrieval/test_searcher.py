"""Searching with a trained model and without one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qf.pipeline.config import ComputeOptions
from qf.pipeline.encoders.picture import encode_picture
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import EncoderError, QfError, UsageError
from qf.pipeline.features.reader import Features
from qf.pipeline.workspace import Workspace
from qf.retrieval.config import SearchOptions
from qf.retrieval.searcher import open_searcher, untrained_searcher

from conftest import COLOURS, draw, run_extract  # isort: skip

CPU, ON = torch.device("cpu"), ComputeOptions("cpu", "float32")


@pytest.fixture(scope="module")
def searcher(trained):
    return open_searcher(Workspace(trained), ON)


def test_a_text_finds_what_it_was_trained_on(searcher):
    best = [searcher.text(f"a {colour} square", 1)[0].key for colour in COLOURS]
    assert sum(key.startswith(colour) for key, colour in zip(best, COLOURS, strict=True)) >= 3


def test_hits_come_in_the_order_of_the_full_score_matrix(searcher, trained):
    hits = searcher.text("a red bar", 5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert all(first.score >= second.score for first, second in zip(hits, hits[1:], strict=False))
    assert set(hits[0].to_json()) == {"rank", "key", "score", "image", "captions"}
    features = Features(trained / "features")
    image = searcher.encoder.embedder.images(features, features.rows()).numpy()
    text = searcher.encoder.embedder.texts(["a red bar"]).numpy()[0]
    naive = (image @ text).max(1)
    assert [hit.key for hit in hits] == [features.keys[i] for i in np.argsort(-naive, kind="stable")[:5]]


def test_reranking_orders_by_matching_plus_first_score(searcher):
    first = {hit.key: hit.score for hit in searcher.text("the square is blue", 8)}
    hits = searcher.text("the square is blue", 8, rerank=3)
    assert {hit.key: hit.itc for hit in hits} == first
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].score == pytest.approx(hits[0].itc + hits[0].itm, abs=1e-4)
    assert {"itc", "itm"} < set(hits[0].to_json())


def test_a_picture_finds_itself_and_its_captions(searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 3)[0].key == "green-pole-0.png"
    texts = searcher.captions(tmp_path / "query.png", 4)
    assert all(len(hit.captions) == 1 for hit in texts)
    assert any("green" in hit.captions[0] for hit in texts)


def test_a_query_picture_is_prepared_as_the_features_were(pictures, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "encoder")
    searcher = untrained_searcher(run_extract(pictures, tmp_path / "encoder", tmp_path / "features"), ON)
    draw("red", "bar").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 1)[0].key == "red-bar-0.png"
    config = next((tmp_path / "encoder").glob("*processor_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(EncoderError, match="its preprocessing has changed; restore it"):
        searcher.image(tmp_path / "query.png", 1)


def test_before_training_search_uses_the_encoders_own_joint_space(features, clip_folder, tmp_path):
    searcher = untrained_searcher(features, ON)
    text = TextModel(features.encoder, CPU).encode(["a red bar"])[0]
    naive = features.pooled @ text
    assert [hit.key for hit in searcher.text("a red bar", 4)] == [features.keys[i] for i in np.argsort(-naive)[:4]]
    draw("red", "bar").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 1)[0].key == "red-bar-0.png"
    captions = [caption for some in features.captions for caption in some]
    query = encode_picture(tmp_path / "query.png", features.encoder, CPU).pooled.numpy()[0]
    naive = TextModel(features.encoder, CPU).encode(captions) @ query
    first = searcher.captions(tmp_path / "query.png", 3)
    assert [hit.captions for hit in first] == [[captions[i]] for i in np.argsort(-naive, kind="stable")[:3]]
    with pytest.raises(QfError, match="needs a trained model.*qf train"):
        searcher.text("x", 1, rerank=3)


def test_before_training_an_encoder_without_joint_space_is_refused(pictures, onnx_folder, tmp_path):
    with pytest.raises(EncoderError, match="no joint space.*qf train"):
        untrained_searcher(run_extract(pictures, onnx_folder, tmp_path / "features"), ON)


def test_an_empty_text_is_refused(searcher):
    with pytest.raises(QfError, match="the query is empty"):
        searcher.text("  ", 3)


def test_a_query_file_that_is_no_picture_is_refused(searcher, tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(QfError, match=r"x\.jpg: not an image"):
        searcher.image(tmp_path / "x.jpg", 3)


def test_the_options_choose_what_is_searched(searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "query.png")
    picture = SearchOptions(image=tmp_path / "query.png", k=3)
    assert searcher.search("a red bar", SearchOptions(k=3)) == searcher.text("a red bar", 3)
    assert searcher.search("a red bar", SearchOptions(k=3, rerank=5)) == searcher.text("a red bar", 3, 5)
    assert searcher.search(None, picture) == searcher.image(tmp_path / "query.png", 3)
    assert searcher.search(None, replace(picture, find="text")) == searcher.captions(tmp_path / "query.png", 3)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (None, SearchOptions(), "give either a text"),
        ("a red bar", SearchOptions(image=Path("x.png")), "give either a text"),
        ("a red bar", SearchOptions(find="text"), "--find text finds captions for a picture"),
        (None, SearchOptions(image=Path("x.png"), rerank=3), "--rerank matches pictures with a text"),
    ],
)
def test_options_that_do_not_go_together_are_refused(searcher, query, options, message):
    with pytest.raises(UsageError, match=message):
        searcher.search(query, options)


def test_a_hit_is_printed_with_its_scores_and_first_caption(searcher):
    (hit,) = searcher.text("a red bar", 1)
    assert str(hit) == f"  1  {hit.score:7.3f}  {hit.image}  {hit.captions[0]}"
    (hit,) = searcher.text("a red bar", 1, rerank=3)
    scores = f"(itc {hit.itc:.3f}, itm {hit.itm:.3f})"
    assert str(hit) == f"  1  {hit.score:7.3f}  {scores}  {hit.image}  {hit.captions[0]}"


def test_a_workspace_without_a_run_is_searched_with_a_warning(features, tmp_path, caplog):
    shutil.copytree(features.folder, tmp_path / "features")
    assert len(open_searcher(Workspace(tmp_path), ON).text("a red bar", 3)) == 3
    assert "no trained model yet: searching by the encoder's own embeddings" in caplog.text


def test_a_run_without_an_index_is_refused(trained, tmp_path):
    work = shutil.copytree(trained, tmp_path / "work", ignore=shutil.ignore_patterns("index"))
    with pytest.raises(QfError, match="has a trained run but no finished index; build it with `qf index`"):
        open_searcher(Workspace(work), ON)
