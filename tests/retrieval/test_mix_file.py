"""mix.json: what it says, and what it is bound to."""

import pytest
from qf.pipeline.errors import ArtifactError
from qf.retrieval.mix_file import (
    WAYS,
    Mix,
    Scorer,
    Weights,
    below_encoder,
    harmed_by_matching,
    load_mix,
    read_mix,
    save_mix,
)

RUN, FEATURES = "1" * 64, "2" * 64


def row(*at_1):
    return {f"{way}_R@{k}": value for way, value in zip(WAYS, at_1, strict=True) for k in (1, 5, 10)}


MIX = Mix(
    Scorer(Weights(0.75, 0.25, 0.125), Weights(1.0, 0.0, 0.0)),
    {"clip": row(70.0, 80.0), "itc": row(60.0, 70.0), "mix": row(75.0, 82.5)},
)


@pytest.fixture
def folder(tmp_path):
    save_mix(tmp_path, MIX, RUN, FEATURES, 20, 100)
    return tmp_path


def test_a_mix_is_read_as_it_was_saved(folder):
    assert read_mix(folder, RUN, FEATURES, encoder=True) == MIX
    assert load_mix(folder, RUN)[1]["images"] == 20
    assert read_mix(folder / "elsewhere", RUN, FEATURES, encoder=True) is None


@pytest.mark.parametrize(
    ("run", "features", "encoder", "message"),
    [
        (FEATURES, FEATURES, True, "for other weights than the run's; `qf eval --fit-mix` refits it"),
        (RUN, RUN, True, "on other features; `qf eval --fit-mix` refits it"),
        (RUN, FEATURES, False, "with the encoder's own scores, which are missing"),
    ],
)
def test_a_mix_of_something_else_is_refused(folder, run, features, encoder, message):
    with pytest.raises(ArtifactError, match=message):
        read_mix(folder, run, features, encoder)


def test_a_mix_that_was_fitted_without_the_encoder_is_refused_where_it_is_there(tmp_path):
    save_mix(tmp_path, Mix(MIX.scorer, {"itc": row(1.0, 2.0), "mix": row(1.0, 2.0)}), RUN, FEATURES, 1, 1)
    with pytest.raises(ArtifactError, match="was fitted without the encoder's own scores; `qf eval --fit-mix` refits"):
        read_mix(tmp_path, RUN, FEATURES, encoder=True)
    assert read_mix(tmp_path, RUN, FEATURES, encoder=False) is not None


def test_a_damaged_mix_is_refused(folder):
    path = folder / "mix.json"
    path.write_text(path.read_text().replace("0.75", "0.85"))
    with pytest.raises(ArtifactError, match=r"is damaged or was edited.*; `qf eval --fit-mix` refits it"):
        load_mix(folder, RUN)


def test_the_text_has_the_weights_and_what_they_reached():
    assert str(MIX) == (
        "text to image 0.75 clip + 0.25 itc + 0.125 itm, image to text 1 clip; validation R@1 both ways: "
        "clip 70.0 and 80.0, itc 60.0 and 70.0, mix 75.0 and 82.5"
    )


def test_a_run_below_the_encoder_is_named_with_what_helps():
    line = below_encoder(MIX.rows)
    assert line.startswith("the run alone ranks below the encoder itself (R@1 60.0 and 70.0 against 70.0 and 80.0): ")
    assert "--epochs" in line
    assert below_encoder({"clip": row(70.0, 80.0), "itc": row(60.0, 90.0)}) is None
    assert below_encoder({"itc": row(60.0, 90.0)}) is None


def test_matching_that_lowers_recall_is_named():
    rows = {"itc": row(60.0, 70.0), "itc+itm@16": row(55.0, 80.0)}
    assert harmed_by_matching(rows) is None
    assert "from 60.0 to 55.0 (itc+itm@16)" in harmed_by_matching(rows, "text_to_image")
    assert harmed_by_matching({"itc": row(60.0, 70.0)}) is None
