"""Home-made JSON: every shape that people write a table in gives the same records."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError

SHAPES = {
    "objects": lambda rows: rows,
    "under a usual name": lambda rows: {"version": 1, "data": rows, "licenses": [{"id": 1}]},
    "under the only list": lambda rows: {"info": {"by": "me"}, "my photos": rows},
    "one name in another": lambda rows: {"dataset": {"annotations": rows}},
    "captions of images": lambda rows: {row["image"]: row["caption"] for row in rows},
    "objects of images": lambda rows: {row["image"]: {"caption": row["caption"], "width": 3} for row in rows},
    "captions of images, under a name": lambda rows: {"captions": {row["image"]: row["caption"] for row in rows}},
    "columns of rows": lambda rows: {name: {f"{n}": row[name] for n, row in enumerate(rows)} for name in rows[0]},
    "columns of values": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "index": lambda rows: {f"{n}": row for n, row in enumerate(rows)},
    "split": lambda rows: {"columns": ["image", "caption"], "index": [0], "data": [[*row.values()] for row in rows]},
    "pandas' table": lambda rows: {"schema": {"fields": [{"name": "image"}]}, "data": rows},
    "lists with names": lambda rows: [["image", "caption"], *([*row.values()] for row in rows)],
    "lists": lambda rows: [[*row.values()] for row in rows],
}
CAPTIONS = st.lists(st.text("abc é\n'\"[]", min_size=1).filter(str.strip), min_size=1, max_size=3)


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("shape", SHAPES)
@given(captions=st.lists(CAPTIONS, min_size=1, max_size=4))
def test_every_shape_gives_the_same_records(tmp_path_factory, shape, captions):
    rows = [{"image": f"{n}.jpg", "caption": some} for n, some in enumerate(captions)]
    folder = tmp_path_factory.mktemp("json")
    records = list(read(write(folder / "d.json", SHAPES[shape](rows))).records)
    assert [(r.key, r.captions) for r in records] == [
        (f"{n}.jpg", tuple(text.strip() for text in some)) for n, some in enumerate(captions)
    ]


def test_json_lines_of_lists_are_rows(tmp_path):
    lines = [["images/0.jpg", "a dog runs"], ["images/1.jpg", ["two cats", "two pets"]]]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, lines)))
    for name in ("d.jsonl", "d.json"):
        dataset = read(tmp_path / name)
        assert [r.captions for r in dataset.records] == [("a dog runs",), ("two cats", "two pets")]
        assert dataset.found.startswith("no line of column names, image column '1', caption column '2'")


def test_splits_may_be_names_around_the_rows(tmp_path):
    rows = {"train": [{"image": "0.jpg", "caption": "x"}], "val": {"1.jpg": ["y"]}, "test": []}
    assert [(r.key, r.split) for r in read(write(tmp_path / "d.json", rows)).records] == [
        ("0.jpg", "train"),
        ("1.jpg", "val"),
    ]


def test_names_without_suffix_are_images_where_such_files_are_there(tmp_path):
    value = {"100": ["x"], "200": ["y"]}
    with pytest.raises(DatasetError, match=r"no caption JSON that qf knows: .* it has the fields 100, 200"):
        read(write(tmp_path / "d.json", value))
    (tmp_path / "pictures").mkdir()
    for name in value:
        (tmp_path / "pictures" / f"{name}.jpg").write_bytes(b"x")
    dataset = read(tmp_path / "d.json", ReadOptions(images=tmp_path / "pictures"))
    assert [(r.key, r.captions) for r in dataset.records] == [("100", ("x",)), ("200", ("y",))]


def test_a_karpathy_split_may_hold_tokens_alone(tmp_path):
    images = [
        {"filename": "a.jpg", "split": "val", "sentences": [{"tokens": ["a", "dog"]}, {"tokens": ["two", "dogs"]}]}
    ]
    dataset = read(write(tmp_path / "d.json", {"images": images}))
    assert (dataset.kind, dataset.records[0].captions) == ("karpathy", ("a dog", "two dogs"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"photos": 3, "author": "me"}, "it has the fields photos, author"),
        ({"a": [{"x": 1}], "b": [{"y": 2}]}, "it has the fields a, b"),
        (
            {"photos": [{"bild": "a.jpg", "says": "b"}]},
            r"no image column \(it has bild, says\); name it with --image-col",
        ),
        (3, "it holds no objects"),
    ],
)
def test_other_shapes_are_told_with_their_fields(tmp_path, value, message):
    with pytest.raises(DatasetError, match=message):
        read(write(tmp_path / "d.json", value))


@pytest.mark.parametrize(
    "deep",
    ['{"a":' * 5000 + "1" + "}" * 5000, '[{"image": "a.jpg", "caption": ' + "[" * 400 + '"x"' + "]" * 400 + "}]"],
)
def test_deep_json_is_one_line(tmp_path, deep):
    (tmp_path / "d.json").write_text(deep)
    with pytest.raises(DatasetError, match=r"nested too deep|a\.jpg: no caption"):
        read(tmp_path / "d.json")
