"""The library calls behind the commands: what they say about the mix."""

import shutil

import pytest
from qf.pipeline.config import ComputeOptions
from qf.pipeline.errors import QfError
from qf.pipeline.workspace import Workspace
from qf.retrieval.config import EvalOptions
from qf.retrieval.journey import evaluate

from conftest import reseal  # isort: skip

ON = ComputeOptions("cpu", "float32")


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work")


def test_an_evaluation_says_what_validation_shows_about_run_and_matching(work):
    low, high = (
        {f"{way}_R@{k}": at for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)} for at in (3.0, 9.0)
    )
    rows = {"clip": high, "itc": low, "itc+itm@16": low | {"text_to_image_R@1": 2.0}, "mix": high}
    reseal(work / "runs" / "stage1" / "mix.json", rows=rows)
    said = []
    result = evaluate(Workspace(work), EvalOptions("val", [3]), None, ON, said.append)
    assert list(result.rows) == ["clip", "itc", "itc+itm@3", "mix", "mix+itm@3"]
    assert said[1].startswith(
        "on validation images the run alone ranks below the encoder itself (R@1 3.0 and 3.0 against"
    )
    assert said[2].startswith(
        "on validation images re-ranking lowers R@1 of the run alone, from 3.0 to 2.5 (itc+itm@16)"
    )


def test_a_mix_of_another_run_is_not_evaluated(work):
    reseal(work / "runs" / "stage1" / "mix.json", run="0" * 64)
    said = []
    assert "mix" not in evaluate(Workspace(work), EvalOptions("val", [3]), None, ON, said.append).rows
    assert said[0].startswith("no mix: ")
    assert said[0].endswith("mix.json was fitted for other weights than the run's; `qf eval --fit-mix` refits it")
    assert "mix" in evaluate(Workspace(work), EvalOptions("val", [3], fit_mix=True), None, ON, print).rows


def test_without_a_run_there_is_no_mix_to_fit(work):
    shutil.rmtree(work / "runs")
    with pytest.raises(QfError, match="--fit-mix fits the weights of a run, and there is none yet; train one first"):
        evaluate(Workspace(work), EvalOptions("val", [3], fit_mix=True), None, ON, print)
