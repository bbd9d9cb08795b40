"""Questions in files of their own: --questions, joined to the images of a source by their names."""

import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.questions import BROKEN, UNANSWERED
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError
from qf.pipeline.schema import Question

from conftest import write_files  # isort: skip

CAPTIONS = "image,caption\nimages/a.jpg,x\nimages/b.jpg,y\nimages/c.jpg,\n"
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def asked(image, question="Why?", answer="so"):
    return {"image": image, "question": question, "answer": answer}


@pytest.fixture
def source(tmp_path):
    return write_files(tmp_path, {**{f"images/{n}.jpg": "" for n in "abc"}, "d.csv": CAPTIONS}) / "d.csv"


def joined(source, *files, **options):
    return read(source, ReadOptions(questions=[source.parent / name for name in files], **options))


def answers(dataset):
    return [[(q.question, *q.answers) for q in record.questions] for record in dataset.records]


def test_questions_are_joined_by_name_and_an_image_with_one_needs_no_caption(source):
    rows = asked("images/a.jpg"), asked("images/c.jpg", "Who?", ["me", "you"]), asked("images/a.jpg", "Where?", "here")
    write_files(source.parent, {"q.jsonl": lines(*rows)})
    dataset = joined(source, "q.jsonl")
    assert answers(dataset) == [[("Why?", "so"), ("Where?", "here")], [], [("Who?", "me", "you")]]
    assert [r.problem for r in dataset.records] == [""] * 3
    assert dataset.found.endswith("; 2 captions, 3 questions")
    assert dataset.records.sha256 != read(source).records.sha256


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png", "/mnt/data/a.jpg", r"C:\data\a.jpg", "https://x.org/a.jpg"])
def test_the_end_of_a_name_is_enough_where_it_is_the_only_one(source, name):
    write_files(source.parent, {"q.jsonl": lines(asked(name))})
    assert answers(joined(source, "q.jsonl")) == [[("Why?", "so")], [], []]


def test_ids_mean_the_images_of_coco(tmp_path):
    names = ["COCO_val2014_000000000042.jpg", "000000000007.jpg", "2370799.jpg"]
    rows = "file_name,caption\n" + "".join(f"{name},x\n" for name in names)
    ids = lines(*({"image_id": n, "question": "Why?", "answer": f"{n}"} for n in (42, 7, 2370799, 43)))
    write_files(tmp_path, {**dict.fromkeys(names, ""), "d.csv": rows, "q.jsonl": ids})
    dataset = joined(tmp_path / "d.csv", "q.jsonl")
    assert [r.questions[0].answers for r in dataset.records] == [("42",), ("7",), ("2370799",)]
    assert "; 1 question about images that it does not have left out; 3 captions, 3 questions" in dataset.found


def test_a_name_that_could_be_two_images_is_none(tmp_path):
    names = ["train/1.jpg", "val/1.jpg", "val/2.jpg"]
    rows = "file_name,caption\n" + "".join(f"{name},x\n" for name in names)
    write_files(tmp_path, {**dict.fromkeys(names, ""), "d.csv": rows})
    files = {"q.jsonl": lines(asked("1.jpg"), asked("val/1.jpg", "Who?"), asked("train/2.jpg"), asked("test/2.jpg"))}
    write_files(tmp_path, files)
    assert answers(joined(tmp_path / "d.csv", "q.jsonl")) == [[], [("Who?", "so")], []]


def test_several_files_of_any_kind_are_joined(source):
    folder = source.parent
    write_files(
        folder, {"q.jsonl": lines(asked("a.jpg")), "t.json": json.dumps([{"image": "b.jpg", "conversations": TALK}])}
    )
    write_files(folder, {"r.csv": "img,frage,antwort\nb.jpg,Wer?,ich\n"})
    pl.DataFrame({"image": ["a.jpg"], "question": ["How?"], "answers": [["so", "thus"]]}).write_parquet(
        folder / "p.parquet"
    )
    dataset = joined(source, "q.jsonl", "t.json", "p.parquet", allow_uncaptioned=True)
    assert answers(dataset) == [[("Why?", "so"), ("How?", "so", "thus")], [], []]
    assert [r.conversations for r in dataset.records] == [(), (("What?", "It."),), ()]
    named = {"image_column": "image", "question_column": "frage", "answer_column": "antwort"}
    assert answers(joined(source, "r.csv", **named))[1] == [("Wer?", "ich")]


