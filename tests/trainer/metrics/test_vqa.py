"""Answers are judged as VQAv2's official evaluation judges them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.metrics.vqa import accuracies, normalise_answer, vqa_accuracy

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden" / "vqa.json").read_text())


@pytest.mark.parametrize(("text", "normalised"), GOLDEN["normalised"])
def test_an_answer_is_normalised_as_officially(text, normalised):
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(("answer", "truths", "accuracy"), GOLDEN["accuracies"])
def test_ten_answers_give_the_official_accuracy(answer, truths, accuracy):
    assert vqa_accuracy(answer, truths) == pytest.approx(accuracy, abs=1e-12)


def test_the_mean_is_the_official_one():
    answers, truths, _ = zip(*GOLDEN["accuracies"], strict=True)
    assert accuracies(answers, truths) == {"accuracy": GOLDEN["overall"]}


@given(st.integers(2, 14), st.data())
def test_accuracy_against_a_naive_leave_one_out(people, data):
    truths = data.draw(st.lists(st.sampled_from("xyz"), min_size=people, max_size=people))
    enough = min(3, max(1, (people - 1) / 3))
    left = [truths[:n] + truths[n + 1 :] for n in range(people)]
    assert vqa_accuracy("x", truths) == pytest.approx(sum(min(1, t.count("x") / enough) for t in left) / people)


@pytest.mark.parametrize(
    ("truths", "accuracy"),
    [(["Red."], 1), (["blue"], 0), (["red", "red"], 1), (["red", "blue"], 0.5), (["red", "blue", "blue"], 2 / 3)],
)
def test_fewer_answers_are_normalised_and_need_fewer_matches(truths, accuracy):
    assert vqa_accuracy("the red", truths) == pytest.approx(accuracy)


@given(st.text(max_size=20), st.lists(st.text(max_size=8), min_size=1, max_size=12), st.randoms())
def test_accuracy_is_in_range_whatever_the_order_of_answers(answer, truths, random):
    accuracy = vqa_accuracy(answer, truths)
    assert 0 <= accuracy <= 1
    random.shuffle(truths)
    assert vqa_accuracy(answer, truths) == accuracy


def test_accuracies_are_in_percent_over_all_and_per_type():
    scores = accuracies(["yes", "2", "no"], [["yes"], ["two"], ["yes"]], ["yes/no", "number", "yes/no"])
    assert scores == {"accuracy": 66.67, "accuracy_yes/no": 50.0, "accuracy_number": 100.0}


@pytest.mark.parametrize(
    ("answers", "truths", "types", "message"),
    [
        ([], [], [], "no answers to score"),
        (["a"], [], [], "1 answers, but truths of 0 questions"),
        (["a"], [["a"]], ["x", "y"], "types of 2"),
        (["a"], [[]], [], "a question has no answer to compare with"),
    ],
)
def test_unusable_input_is_an_error_of_one_line(answers, truths, types, message):
    with pytest.raises(ValueError, match=message):
        accuracies(answers, truths, types)
