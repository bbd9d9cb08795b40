"""The encoder's own joint space as a query encoder."""

import numpy as np
import pytest
import torch
from qf.pipeline.errors import EncoderError, QfError
from qf.retrieval.encode.joint_space import JointSpace

from conftest import run_extract  # isort: skip

CPU = torch.device("cpu")


def test_images_are_the_pooled_embeddings_of_the_features(features):
    (images,) = JointSpace(features.encoder, CPU).images(features)
    assert (images[:, 0] == features.pooled).all()


def test_it_cannot_match_and_names_the_cure(features):
    encoder = JointSpace(features.encoder, CPU)
    assert not encoder.matches
    with pytest.raises(QfError, match="--rerank needs a trained model; train one first: qf train"):
        encoder.matching(features, np.array([0]), ["a red bar"], np.array([[0, 0]]))


def test_a_text_longer_than_the_text_model_reads_is_truncated_with_a_warning(features, caplog):
    encoder = JointSpace(features.encoder, CPU)
    encoder.query("a red bar")
    assert caplog.text == ""
    long = encoder.query("a red bar " * 9)
    assert "the text is truncated: the encoder's text model reads its first 16 tokens" in caplog.text
    assert long == pytest.approx(encoder.texts(["a red bar " * 5]), abs=1e-6)


@pytest.mark.parametrize(
    ("query", "warning"),
    [("a purple bar", "the encoder does not know 'purple'"), ("purple", "the encoder knows no word of the text")],
)
def test_words_outside_the_vocabulary_are_named_in_a_warning(features, caplog, query, warning):
    JointSpace(features.encoder, CPU).query(query)
    assert warning in caplog.text


def test_an_encoder_without_joint_space_is_refused(pictures, onnx_folder, tmp_path):
    features = run_extract(pictures, onnx_folder, tmp_path / "features")
    with pytest.raises(EncoderError, match=r"has no joint space with text; train a model first: qf train"):
        JointSpace(features.encoder, CPU)
