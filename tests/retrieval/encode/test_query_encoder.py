"""The one face of a query encoder, tried on each of them: a trained run, and the encoder's own joint space."""

import numpy as np
import pytest
import torch
from qf.pipeline.encoders.picture import encode_picture
from qf.retrieval.encode.joint_space import JointSpace
from qf.retrieval.encode.qformer import Run

from conftest import draw  # isort: skip

CPU = torch.device("cpu")
TEXTS = ["a red bar", "the pole is blue", "a green square"]


@pytest.fixture(scope="module", params=["run", "joint space"])
def encoder(request, trained, features):
    if request.param == "run":
        return Run(trained / "runs" / "stage1", CPU, "float32")
    return JointSpace(features.encoder, CPU)


def test_texts_pictures_and_images_have_the_promised_shapes(encoder, features, tmp_path):
    draw("red", "bar").save(tmp_path / "query.png")
    seen = encode_picture(tmp_path / "query.png", features.encoder, CPU)
    found = {
        "query": encoder.query(TEXTS[0]),
        "texts": encoder.texts(TEXTS),
        "picture": encoder.picture(seen),
        "images": np.concatenate(list(encoder.images(features))),
    }
    assert {name: value.shape for name, value in found.items()} == {
        "query": (1, encoder.width),
        "texts": (3, encoder.width),
        "picture": (encoder.per_image, encoder.width),
        "images": (24, encoder.per_image, encoder.width),
    }
    for value in found.values():
        assert value.dtype == np.float32
        assert np.linalg.norm(value, axis=-1) == pytest.approx(1, abs=1e-5)


def test_a_query_is_embedded_as_the_same_text_among_others(encoder):
    assert encoder.query(TEXTS[1])[0] == pytest.approx(encoder.texts(TEXTS)[1], abs=1e-6)


def test_no_texts_give_an_empty_array(encoder):
    assert encoder.texts([]).shape == (0, encoder.width)
