"""Training and measuring on features in which some images, or all, have no caption."""

from dataclasses import replace

import pytest
import torch
from qf.pipeline.config import ComputeOptions, EncoderOptions, ReadOptions
from qf.pipeline.errors import QfError, TrainingError
from qf.pipeline.extract.extract import extract_source
from qf.pipeline.features.reader import Features
from qf.pipeline.workspace import Workspace
from qf.retrieval.config import EvalOptions, SearchOptions
from qf.retrieval.encode.qformer import Run
from qf.retrieval.index.build import build_index
from qf.retrieval.journey import evaluate
from qf.retrieval.searcher import open_searcher
from qf.retrieval.sheet import contact_sheet
from qf.retrieval.verify import verify
from qf.trainer.config import Stage1Config
from qf.trainer.metrics.retrieval import RetrievalSet
from qf.trainer.stage1.stage import train

from conftest import TINY, draw, make_pictures  # isort: skip

CPU, ON = torch.device("cpu"), ComputeOptions("cpu", "float32")
SMALL = Stage1Config(**{**TINY, "epochs": 2, "batch_size": 4, "validate_every": 4})


def extracted(source, encoder, workspace):
    """Features of the source in a workspace."""
    reading = ReadOptions(allow_uncaptioned=True)
    extract_source(str(source), workspace / "features", EncoderOptions(str(encoder)), reading, on=ON)
    return Features(workspace / "features")


@pytest.fixture(scope="module")
def mixed(clip_folder, tmp_path_factory):
    """Features of the pictures, of which those of bars have no caption."""
    source = make_pictures(tmp_path_factory.mktemp("mixed"))
    rows = [line.split(",") for line in source.read_text().splitlines()]
    source.write_text("".join(f"{name},{'' if '-bar-' in name else text},{split}\n" for name, text, split in rows))
    return extracted(source, clip_folder, tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def bare(clip_folder, tmp_path_factory):
    """Features of the pictures without any caption."""
    source = make_pictures(tmp_path_factory.mktemp("bare"))
    source.unlink()
    return extracted(source.parent, clip_folder, tmp_path_factory.mktemp("workspace"))


def test_training_and_validation_see_the_captioned_images_alone(mixed, tmp_path):
    for split in ("train", "val"):
        assert (len(mixed.rows(split)), len(mixed.rows(split, captioned=True))) == (12, 8)
    data = RetrievalSet.of(mixed, "val")
    assert {mixed.keys[row].split("-")[1] for row in data.rows} == {"square", "pole"}
    assert data.image_rows.bincount().tolist() == [2] * 8
    made = train(mixed, tmp_path / "run", SMALL, CPU, cache_on_device=True)
    assert (made.steps, "text_to_image_R@1" in made.best) == (4, True)


def test_training_without_captions_is_an_error_that_names_search(bare, tmp_path):
    with pytest.raises(
        TrainingError, match="holds no captions: `qf search` works without training; training needs at least 2"
    ):
        train(bare, tmp_path / "run", SMALL, CPU)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_search_needs_neither_training_nor_captions(bare, tmp_path):
    searcher = open_searcher(Workspace(bare.folder.parent), ON)
    hits = searcher.search("a red square", SearchOptions(k=24))
    assert sorted(hit.key for hit in hits) == sorted(bare.keys)
    assert str(hits[0]) == f"  1  {hits[0].score:7.3f}  {hits[0].image}"
    contact_sheet([("a red square", hits)], tmp_path / "hits.png")
    draw("green", "pole").save(tmp_path / "query.png")
    assert searcher.search(None, SearchOptions(image=tmp_path / "query.png", k=1))[0].key == "green-pole-0.png"
    with pytest.raises(QfError, match="holds no captions to find; leave out --find text"):
        searcher.search(None, SearchOptions(image=tmp_path / "query.png", find="text"))
    with pytest.raises(QfError, match="holds no captions to measure with"):
        evaluate(Workspace(bare.folder.parent), EvalOptions(), None, ON, lambda text: None)
    assert verify(bare.folder).problems == []


def test_a_trained_run_indexes_pictures_without_captions(bare, trained, tmp_path):
    run = tmp_path / "runs" / "stage1"
    train(bare, run, replace(SMALL, init=str(trained / "runs" / "stage1"), epochs=0), CPU)
    opened = Run(run, CPU, "float32")
    made = build_index([opened], opened, bare, tmp_path / "index")
    assert (made.images, made.texts) == (24, 0)
    assert verify(tmp_path / "index").problems == []
    assert len(open_searcher(Workspace(tmp_path), ON).search("a red square", SearchOptions(k=5, rerank=8))) == 5
