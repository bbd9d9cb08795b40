"""Names that are right or nearly right: each means one file, or the reason says what is there."""

import json
import unicodedata
import zipfile
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.names import Match, Names
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError

PART = st.text(st.sampled_from("aBé ñ0ü-_(")).map(lambda text: "x" + text.strip() + "y")
CHANGES = {
    "composed": lambda name: unicodedata.normalize("NFC", name),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "upper": str.upper,
    "lower": str.lower,
    "backslashes": lambda name: name.replace("/", "\\"),
    "windows": lambda name: "C:\\Users\\me\\" + name.replace("/", "\\"),
    "elsewhere": lambda name: "/home/somebody/photos/" + name,
    "encoded": quote,
    "no suffix": lambda name: name.removesuffix(".jpg"),
    "blanks": lambda name: f"  {name} ",
    "dot": lambda name: "./" + name,
}


def folder_of(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@given(
    st.lists(st.lists(PART, min_size=1, max_size=3), min_size=1, max_size=4, unique_by=lambda parts: len(parts)),
    st.sampled_from(["NFC", "NFD"]),
    st.sampled_from(sorted(CHANGES)),
    st.sampled_from(sorted(CHANGES)),
)
def test_a_nearly_right_name_means_its_one_file(tmp_path_factory, paths, form, one, other):
    folder = tmp_path_factory.mktemp("names")
    names = [unicodedata.normalize(form, "/".join(parts)) + ".jpg" for parts in paths]
    folder_of(folder, *names)
    every = Names(str(folder))
    for name in names:
        if one not in ("windows", "elsewhere", "encoded"):  # they come last
            assert every.find(CHANGES[one](name).strip()) == Match(name, True)
            assert every.find(CHANGES[other](CHANGES[one](name)).strip()) == Match(name, True)


def test_a_name_that_is_right_is_taken_as_it_is_whatever_else_is_there(tmp_path):
    names = ["a.jpg", "A.jpg", "a%20b.jpg", "a b.jpg", "back\\slash.jpg", "a", "C:\\a.jpg"]
    every = Names(str(folder_of(tmp_path, *names)))
    assert [every.find(name) for name in names] == [Match(name, True) for name in names]
    assert every.find(str(tmp_path / "a.jpg")) == Match("a.jpg", True)
    assert every.find(f"file://{tmp_path}/a%20b.jpg") == Match("a%20b.jpg", True)
    assert every.find(f"file://localhost{tmp_path}/A.jpg") == Match("A.jpg", True)


@pytest.mark.parametrize(
    ("there", "name", "problem"),
    [
        (["a.JPG", "A.jpg"], "a.jpg", "no such file; nearly it are A.jpg and a.JPG: write the one that it is"),
        (["a.jpg", "a.png"], "a", "no such file; nearly it are a.jpg and a.png: write the one that it is"),
        (["x/a.png"], "x/a.jpg", "no such file, but x/a.png is there"),
        (["b.jpg"], "a.jpg", ""),
        (["sub/a.jpg"], "a.jpg", ""),
        (["a.jpg"], "x/../a.png/..", ""),
        ([], "n" * 300, ""),
        ([], "a\0b", ""),
    ],
)
def test_a_name_that_is_not_certain_says_what_is_there(tmp_path, there, name, problem):
    assert Names(str(folder_of(tmp_path, *there))).find(name) == Match(name, False, problem)


def test_two_paths_of_another_machine_never_mean_one_file(tmp_path):
    every = Names(str(folder_of(tmp_path, "a.jpg", "x/b.jpg")))
    assert every.find("C:\\one\\a.jpg") == Match("a.jpg", True)
    assert every.find("C:\\one\\x\\b.jpg") == Match("x/b.jpg", True)
    assert not every.find("C:\\two\\a.jpg").found
    assert not every.find("D:\\one\\a.jpg").found


def test_pictures_still_in_a_zip_are_said_to_be_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/a.jpg", b"x")
    (tmp_path / "d.csv").write_text("image,caption\na.jpg,x\n")
    with pytest.raises(DatasetError, match=r"a\.jpg: no such file, but photos\.zip holds it; unzip that there"):
        read(tmp_path / "d.csv")


def test_spellings_of_one_image_are_one_record(tmp_path):
    folder_of(tmp_path, "a.jpg", "b.jpg", "é.jpg")
    names = ["a.jpg", "./a.jpg", "A.JPG", ".//a.jpg", str(tmp_path / "a.jpg"), f"file://{tmp_path}/a.jpg", "a", "b.jpg"]
    names += [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    (tmp_path / "d.csv").write_text("image,caption\n" + "".join(f"{name},{n}\n" for n, name in enumerate(names)))
    for suffix in ("csv", "jsonl"):
        if suffix == "jsonl":
            rows = (tmp_path / "d.csv").read_text().splitlines()[1:]
            lines = [json.dumps(dict(zip(("image", "caption"), row.rsplit(",", 1), strict=True))) for row in rows]
            (tmp_path / "d.jsonl").write_text("\n".join(lines))
        dataset = read(tmp_path / f"d.{suffix}")
        a, b, e = dataset.records
        assert (a.key, a.captions, load(a.source).name) == ("a.jpg", tuple("0123456"), "a.jpg")
        assert (b.captions, e.captions) == (("7",), ("8", "9"))


def test_the_source_says_how_many_names_are_only_nearly_right(tmp_path):
    folder_of(tmp_path, "Images/a.jpg", "Images/b.jpg")
    (tmp_path / "d.csv").write_text("image,caption\nA.jpg,x\nb.jpg,y\n")
    dataset = read(tmp_path / "d.csv")
    assert [load(record.source).name for record in dataset.records] == ["a.jpg", "b.jpg"]
    assert dataset.found.endswith("; 1 image found under nearly the name that is given, such as a.jpg for A.jpg")
    assert read(tmp_path / "d.csv", ReadOptions(confine=True)).found == dataset.found
