"""The mix of a real run, fitted on its validation images."""

import shutil

import numpy as np
import pytest
import torch
from qf.pipeline.errors import QfError
from qf.pipeline.features.reader import Features
from qf.retrieval.encode.available import query_encoders
from qf.retrieval.encode.qformer import Run
from qf.retrieval.evaluate import evaluate_retrieval
from qf.retrieval.mix_file import WAYS
from qf.retrieval.validation import ensured_mix, fit_mix, stored_mix

CPU = torch.device("cpu")


@pytest.fixture
def work(trained, tmp_path):
    """Features, a run without a mix, and the encoders of both."""
    work = shutil.copytree(trained, tmp_path / "work", ignore=shutil.ignore_patterns("mix.json"))
    features, run = Features(work / "features"), Run(work / "runs" / "stage1", CPU, "float32")
    return features, run, query_encoders(features, run, CPU)


def test_the_fitted_mix_is_stored_and_as_good_as_it_says(work):
    features, _, encoders = work
    assert stored_mix(*work) is None
    said = []
    mix = fit_mix(*work, said.append)
    assert stored_mix(*work) == mix
    assert said == ["fitting the mix on 12 validation images", f"mix: {mix}"]
    assert evaluate_retrieval(features, "val", encoders, [16], mix).rows == mix.rows


def test_on_validation_the_mix_is_not_below_the_others(work):
    rows = fit_mix(*work, print).rows
    assert list(rows) == ["clip", "itc", "itc+itm@16", "mix", "mix+itm@16"]
    for way in WAYS:
        at_1 = {name: row[f"{way}_R@1"] for name, row in rows.items()}
        assert at_1["mix+itm@16"] >= at_1["mix"] >= max(at_1["clip"], at_1["itc"])


def test_a_mix_that_is_there_is_not_fitted_again(work):
    said = []
    mix = ensured_mix(*work, said.append)
    assert len(said) == 2
    assert ensured_mix(*work, said.append) == mix
    assert len(said) == 2


def test_the_mix_of_a_run_alone_weighs_only_matching(work):
    features, run, _ = work
    mix = fit_mix(features, run, [run], print)
    assert list(mix.rows) == ["itc", "itc+itm@16", "mix", "mix+itm@16"]
    assert (mix.scorer.text_to_image.clip, mix.scorer.text_to_image.itc) == (0.0, 1.0)


def test_a_run_that_cannot_match_has_no_rows_of_matching(work):
    features, run, encoders = work
    torch.nn.init.zeros_(run.embedder.model.itm_head.bias)  # as before the first step that trains the head
    mix = fit_mix(features, run, encoders, print)
    assert list(mix.rows) == ["clip", "itc", "mix"]
    assert mix.scorer.text_to_image.itm == 0


def test_without_captions_in_the_validation_split_there_is_no_mix(work, monkeypatch):
    features, run, encoders = work
    monkeypatch.setattr(features, "rows", lambda split=None, captioned=False: np.arange(0))
    said = []
    with pytest.raises(
        QfError, match="no mix is fitted: .* has no images with captions in the split val; extract with"
    ):
        fit_mix(features, run, encoders, said.append)
    assert ensured_mix(features, run, encoders, said.append) is None
    assert said[0].endswith("until then search ranks by the encoder alone")
