"""Questions and conversations in tables of every kind, and in the values of their cells."""

import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.questions import (
    BROKEN,
    TOO_LONG,
    TOO_MANY,
    UNANSWERED,
    answers_in,
    conversations_in,
    joined,
    questions_in,
    usable,
)
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError
from qf.pipeline.schema import Question

from conftest import write_files  # isort: skip

ROWS = [
    {"image": "a.jpg", "question": "How many?", "answers": ["2", "two"], "question_type": "count"},
    {"image": "b.jpg", "question": "Which colour?", "answers": ["red"], "question_type": "colour"},
    {"image": "a.jpg", "question": "Is it red?", "answers": ["no"], "question_type": "presence"},
]
ASKED = [(Question("How many?", ("2", "two"), "count"), Question("Is it red?", ("no",), "presence"))]
ASKED += [(Question("Which colour?", ("red",), "colour"),)]


def in_csv(rows):
    names = list(rows[0])
    cells = [[json.dumps(row[n]) if isinstance(row[n], list) else row[n] for n in names] for row in rows]
    return pl.DataFrame(cells, schema=names, orient="row").write_csv()


WRITERS = {
    "csv": lambda path, rows: path.write_text(in_csv(rows)),
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path, row_group_size=2),
    "arrow": lambda path, rows: pl.DataFrame(rows).write_ipc_stream(path, compat_level=pl.CompatLevel.oldest()),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_of_questions_become_records_without_captions(tmp_path, kind):
    write_files(tmp_path, {"a.jpg": "", "b.jpg": ""})
    path = tmp_path / f"d.{kind}"
    WRITERS[kind](path, ROWS)
    for source in (path, tmp_path):
        dataset = read(source)
        assert [(r.key, r.captions, r.questions, r.problem) for r in dataset.records] == [
            ("a.jpg", (), ASKED[0], ""),
            ("b.jpg", (), ASKED[1], ""),
        ]
        assert "question column 'question', answer column 'answers'" in dataset.found
        assert dataset.found.endswith("; 3 questions")
        assert (sum(dataset.records.questions.values()), dataset.records.optional) == (3, {"questions"})


def test_captions_and_questions_stand_in_one_table(tmp_path):
    """A caption that is repeated beside each question is one; an image may have only one of both, but not none."""
    rows = "image,caption,question,answer\na.jpg,x,How many?,2\na.jpg,x,Is it red?,no\nb.jpg,y,,\nc.jpg,,Why?,so\nd.jpg,,,\n"
    write_files(tmp_path, {**dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg"), ""), "d.csv": rows})
    dataset = read(tmp_path / "d.csv")
    a, b, c, d = dataset.records
    assert (a.captions, [q.answers for q in a.questions]) == (("x",), [("2",), ("no",)])
    assert (b.captions, b.questions) == (("y",), ())
    assert (c.captions, c.questions, c.problem) == ((), (Question("Why?", ("so",)),), "")
    assert d.problem == "no caption"
    assert "2 captions, 3 questions" in dataset.found


def test_a_row_a_person_gives_one_question_with_all_answers(tmp_path):
    rows = "image,question,answer\n" + "".join(f"a.jpg,How many?,{answer}\n" for answer in ("2", "two", "2"))
    write_files(tmp_path, {"a.jpg": "", "d.csv": rows})
    (record,) = read(tmp_path / "d.csv").records
    assert record.questions == (Question("How many?", ("2", "two", "2")),)


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path):
    rows = "image,question,answer\na.jpg,How many?,2\na.jpg,Why?,\nb.jpg,Who?,\n"
    write_files(tmp_path, {"a.jpg": "", "b.jpg": "", "d.csv": rows})
    dataset = read(tmp_path / "d.csv")
    assert f"left out: 2 {UNANSWERED}" in dataset.found
    assert [r.problem for r in dataset.records] == ["", "no caption, and no question or conversation that can be used"]
    assert len(read(tmp_path / "d.csv", ReadOptions(allow_uncaptioned=True)).records) == 2


def test_options_name_unusual_columns_with_and_without_a_header(tmp_path):
    write_files(
        tmp_path,
        {"a.jpg": "", "d.csv": "image,frage,antwort,art\na.jpg,Wie viele?,2,zahl\n", "e.csv": "a.jpg,Wie?,so\n"},
    )
    options = ReadOptions(question_column="frage", answer_column="antwort", type_column="art")
    (record,) = read(tmp_path / "d.csv", options).records
    assert record.questions == (Question("Wie viele?", ("2",), "zahl"),)
    options = ReadOptions(no_header=True, image_column="1", question_column="2", answer_column="3")
    (record,) = read(tmp_path / "e.csv", options).records
    assert record.questions == (Question("Wie?", ("so",)),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has no caption column \(it has image, question\).*'question' has no answers beside it.*--answer-column"),
        ({"question_column": "question"}, "has no answer column .*--answer-column"),
        ({"question_column": "frage"}, "has no column 'frage' .*check --question-column"),
    ],
)
def test_a_missing_column_of_answers_is_named(tmp_path, options, message):
    write_files(tmp_path, {"a.jpg": "", "d.csv": "image,question\na.jpg,Why?\n"})
    with pytest.raises(DatasetError, match=message):
        read(tmp_path / "d.csv", ReadOptions(**options))


