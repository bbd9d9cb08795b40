"""The demo: its hits are judged by the scenes, its training is sized to the machine, and it resumes what it began."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from qf.data.scenes import QUERIES, fits, make_scene
from qf.pipeline.config import ComputeOptions
from qf.pipeline.errors import QfError
from qf.retrieval import demo as module
from qf.retrieval import demo_texts
from qf.retrieval.config import DEMO_EPOCHS, DemoOptions
from qf.retrieval.demo import LEAST_EPOCHS, TRAINING, cut_to, demo, epochs_within
from qf.retrieval.journey import Watch
from qf.trainer.runs.folder import read_settings
from qf.trainer.stage1.pace import Pace

ON = ComputeOptions("cpu", "float32")
IMAGES = {"train": 4000, "val": 250, "test": 500}
SCHEDULE = replace(TRAINING, epochs=8.0, batch_size=64, contrast_first=0.4)


def seconds_of(epochs, pace):
    """The whole journey, part by part, with the costs that the demo assumes; 62 steps are an epoch."""
    training = 0.4 * 62 * epochs * pace.itc + 0.6 * 62 * epochs * pace.full
    validations = epochs * 250 * module.VALIDATED * pace.full / 64
    return training + validations + (4750 * module.INDEXED + 500 * module.EVALUATED) * pace.full / 64


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_a_slow_machine_trains_as_many_tenths_of_an_epoch_as_fit(scale):
    pace = Pace(0.6 * scale, 1.6 * scale)
    epochs = epochs_within(270, pace, IMAGES, SCHEDULE)
    assert LEAST_EPOCHS < epochs < 8
    assert epochs == round(epochs, 1)
    assert seconds_of(epochs, pace) <= 270 < seconds_of(epochs + 0.11, pace)


def test_a_fast_machine_trains_the_full_schedule_and_no_longer():
    assert epochs_within(270, Pace(0.01, 0.03), IMAGES, SCHEDULE) == 8.0
    assert epochs_within(270, Pace(0.01, 0.03), IMAGES, replace(SCHEDULE, epochs=11.5)) == 11.5


def test_a_machine_that_is_too_slow_trains_the_least():
    assert epochs_within(270, Pace(20.0, 60.0), IMAGES, SCHEDULE) == LEAST_EPOCHS
    assert epochs_within(-5, Pace(0.5, 1.0), IMAGES, SCHEDULE) == LEAST_EPOCHS


def test_fewer_images_than_a_batch_are_a_step():
    assert epochs_within(270, Pace(30.0, 60.0), {"train": 48, "val": 3, "test": 6}, SCHEDULE) == pytest.approx(
        3.9, abs=0.5
    )


def test_the_line_says_what_is_left_out():
    assert cut_to(1.6) == f"1.6 epochs instead of {DEMO_EPOCHS:g}, to end within 5 minutes"
    assert "may take more than 5 minutes" in cut_to(LEAST_EPOCHS)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A demo on a slow machine, interrupted in its training and resumed: its folder, its lines, its result."""

    class Stop(Exception):
        pass

    def interrupt(line, total):
        raise Stop

    folder, said = tmp_path_factory.mktemp("slow") / "demo", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_pace", lambda *arguments: Pace(60.0, 120.0))
        with pytest.raises(Stop):
            demo(folder, DemoOptions(scenes=48), ON, Watch(said.append, training=interrupt))
        begun = read_settings(folder / "runs" / "demo")["train"]["epochs"]
        patch.setattr(module, "measure_pace", refuse)
        result = demo(folder, DemoOptions(scenes=48), ON, Watch(said.append))
    return folder, begun, said, result


def refuse(*arguments):
    raise AssertionError("nothing is to be measured")


def test_a_slow_machine_is_told_once_what_was_cut(slow):
    _, begun, said, result = slow
    (line,) = [text for text in said if "a minute" in text]
    assert line == f"this machine does 1 training step a minute: {cut_to(begun)}"
    assert f"\ncut       {cut_to(begun)}\n" in str(result)


