"""Who teaches the shared space, and what it comes to know."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from qf.pipeline.artifacts import read_manifest
from qf.pipeline.errors import EncoderError, TrainingError
from qf.pipeline.features.reader import Features
from qf.pipeline.results import no_status
from qf.trainer.config import Stage1Config
from qf.trainer.manifest import RUN
from qf.trainer.qformer import QFormer
from qf.trainer.runs.log import read_log
from qf.trainer.stage1.stage import train
from qf.trainer.stage1.teacher import find_teacher, fit_ridge, resolve_teacher
from qf.trainer.weights.read import read_weights

from conftest import TINY, run_extract  # isort: skip

CPU = torch.device("cpu")
FEW = TINY | {"epochs": 2, "validate_every": 1, "log_every": 1}


def quiet(text):
    """Hear nothing."""


@pytest.fixture(scope="module")
def clip_features(pictures, clip_folder, tmp_path_factory):
    return run_extract(pictures, clip_folder, tmp_path_factory.mktemp("taught") / "features", shard_size=7)


@pytest.fixture(scope="module")
def onnx_features(pictures, onnx_folder, tmp_path_factory):
    return run_extract(pictures, onnx_folder, tmp_path_factory.mktemp("onnx") / "features")


def test_by_default_the_encoder_teaches_where_it_has_text_and_the_space_is_new(
    clip_features, onnx_features, blip2_folder, bert_folder, trained
):
    auto = Stage1Config()
    assert resolve_teacher(auto, clip_features) == "encoder"
    assert resolve_teacher(replace(auto, init=str(bert_folder)), clip_features) == "encoder"
    assert resolve_teacher(replace(auto, init=str(blip2_folder)), clip_features) == "none"
    assert resolve_teacher(replace(auto, init=str(trained / "runs" / "stage1")), clip_features) == "none"
    assert resolve_teacher(replace(auto, losses="itm,itg"), clip_features) == "none"
    assert resolve_teacher(auto, onnx_features) == "none"
    assert resolve_teacher(replace(auto, teach="none"), clip_features) == "none"


def test_a_taught_run_has_the_teachers_width_and_logs_its_distance(clip_features, tmp_path):
    train(clip_features, tmp_path / "run", Stage1Config(**FEW | {"teach": "auto"}), CPU)
    manifest = read_manifest(tmp_path / "run", RUN)
    assert manifest["model"]["embed_dim"] == clip_features.encoder["joint"] == 24
    assert manifest["train"]["teach"] == "encoder"
    assert all(line["loss_teach"] > 0 for line in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in line)


def test_the_shared_space_comes_close_to_the_teachers(clip_features, tmp_path):
    config = Stage1Config(**TINY | {"epochs": 30, "teach": "encoder", "losses": "itc"})
    train(clip_features, tmp_path / "run", config, CPU)
    lines = [line["loss_teach"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0] / 3


def test_without_a_teacher_the_log_and_the_model_are_those_of_blip_2(clip_features, tmp_path):
    train(clip_features, tmp_path / "run", Stage1Config(**FEW), CPU)
    assert read_manifest(tmp_path / "run", RUN)["model"]["embed_dim"] == 256
    assert all("loss_teach" not in line for line in read_log(tmp_path / "run" / "metrics.jsonl"))


def test_a_taught_run_resumes_to_the_bit(clip_features, tmp_path):
    config = Stage1Config(**FEW | {"teach": "encoder", "epochs": 4, "checkpoint_every": 1})
    train(clip_features, tmp_path / "whole", config, CPU)

    class Killed(Exception):
        """In place of SIGKILL."""

    def stop(line, total):
        if line["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(clip_features, tmp_path / "twice", config, CPU, report=stop)
    train(clip_features, tmp_path / "twice", config, CPU)
    whole, twice = (read_weights(str(tmp_path / name)).state for name in ("whole", "twice"))
    assert all(torch.equal(whole[name], twice[name]) for name in whole)


def test_a_sentence_encoder_teaches_an_encoder_without_text(onnx_features, bert_folder, tmp_path):
    said = []
    config = Stage1Config(**FEW | {"teach": str(bert_folder)})
    train(onnx_features, tmp_path / "run", config, CPU, say=said.append)
    assert QFormer.from_pretrained(tmp_path / "run").config.embed_dim == 48
    assert any("a linear map from" in line for line in said)
    again = Features(onnx_features.folder)  # the captions are cached by now
    rows = again.rows("train")
    teacher = find_teacher(str(bert_folder), again, rows, CPU, quiet, no_status)
    assert_allclose(np.linalg.norm(teacher.images(np.arange(len(rows))), axis=1), 1, rtol=1e-5)
    assert teacher.texts(np.array([0, 1])).shape == (2, 48)


def test_the_ridge_finds_a_linear_map(onnx_features, tmp_path):
    """Captions whose embeddings are a linear map of the mean tokens are found by it, of images that it has not seen too."""
    rows = onnx_features.rows("train")

    class Known:
        firsts = np.arange(len(onnx_features) + 1)

        def read(self, numbers):
            tokens = onnx_features.read(numbers)["tokens"].double().mean(1).numpy()
            out = (tokens - centre) @ matrix
            return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)

    everything = onnx_features.read(onnx_features.rows())["tokens"].double().mean(1).numpy()
    centre, matrix = everything.mean(0), np.random.default_rng(0).normal(size=(3, 4))
    predicted, _, recall = fit_ridge(onnx_features, rows, Known())
    assert predicted.shape == (len(rows), 4)
    assert recall > 60
    assert (predicted * Known().read(rows)).sum(1).mean() > 0.9


def test_a_teacher_that_does_not_fit_is_refused(clip_features, onnx_features, trained, tmp_path):
    with pytest.raises(
        TrainingError, match="--teach encoder: .* has no joint space with text; name a sentence encoder"
    ):
        train(onnx_features, tmp_path / "a", Stage1Config(**FEW | {"teach": "encoder"}), CPU)
    config = Stage1Config(**FEW | {"teach": "encoder", "init": str(trained / "runs" / "stage1")})
    with pytest.raises(TrainingError, match="--teach encoder: its space is 24 wide, that of --init .* is 256"):
        train(clip_features, tmp_path / "b", config, CPU)
    with pytest.raises(EncoderError, match="nowhere"):
        train(clip_features, tmp_path / "c", Stage1Config(**FEW | {"teach": "nowhere!"}), CPU)
    with pytest.raises(TrainingError, match="--teach encoder teaches ITC: add itc to --losses itm"):
        train(clip_features, tmp_path / "d", Stage1Config(**FEW | {"teach": "encoder", "losses": "itm"}), CPU)
    assert not any(Path(tmp_path).iterdir())


def test_too_few_captioned_images_are_refused_before_the_teacher_is_asked(pictures, clip_folder, tmp_path):
    bare = shutil.copytree(pictures.parent, tmp_path / "photos", ignore=shutil.ignore_patterns("*.csv"))
    features = run_extract(bare, clip_folder, tmp_path / "features")
    with pytest.raises(TrainingError, match="holds no captions: `qf search` works without training"):
        train(features, tmp_path / "run", Stage1Config(**FEW | {"teach": "auto"}), CPU)