def test_llava_json_is_a_table_of_conversations(tmp_path):
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Brown."},
    ]
    rows = [
        {"id": "1", "image": "coco/a.jpg", "conversations": talk},
        {"id": "2", "image": "coco/a.jpg", "conversations": talk[:2]},
        {"id": "3", "image": "coco/b.jpg", "conversations": talk[1:]},
        {"id": "4", "image": "coco/b.jpg", "conversations": talk[2:]},
    ]
    write_files(tmp_path, {"coco/a.jpg": "", "coco/b.jpg": "", "llava.json": json.dumps(rows)})
    dataset = read(tmp_path / "llava.json")
    assert [r.conversations for r in dataset.records] == [
        (("What is it?", "A dog.", "Which colour?", "Brown."), ("What is it?", "A dog.")),
        (("Which colour?", "Brown."),),
    ]
    assert f"left out: 1 {BROKEN}" in dataset.found
    assert dataset.found.endswith("; 3 conversations")


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("two", ["two"]),
        (" ", []),
        (None, []),
        (float("nan"), []),
        (2, ["2"]),
        (2.0, ["2"]),
        (2.5, ["2.5"]),
        (True, ["yes"]),
        (["2", " two ", None, 3], ["2", "two", "3"]),
        ([{"answer": "net", "answer_id": 1}, {"answer": "nets", "answer_confidence": "yes"}], ["net", "nets"]),
        ("['a', 'b']", ["a", "b"]),
        ('[{"answer": "a"}]', ["a"]),
        ("[0.1, 0.2]", ["[0.1, 0.2]"]),
        ("a \ud83d", ["a ?"]),
        ([["a"]], []),
    ],
)
def test_answers_of_every_spelling(value, answers):
    assert answers_in(value, lists=True) == answers


def test_questions_of_every_spelling():
    why, who = Question("Why?", ("so",), "reason"), Question("Who?", ("me", "you"))
    objects = [{"question": "Why?", "answer": "so", "type": "reason"}, {"question": "Who?", "answers": ["me", "you"]}]
    assert questions_in(objects) == questions_in(json.dumps(objects)) == [why, who]
    assert questions_in(["Why?", "Who?"], ["so", ["me", "you"]]) == [Question("Why?", ("so",)), who]
    assert questions_in(["Who?"], ["me", "you"]) == [who]
    assert questions_in("Why?", "so", "reason") == [why]
    assert questions_in("[Why?", "so") == [Question("[Why?", ("so",))]
    assert questions_in(None, "so") == questions_in(" ", "so") == questions_in({"question": {}}) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["q", "a"], [("q", "a")]),
        ([["q", "a"], ["r", "b", "s", "c"]], [("q", "a"), ("r", "b", "s", "c")]),
        ([{"role": "system", "content": "be"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [("q", "a")]),
        ([{"role": "user", "content": [{"type": "image"}, {"text": "q"}]}, {"role": "assistant", "content": "a"}], [("q", "a")]),
        ('[{"from": "human", "value": "q <image>"}, {"from": "gpt", "value": "a"}]', [("q", "a")]),
        ([{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"}], [("q", "a")]),
        ([{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}], [()]),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}], [()]),
        (["q", "a", "r"], [()]),
        ("no list", [()]),
        ([3, 4], [()]),
        (None, []),
        ([], []),
        ([[]], []),
        (5, []),
    ],
)  # fmt: skip
def test_conversations_of_every_spelling(value, found):
    assert conversations_in(value) == found


def test_what_is_too_long_or_too_many_is_left_out():
    long = "x" * 70_000
    asked = [Question(long, ("a",)), Question("q", (long,)), Question("r", ("a", long)), Question("s", ())]
    questions, talks, left_out = usable(asked, [(long, "a"), ("q", "a")])
    assert questions == (Question("r", ("a",)),)
    assert talks == (("q", "a"),)
    assert left_out == (TOO_LONG, TOO_LONG, UNANSWERED, TOO_LONG)
    many = [Question(str(n), ("a",)) for n in range(1003)]
    assert usable(many, []) == (tuple(many[:1000]), (), (TOO_MANY,) * 3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["question", "answer", "answers", "from", "value", "role", "text"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(VALUES, VALUES, VALUES, st.booleans())
def test_any_value_gives_clean_texts(value, answers, type, lists):
    for one in joined(questions_in(value, answers, type, lists)):
        assert one.question == one.question.strip() != ""
        assert all(answer == answer.strip() != "" for answer in one.answers)
        assert one.type is None or one.type.strip()
    for turns in conversations_in(value):
        assert len(turns) % 2 == 0
        assert all(turn.strip() for turn in turns)
