"""Searching with a trained model and without one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qf.pipeline.artifacts import read_manifest
from qf.pipeline.config import ComputeOptions
from qf.pipeline.encoders.picture import encode_picture
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import EncoderError, QfError, UsageError
from qf.pipeline.features.reader import Features
from qf.pipeline.workspace import Workspace
from qf.retrieval.config import EvalOptions, SearchOptions
from qf.retrieval.journey import evaluate, index_run
from qf.retrieval.mix_file import WAYS, Mix, Scorer, Weights, load_mix
from qf.retrieval.searcher import Searcher, open_searcher, untrained_searcher

from conftest import COLOURS, draw, reseal, run_extract  # isort: skip

CPU, ON = torch.device("cpu"), ComputeOptions("cpu", "float32")


@pytest.fixture(scope="module")
def searcher(trained):
    return open_searcher(Workspace(trained), ON)


def test_a_text_finds_what_it_was_trained_on(searcher):
    best = [searcher.text(f"a {colour} square", 1)[0].key for colour in COLOURS]
    assert sum(key.startswith(colour) for key, colour in zip(best, COLOURS, strict=True)) >= 3


def scores_of(searcher, trained, text):
    """The encoder's scores (N,) and the run's, of a text and all images, computed anew."""
    features, embedder = Features(trained / "features"), searcher.run.embedder
    clip = features.pooled @ TextModel(features.encoder, CPU).encode([text])[0]
    itc = (embedder.images(features, features.rows()) @ embedder.texts([text])[0]).numpy().max(1)
    return {"clip": clip, "itc": itc}


def best(features, scores, k):
    return [features.keys[i] for i in np.argsort(-scores, kind="stable")[:k]]


def with_weights(searcher, weights, rows=None):
    """A searcher of the same index whose mix has these weights."""
    changed = Searcher(searcher.index, searcher.features, CPU, searcher.run)
    changed._mix = Mix(Scorer(weights, weights), rows or {}), ""
    return changed


@pytest.mark.parametrize("scorer", ["mix", "itc", "encoder"])
def test_hits_come_in_the_order_of_the_full_score_matrix(searcher, trained, scorer):
    searcher = with_weights(searcher, Weights(0.75, 0.25, 1.0))
    hits = searcher.text("a red bar", 5, scorer=scorer)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert set(hits[0].to_json()) == {"rank", "key", "score", "image", "captions"}
    scores = scores_of(searcher, trained, "a red bar")
    clip, itc = {"mix": (0.75, 0.25), "itc": (0, 1), "encoder": (1, 0)}[scorer]
    naive = clip * scores["clip"] + itc * scores["itc"]
    assert [hit.key for hit in hits] == best(searcher.features, naive, 5)
    assert [hit.score for hit in hits] == pytest.approx(sorted(naive, reverse=True)[:5], abs=1e-5)


def test_the_weights_are_those_that_were_fitted(searcher, trained):
    scores, fitted = scores_of(searcher, trained, "a red bar"), searcher._mix[0].scorer.text_to_image
    naive = fitted.clip * scores["clip"] + fitted.itc * scores["itc"]
    assert [hit.key for hit in searcher.text("a red bar", 5)] == best(searcher.features, naive, 5)


def test_reranking_the_run_orders_by_matching_plus_first_score(searcher):
    first = {hit.key: hit.score for hit in searcher.text("the square is blue", 8, scorer="itc")}
    hits = searcher.text("the square is blue", 8, rerank=3, scorer="itc")
    assert {hit.key: hit.itc for hit in hits} == first
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].score == pytest.approx(hits[0].itc + hits[0].itm, abs=1e-4)
    assert {"itc", "itm"} < set(hits[0].to_json())


def test_reranking_the_mix_weighs_matching_as_fitted(searcher, trained):
    searcher = with_weights(searcher, Weights(0.5, 0.5, 0.25))
    first = {hit.key: hit.score for hit in searcher.text("the square is blue", 8)}
    itc = dict(zip(searcher.features.keys, scores_of(searcher, trained, "the square is blue")["itc"], strict=True))
    hits = searcher.text("the square is blue", 8, rerank=3)
    assert [hit.score for hit in hits] == pytest.approx([first[hit.key] + 0.25 * hit.itm for hit in hits], abs=1e-5)
    assert [hit.itc for hit in hits] == pytest.approx([itc[hit.key] for hit in hits], abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_model_without_weight_is_not_loaded(trained, monkeypatch):
    searcher = open_searcher(Workspace(trained), ON)
    with_weights(searcher, Weights(1.0, 0.0, 0.0)).text("a red bar", 3)
    assert "embedder" not in vars(searcher.run)
    monkeypatch.setattr("qf.pipeline.encoders.text.TextModel", None)  # calling it would fail
    with_weights(searcher, Weights(0.0, 1.0, 0.0)).text("a red bar", 3)


def test_a_picture_is_compared_in_the_encoders_space_unless_the_run_is_asked_for(searcher, tmp_path):
    draw("green", "pole", (80, 48)).save(tmp_path / "query.png")
    pooled = encode_picture(tmp_path / "query.png", searcher.features.encoder, CPU).pooled.numpy()[0]
    own = searcher.image(tmp_path / "query.png", 4)
    assert [hit.key for hit in own] == best(searcher.features, searcher.features.pooled @ pooled, 4)
    assert searcher.image(tmp_path / "query.png", 4, "encoder") == own
    assert searcher.image(tmp_path / "query.png", 4, "itc") != own


def test_captions_are_found_by_the_weights_of_image_to_text(searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "query.png")
    searcher = with_weights(searcher, Weights(0.25, 0.75, 1.0))
    seen = encode_picture(tmp_path / "query.png", searcher.features.encoder, CPU)
    captions = searcher.index.rows.texts(np.arange(48))
    clip = TextModel(searcher.features.encoder, CPU).encode(captions) @ seen.pooled.numpy()[0]
    itc = (searcher.run.texts(captions) @ searcher.run.picture(seen).T).max(1)
    naive = 0.25 * clip + 0.75 * itc
    hits = searcher.captions(tmp_path / "query.png", 5)
    assert [hit.score for hit in hits] == pytest.approx(sorted(naive, reverse=True)[:5], abs=1e-5)


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
    assert searcher.search("a red bar", SearchOptions(k=3, scorer="itc")) == searcher.text("a red bar", 3, scorer="itc")
    assert searcher.search(None, picture) == searcher.image(tmp_path / "query.png", 3)
    assert searcher.search(None, replace(picture, find="text")) == searcher.captions(tmp_path / "query.png", 3)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (None, SearchOptions(), "give either a text"),
        ("a red bar", SearchOptions(image=Path("x.png")), "give either a text"),
        ("a red bar", SearchOptions(find="text"), "--find text finds captions for a picture"),
        (None, SearchOptions(image=Path("x.png"), rerank=3), "--rerank matches pictures with a text"),
        ("a red bar", SearchOptions(scorer="encoder", rerank=3), "--rerank matches by a run"),
        ("a red bar", SearchOptions(scorer="clip"), "--scorer is one of mix, itc, encoder"),
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


# ---- when something is missing ----


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work")


def test_an_index_without_a_run_is_searched(features, tmp_path, caplog):
    shutil.copytree(features.folder, tmp_path / "features")
    index_run(Workspace(tmp_path), None, ON, print)
    searcher = open_searcher(Workspace(tmp_path), ON)
    text = TextModel(features.encoder, CPU).encode(["a red bar"])[0]
    hits = searcher.text("a red bar", 4)
    assert [hit.key for hit in hits] == best(features, features.pooled @ text, 4)
    assert hits == searcher.text("a red bar", 4, scorer="encoder")
    draw("red", "bar").save(tmp_path / "query.png")
    assert searcher.image(tmp_path / "query.png", 1)[0].key == "red-bar-0.png"
    assert len(searcher.captions(tmp_path / "query.png", 3)) == 3
    assert caplog.text == ""
    with pytest.raises(QfError, match=r"--rerank needs a trained model.*qf train"):
        searcher.text("x", 1, rerank=3)
    with pytest.raises(QfError, match=r"no embeddings of a run; train one first: qf train"):
        searcher.text("x", 1, scorer="itc")


def test_an_index_that_is_older_than_the_run_is_searched_with_a_warning(work, caplog):
    shutil.move(work / "runs", work / "later")
    index_run(Workspace(work), None, ON, print)
    shutil.move(work / "later", work / "runs")
    open_searcher(Workspace(work), ON).text("a red bar", 1)
    assert "the index does not know run stage1: searching by the encoder alone; `qf index` rebuilds it" in caplog.text


def test_without_a_mix_the_encoder_alone_ranks_with_a_warning(work, searcher, caplog):
    (work / "runs" / "stage1" / "mix.json").unlink()
    hits = open_searcher(Workspace(work), ON).text("a red bar", 5)
    assert "searching by the encoder alone: run " in caplog.text
    assert "`qf eval --fit-mix` fits one" in caplog.text
    assert hits == searcher.text("a red bar", 5, scorer="encoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "0" * 64}, "was fitted for other weights than the run's; `qf eval --fit-mix` refits it"),
        ({"features": "0" * 64}, "was fitted on other features; `qf eval --fit-mix` refits it"),
        ({"rows": {}}, "is not what this version of qf writes"),
    ],
)
def test_a_mix_that_does_not_fit_is_ignored_with_a_warning(work, caplog, change, message):
    reseal(work / "runs" / "stage1" / "mix.json", **change)
    assert len(open_searcher(Workspace(work), ON).text("a red bar", 5)) == 5
    assert "searching by the encoder alone: " in caplog.text
    assert message in caplog.text


def test_an_encoder_that_was_moved_away_is_done_without(pictures, clip_folder, trained, tmp_path, caplog):
    shutil.copytree(clip_folder, tmp_path / "encoder")
    run_extract(pictures, tmp_path / "encoder", tmp_path / "features")
    shutil.copytree(trained / "runs", tmp_path / "runs")
    workspace, said = Workspace(tmp_path), []
    evaluate(workspace, EvalOptions("val", [3], fit_mix=True), None, ON, print)
    index_run(workspace, None, ON, print)
    mix = load_mix(workspace.run(), read_manifest(workspace.run())["sha256"])[0]
    assert mix.scorer.text_to_image.clip > 0
    shutil.move(tmp_path / "encoder", tmp_path / "gone")
    alone = open_searcher(workspace, ON).text("a red bar", 3, scorer="itc")
    assert open_searcher(workspace, ON).text("a red bar", 3) == alone
    assert "searching by the run alone: encoder " in caplog.text
    with pytest.raises(EncoderError, match="no such folder"):
        open_searcher(workspace, ON).text("a red bar", 3, scorer="encoder")
    index_run(workspace, None, ON, said.append)
    assert said[1].startswith("without the encoder's own scores: encoder ")
    caplog.clear()
    assert open_searcher(workspace, ON).text("a red bar", 3) == alone
    assert "was fitted with the encoder's own scores, which are missing; `qf index` brings them back" in caplog.text
    with pytest.raises(QfError, match="no embeddings of the encoder; `qf index` adds them"):
        open_searcher(workspace, ON).text("a red bar", 3, scorer="encoder")
    caplog.clear()
    evaluate(workspace, EvalOptions("val", [3], fit_mix=True), None, ON, print)
    assert open_searcher(workspace, ON).text("a red bar", 3) == alone
    assert caplog.text == ""


def test_captions_that_are_not_there_are_not_found(searcher, tmp_path):
    bare = replace(searcher.index, rows=replace(searcher.index.rows, starts=np.zeros(25, np.int64)))
    empty = Searcher(bare, searcher.features, CPU, searcher.run)
    with pytest.raises(QfError, match="holds no captions to find"):
        empty.captions(tmp_path / "query.png", 3)


# ---- what validation says ----


def rows(**at_1):
    return {name.replace("_itm", "+itm@16"): {f"{way}_R@1": value for way in WAYS} for name, value in at_1.items()}


def test_searching_by_a_run_that_is_below_the_encoder_is_warned_of(searcher, caplog):
    low = with_weights(searcher, Weights(1.0, 0.0, 0.0), rows(clip=80.0, itc=50.0))
    low.text("a red bar", 1)
    assert caplog.text == ""
    low.text("a red bar", 1, scorer="itc")
    assert "on validation images the run alone ranks below the encoder itself (R@1 50.0 and 50.0 against" in caplog.text


def test_reranking_that_does_not_help_is_warned_of(searcher, caplog):
    low = with_weights(searcher, Weights(0.5, 0.5, 0.0), rows(clip=40.0, itc=50.0, itc_itm=45.0))
    low.text("a red bar", 1, rerank=4, scorer="itc")
    assert "re-ranking lowers R@1 of the run alone, from 50.0 to 45.0 (itc+itm@16)" in caplog.text
    caplog.clear()
    low.text("a red bar", 1, rerank=4)
    assert "its fitted weight is 0, and --rerank changes nothing" in caplog.text
