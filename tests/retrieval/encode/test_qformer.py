"""A trained run as a query encoder."""

import logging

import numpy as np
import pytest
import torch
from qf.pipeline.errors import ArtifactError, QfError
from qf.pipeline.features.codecs import decode
from qf.pipeline.features.reader import Features
from qf.retrieval.encode.qformer import Run, check_features
from qf.trainer.config import Stage1Config
from qf.trainer.stage1.stage import train

from conftest import TINY, run_extract  # isort: skip

CPU = torch.device("cpu")


def test_matching_gives_the_logit_of_each_pair(run, trained):
    features, rows, texts = Features(trained / "features"), np.array([5, 2]), ["a red bar", "a blue pole"]
    pairs = np.array([[1, 0], [0, 1], [1, 1]])
    model, tokens = run.embedder.model, run.embedder.tokens
    with torch.no_grad():
        images = [model.encode_image(decode(features.read(rows[n : n + 1]))) for n in range(2)]
        naive = [model.match(images[n], torch.tensor([0]), *tokens([texts[m]], 32))[0, 1].item() for n, m in pairs]
    assert run.matches
    assert run.matching(features, rows, texts, pairs) == pytest.approx(naive, abs=1e-5)


def test_a_text_longer_than_the_model_reads_is_truncated_with_a_warning(run, caplog):
    with caplog.at_level(logging.WARNING):
        run.query("a red bar")
        assert caplog.text == ""
        run.query("red " * 99)
    assert "the text has 101 tokens and is truncated: the model reads the first 32" in caplog.text


@pytest.mark.parametrize(
    ("query", "warning"),
    [
        ("a xylophone bar", "the model does not know 'xylophone'"),
        ("xylophone 猫, ёж", "the model knows no word of the text"),
        ("🐶", "the model knows no word of the text"),
    ],
)
def test_words_outside_the_vocabulary_are_named_in_a_warning(run, caplog, query, warning):
    run.query(query)
    assert warning in caplog.text


def test_a_matching_head_that_was_never_trained_does_not_match(features, tmp_path):
    train(features, tmp_path / "itc", Stage1Config(**TINY | {"epochs": 1, "losses": "itc"}), CPU)
    train(features, tmp_path / "all", Stage1Config(**TINY | {"epochs": 1}), CPU)
    assert Run(tmp_path / "all", CPU, "float32").matches
    run = Run(tmp_path / "itc", CPU, "float32")
    assert not run.matches
    with pytest.raises(QfError, match="matching head was never trained"):
        run.matching(features, np.array([0]), ["a red bar"], np.array([[0, 0]]))


def test_features_of_another_encoder_are_refused(run, pictures, onnx_folder, tmp_path):
    other = run_extract(pictures, onnx_folder, tmp_path / "features")
    with pytest.raises(ArtifactError, match=r"trained on features of encoder .* \(sha256 \w{12}\).*qf train --name"):
        check_features(run, other)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="qf train"):
        Run(tmp_path / "runs" / "none", CPU, "float32")