def test_a_folder_of_pictures_takes_questions_and_splits(tmp_path):
    names = [f"{n}.png" for n in range(60)]
    write_files(tmp_path, {**{f"p/{name}": "" for name in names}, "q.jsonl": lines(*map(asked, names[:59]))})
    dataset = read(tmp_path / "p", ReadOptions(questions=[tmp_path / "q.jsonl"]))
    assert (dataset.kind, len(dataset.records), sum(dataset.records.questions.values())) == ("pictures", 60, 59)
    assert dataset.records.splits["val"] > 0


def test_a_list_of_images_needs_no_captions_where_it_gets_questions(tmp_path):
    write_files(
        tmp_path,
        {"a.jpg": "", "b.jpg": "", "d.csv": "image,split\na.jpg,val\nb.jpg,val\n", "q.jsonl": lines(asked("a"))},
    )
    dataset = joined(tmp_path / "d.csv", "q.jsonl")
    assert [(r.split, len(r.questions), r.problem) for r in dataset.records] == [
        ("val", 1, ""),
        ("val", 0, "no caption"),
    ]


def test_what_cannot_be_used_is_counted(source):
    rows = asked("a.jpg"), asked("a.jpg", "Who?", ""), {"image": "b.jpg", "conversations": TALK[:1]}, asked(None)
    write_files(source.parent, {"q.jsonl": lines(*rows[:2], *rows[3:]), "t.jsonl": lines(rows[2])})
    found = joined(source, "q.jsonl", "t.jsonl").found
    assert "; 1 question about images that it does not have left out" in found
    assert f"1 {UNANSWERED}, 1 {BROKEN}" in found


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"q.jsonl": lines(asked("z.jpg"))}, r"none of 1 questions is about an image of .*d\.csv; the first one is about z\.jpg,"),
        ({"q.jsonl": lines({"image": "a.jpg", "text": "x"})}, r"q\.jsonl has no question column \(it has image, text\)"),
        ({"q.jsonl": lines({"picture_": "a.jpg", "question": "x", "answer": "y"})}, r"has no image column"),
        ({"q.jsonl": lines({"image": "a.jpg", "question": "x"})}, r"'question' has no answers beside it"),
        ({"q.jsonl": ""}, r"q\.jsonl holds no records"),
        ({"q.txt": "what"}, r"q\.txt is none of the datasets"),
        ({}, r"nowhere\.jsonl does not exist"),
        ({"q/a.csv": "image,caption\na,b\n"}, "/q holds no file of questions"),
    ],
)  # fmt: skip
def test_files_that_hold_no_questions_about_the_images_are_an_error(source, files, message):
    write_files(source.parent, files)
    name = "q" if "q/a.csv" in files else next(iter(files), "nowhere.jsonl")
    with pytest.raises(DatasetError, match=message):
        joined(source, name)


def test_a_folder_with_captions_and_questions_is_read_for_its_captions(source):
    write_files(source.parent, {"questions.jsonl": lines(asked("images/a.jpg"))})
    plain = read(source.parent)
    assert (plain.kind, plain.records.optional) == ("csv", set())
    assert answers(joined(source, "questions.jsonl"))[0] == [("Why?", "so")]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "images/", "other/"])), min_size=1, max_size=12))
def test_every_question_is_joined_or_counted(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("join")
    names = [f"images/{n}.jpg" for n in range(5)]
    write_files(folder, {**dict.fromkeys(names, ""), "d.csv": "image,caption\n" + "".join(f"{n},x\n" for n in names)})
    some = [asked(f"{top}{n}.jpg", f"{at}?") for at, (n, top) in enumerate(rows)]
    write_files(folder, {"q.jsonl": lines(*some)})
    sure = {
        at
        for at, (n, top) in enumerate(rows)
        if n < 5 and (top == "images/" or len({t for m, t in rows if m == n}) == 1)
    }
    if not sure:
        with pytest.raises(DatasetError, match="none of"):
            joined(folder / "d.csv", "q.jsonl")
        return
    dataset = joined(folder / "d.csv", "q.jsonl")
    found = {(r.image, q) for r in dataset.records for q in r.questions}
    assert found == {(f"images/{rows[at][0]}.jpg", Question(f"{at}?", ("so",))) for at in sure}
    missing = len(rows) - len(sure)
    assert (f"; {missing} question" in dataset.found) == bool(missing)
