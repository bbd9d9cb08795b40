"""Who can embed queries: the encoder itself, a run, or both."""

import pytest
import torch
from qf.pipeline.errors import EncoderError, QfError
from qf.pipeline.features.reader import Features
from qf.retrieval.encode.available import query_encoders

from conftest import run_extract  # isort: skip

CPU = torch.device("cpu")


def test_the_encoder_comes_before_the_run(trained, run):
    features = Features(trained / "features")
    assert [encoder.name for encoder in query_encoders(features, run, CPU)] == ["clip", "itc"]
    assert [encoder.name for encoder in query_encoders(features, None, CPU)] == ["clip"]


def test_an_encoder_without_text_model_and_no_run_is_one_line(pictures, onnx_folder, tmp_path):
    features = run_extract(pictures, onnx_folder, tmp_path / "features")
    with pytest.raises(QfError, match="has no text model and there is no run yet; train one first: qf train"):
        query_encoders(features, None, CPU)


def test_a_run_does_without_the_encoder_that_made_its_features(trained, run, monkeypatch):
    def gone(*_):
        raise EncoderError("encoder some: no such folder")

    monkeypatch.setattr("qf.pipeline.encoders.text.TextModel", gone)
    features, said = Features(trained / "features"), []
    assert query_encoders(features, run, CPU, said.append) == [run]
    assert said == ["without the encoder's own scores: encoder some: no such folder"]
    with pytest.raises(EncoderError, match="no such folder"):
        query_encoders(features, None, CPU)