def test_a_resumed_demo_takes_the_epochs_that_it_began_with(slow):
    folder, begun, _, result = slow
    assert LEAST_EPOCHS < begun < DEMO_EPOCHS
    assert read_settings(folder / "runs" / "demo")["train"]["epochs"] == begun
    assert result.train.steps == round(begun)
    assert result.to_json()["cut"] == cut_to(begun)


def test_each_hit_is_judged_by_its_scene(slow):
    *_, result = slow
    meanings = dict(QUERIES)
    scenes = [
        make_scene(0, split, index)
        for split, count in (("train", 48), ("val", 3), ("test", 6))
        for index in range(count)
    ]
    assert len(result.search) == 6
    for search in result.to_json()["search"]:
        meaning = meanings[search["query"]]
        assert search["possible"] == min(6, sum(fits(meaning, scene) for scene in scenes)) > 0
        assert len(search["hits"]) == 6
        for hit in search["hits"]:
            split, index = Path(hit["key"]).stem.split("-")
            assert hit["fits"] == fits(meaning, make_scene(0, split, int(index)))
        assert search["fitting"] == sum(hit["fits"] for hit in search["hits"])


def test_the_last_line_counts_the_hits_that_fit(slow):
    *_, result = slow
    fitting, possible = sum(one.fitting for one in result.search), sum(one.possible for one in result.search)
    last = str(result).splitlines()[-1]
    assert last == f"search    {fitting} of 36 hits fit their query ({possible} at best); see {result.sheet}"


@pytest.mark.parametrize("other", [{"epochs": 3.0}, {"seed": 1}])
def test_a_demo_with_other_options_needs_another_workspace(slow, other):
    with pytest.raises(QfError, match="another --workspace"):
        demo(slow[0], DemoOptions(scenes=48, **other), ON, Watch())


def test_given_epochs_are_trained_without_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure_pace", refuse)
    result = demo(tmp_path / "demo", DemoOptions(scenes=48, epochs=2), ON, Watch())
    assert result.train.steps == 2
    assert result.cut is None


def test_a_finished_demo_goes_on_with_captions_and_answers(slow, tmp_path, monkeypatch):
    folder, *_ = slow
    copy, said = tmp_path / "demo", []
    shutil.copytree(folder, copy)
    monkeypatch.setattr(module, "measure_pace", lambda *arguments: Pace(60.0, 120.0))
    result = demo(copy, DemoOptions(scenes=48, full=True), ON, Watch(said.append))
    texts = result.to_json()["texts"]
    assert (texts["caption_scores"]["texts"], texts["answer_scores"]["images"]) == (6, 6)
    assert set(texts["answer_scores"]["rows"]) == {"run", "run, shuffled images", "most frequent answer"}
    assert re.fullmatch(
        r"captions for \d\.\d epochs instead of 4 and answers for \d\.\d epochs instead of 4, to end within 5 minutes more",
        texts["cut"],
    )
    with Image.open(texts["sheet"]) as sheet:
        assert sheet.width > 1000
    monkeypatch.setattr(module, "measure_pace", refuse)
    again = demo(copy, DemoOptions(scenes=48, full=True), ON, Watch())
    assert again.to_json()["texts"]["cut"] == texts["cut"]


def test_stage_2_is_sized_to_the_machine():
    images = {"train": 8000, "val": 250, "test": 500}
    assert demo_texts.epochs_within(140, 0.003, images, "vqa") == demo_texts.TRAINING.epochs
    some = demo_texts.epochs_within(140, 0.02, images, "vqa")
    assert demo_texts.LEAST_EPOCHS < some < demo_texts.TRAINING.epochs
    seconds = 0.02 * (some * (0.32 * 8000 + 0.8 * 250) + 2.0 * 500)
    assert seconds <= 140 < seconds + 0.11 * 0.02 * (0.32 * 8000 + 0.8 * 250)
    assert demo_texts.epochs_within(140, 5.0, images, "caption") == demo_texts.LEAST_EPOCHS
