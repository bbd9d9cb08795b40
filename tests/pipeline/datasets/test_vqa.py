"""VQAv2, OK-VQA and GQA: as a source of their own, and joined to captions."""

import json

import pytest
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError
from qf.pipeline.schema import Question

from conftest import write_files  # isort: skip

ANSWERS = [
    {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(["net", "net", "a net"])
]


def questions(subtype, images):
    rows = [{"image_id": n, "question": f"What of {n}?", "question_id": n * 1000} for n in images]
    return {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {},
        "data_subtype": subtype,
        "questions": rows,
    }


def annotations(subtype, images, **more):
    note = {
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": "net",
        "answers": ANSWERS,
        **more,
    }
    return {
        "info": {},
        "data_subtype": subtype,
        "annotations": [{**note, "image_id": n, "question_id": n * 1000} for n in images],
    }


Q, A = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def vqa(folder, subtype, images, annotated=None):
    files = {
        Q.format(subtype): questions(subtype, images),
        A.format(subtype): annotations(subtype, annotated or images),
    }
    write_files(folder, {name: json.dumps(document) for name, document in files.items()})
    return [folder / name for name in files]


GQA = {
    "02930152": {"imageId": "2354786", "question": "Is it dark?", "answer": "yes", "fullAnswer": "Yes, it is.",
                 "types": {"detailed": "existRel", "semantic": "attr", "structural": "verify"}, "isBalanced": True},
    "07333408": {"imageId": "2375429", "question": "What is it?", "answer": "pipe", "types": {"structural": "query"}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["COCO_train2014_{:012}.jpg", "{:012}.jpg", "{}.jpg", "train2014/COCO_train2014_{:012}.jpg"]
)
def test_vqa_is_a_source_whose_images_lie_in_the_folder_of_images(tmp_path, name):
    files = vqa(tmp_path / "vqa", "train2014", [42, 9])
    write_files(tmp_path / "images", {name.format(n): "" for n in (42, 9)})
    for source in (files, files[::-1], [tmp_path / "vqa"]):
        dataset = read(source, ReadOptions(images=tmp_path / "images"))
        assert (dataset.kind, len(dataset.records)) == ("vqa", 2)
        for record, n in zip(dataset.records, (42, 9), strict=True):
            assert record.questions == (Question(f"What of {n}?", ("net", "net", "a net"), "other"),)
            assert record.source.name.endswith(name.format(n).rpartition("/")[2])
            assert record.problem == ""


def test_questions_of_two_splits_are_one_dataset_with_its_splits(tmp_path):
    files = vqa(tmp_path, "train2014", [42]) + vqa(tmp_path, "val2014", [9])
    write_files(
        tmp_path / "images",
        {"train2014/COCO_train2014_000000000042.jpg": "", "val2014/COCO_val2014_000000000009.jpg": ""},
    )
    for source in (files, [tmp_path]):
        dataset = read(source, ReadOptions(images=tmp_path / "images"))
        assert dataset.records.splits == {"train": 1, "val": 1, "test": 0}
        assert all(not r.problem and r.questions for r in dataset.records)


def test_coco_captions_take_the_questions_of_vqa_and_of_ok_vqa(tmp_path):
    names = [f"COCO_train2014_{n:012}.jpg" for n in (42, 9, 420)]
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in zip((42, 9, 420), names, strict=True)],
        "annotations": [{"image_id": n, "caption": "x"} for n in (42, 9, 420)],
    }
    ok = tmp_path / "ok"
    write_files(tmp_path, {**{f"train2014/{name}": "" for name in names}, "captions_train2014.json": json.dumps(coco)})
    files = vqa(tmp_path / "vqa", "train2014", [42, 77], annotated=[42])
    note = annotations("train2014", [420], question_type="two")
    note["annotations"][0]["question_id"] = 42000  # the same as one of VQAv2
    note["question_types"] = {"two": "Vehicles and Transportation"}
    asked = questions("train2014", [420])
    asked["questions"][0]["question_id"] = 42000
    write_files(ok, {"mscoco_train2014_annotations.json": json.dumps(note), "questions.json": json.dumps(asked)})
    for named in ([*files, *sorted(ok.iterdir())], [tmp_path / "vqa", ok]):
        dataset = read(tmp_path / "captions_train2014.json", ReadOptions(questions=named))
        assert [(r.captions, [q.type for q in r.questions]) for r in dataset.records] == [
            (("x",), ["other"]),
            (("x",), []),
            (("x",), ["Vehicles and Transportation"]),
        ]
        assert "; 1 question about images that it does not have left out; 3 captions, 2 questions" in dataset.found


def test_gqa_is_a_source_and_joins(tmp_path):
    images = {"images/2354786.jpg": "", "images/2375429.jpg": ""}
    write_files(
        tmp_path,
        {**images, "train_balanced_questions.json": json.dumps(GQA), "d.csv": "image,caption\n2354786.jpg,x\n"},
    )
    expected = [(Question("Is it dark?", ("yes",), "verify"),), (Question("What is it?", ("pipe",), "query"),)]
    dataset = read(tmp_path / "train_balanced_questions.json")
    assert [r.questions for r in dataset.records] == expected
    (record,) = read(tmp_path / "d.csv", ReadOptions(questions=[tmp_path / "train_balanced_questions.json"])).records
    assert (record.captions, record.questions) == (("x",), expected[0])


def test_answers_or_questions_alone_name_the_other_file(tmp_path):
    asked, notes = vqa(tmp_path, "val2014", [42])
    with pytest.raises(
        DatasetError, match=r"questions\.json holds questions without their answers; give the file of annotations"
    ):
        read(asked)
    with pytest.raises(
        DatasetError, match=r"annotations\.json holds answers without their questions; give the file of questions"
    ):
        read(notes)
    write_files(tmp_path, {"captions.json": json.dumps([{"image": "a.jpg", "caption": "x"}])})
    with pytest.raises(DatasetError, match=r"questions\.json holds questions; give it with --questions"):
        read([tmp_path / "captions.json", asked])
