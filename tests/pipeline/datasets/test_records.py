import csv
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.columns import image_name
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.records import Record
from qf.pipeline.datasets.sources import ImageFile, load
from qf.pipeline.errors import DatasetError

ROWS = {
    "image": ["a.jpg", "a.jpg", "b/c.png"],
    "caption": ['a "dog", running\nfast', "ein Hund — größer", "cats"],
    "split": ["train", "train", "validation"],
}


def write(path, rows):
    frame = pl.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.write_csv(path)
        case ".parquet":
            frame.write_parquet(path)
        case ".jsonl":
            frame.write_ndjson(path)
        case ".tsv":
            lines = ["\t".join(frame.columns)] + ["\t".join(row).replace("\n", " ") for row in frame.iter_rows()]
            path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables(tmp_path, suffix):
    dataset = read(write(tmp_path / f"photos{suffix}", ROWS))
    first, second = dataset.records
    captions = tuple(c.replace("\n", " ") if suffix == ".tsv" else c for c in ROWS["caption"])
    assert first == Record("a.jpg", "a.jpg", ImageFile(str(tmp_path), "a.jpg"), captions[:2], "train")
    assert second == Record("b/c.png", "b/c.png", ImageFile(str(tmp_path), "b/c.png"), captions[2:], "val")
    assert "image column 'image', caption column 'caption', split column 'split'" in dataset.found


def test_lists_of_captions_and_unusual_names(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"pic": "a.png", "says": ["one", " ", "two"], "id": "k1"}) + "\n")
    options = ReadOptions(image_column="pic", caption_column="says", key_column="id")
    (record,) = read(tmp_path / "d.jsonl", options).records
    assert (record.key, record.captions) == ("k1", ("one", "two"))


def test_parquet_with_embedded_pictures(tmp_path):
    rows = [
        {"image": {"bytes": b"\x89PNG", "path": "x.png"}, "text": "a"},
        {"image": {"bytes": b"y", "path": None}, "text": "b"},
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    first, second = read(tmp_path / "d.parquet").records
    assert (first.key, load(first.source), load(second.source)) == ("x.png", b"\x89PNG", b"y")
    assert second.key == "d.parquet:1"


def test_pictures_in_a_folder_beside_the_table(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    write(tmp_path / "photos.csv", ROWS)
    assert read(tmp_path / "photos.csv").records[0].source == ImageFile(str(tmp_path / "images"), "a.jpg")
    (tmp_path / "other" / "b").mkdir(parents=True)
    options = ReadOptions(images=tmp_path / "other")
    assert read(tmp_path / "photos.csv", options).records[0].source == ImageFile(str(tmp_path / "other"), "a.jpg")
    (tmp_path / "other" / "b" / "a.jpg").write_bytes(b"x")  # the only one below --images
    assert read(tmp_path / "photos.csv", options).records[0].source == ImageFile(str(tmp_path / "other" / "b"), "a.jpg")
    (tmp_path / "other" / "a.jpg").write_bytes(b"x")
    assert read(tmp_path / "photos.csv", options).records[0].source == ImageFile(str(tmp_path / "other"), "a.jpg")


def test_imagefolder(tmp_path):
    write(tmp_path / "metadata.jsonl", {"file_name": ["a.jpg"], "captions": [["x", "y"]]})
    dataset = read(tmp_path)
    assert (dataset.kind, dataset.records[0].captions) == ("imagefolder", ("x", "y"))


def test_imagefolder_with_a_folder_a_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "metadata.csv", {"file_name": ["a.jpg"], "text": ["x"]})
    records = read(tmp_path).records
    assert [(r.key, r.split, r.source) for r in records] == [
        ("train/a.jpg", "train", ImageFile(str(tmp_path / "train"), "a.jpg", "names")),
        ("validation/a.jpg", "val", ImageFile(str(tmp_path / "validation"), "a.jpg", "names")),
    ]


def test_flickr_tokens_with_the_official_splits(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_text("a.jpg#0\tone .\na.jpg#1\ttwo .\nb.jpg#0\tthree\nc.jpg#0\tfour\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    for source in (tmp_path / "Flickr8k.token.txt", tmp_path):
        a, b, c = read(source).records
        assert (a.captions, a.split, b.split) == (("one .", "two ."), "train", "val")
        assert c.problem == "in none of the split lists"
    (tmp_path / "Flickr8k.lemma.token.txt").write_text("a.jpg#0\tbe\n")  # the official folder has them, too
    assert next(iter(read(tmp_path).records)).captions == ("one .", "two .")
    (tmp_path / "Other.token.txt").write_text("a.jpg#0\tone\n")
    with pytest.raises(DatasetError, match=r"holds Flickr8k\.token\.txt and Other\.token\.txt; name the one to read"):
        read(tmp_path)


def test_splits_by_a_hash_of_the_key_stay_when_pictures_are_added(tmp_path):
    options = ReadOptions(val_fraction=0.2, test_fraction=0.3)

    def splits(count):
        names = [f"{n}.jpg" for n in range(count)]
        source = write(tmp_path / "d.csv", {"image": names, "caption": names})
        return {r.key: r.split for r in read(source, options).records}

    few, many = splits(100), splits(1000)
    assert all(many[key] == split for key, split in few.items())
    shares = [sum(s == name for s in many.values()) / 1000 for name in ("val", "test")]
    assert shares == pytest.approx([0.2, 0.3], abs=0.05)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"image": ["a"], "width": ["3"]}, r"no caption column \(it has image, width\); name it with --caption-column"),
        ({"foo": ["a"], "caption": ["b"]}, r"no image column .* --image-column"),
        ({"url": ["https://x/y.jpg"], "caption": ["b"]}, "img2dataset"),
        ({"image": ["a"], "caption": ["b"], "split": ["hold-out"]}, "split 'hold-out' of a is not train, val or test"),
        ({"image": ["a", "b"], "caption": ["x", "y"], "key": ["k", "k"]}, "two images have the key 'k'"),
        ({"image": [], "caption": []}, "holds no records"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, rows, message):
    with pytest.raises(DatasetError, match=message):
        read(
            write(
                tmp_path / "photos.csv",
                pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String)).to_dict(as_series=False),
            )
        )


def test_wrong_sources(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(
        DatasetError, match=r"holds no pictures and no captions \(.*such as metadata.csv; seen: no file"
    ):
        read(tmp_path)
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(DatasetError, match="none of the datasets"):
        read(tmp_path / "a.docx")
    (tmp_path / "broken.csv").write_bytes(b"image,caption\na.jpg,\xff\xfe\x00broken\n")
    with pytest.raises(DatasetError, match=r"broken.csv, line 2: byte 0xff is not UTF-8; convert the file"):
        read(tmp_path / "broken.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="cannot be read as parquet"):
        read(tmp_path / "broken.parquet")


def test_rows_that_cannot_be_used_are_kept_with_their_problem(tmp_path):
    rows = {
        "image": ["", "a.jpg", "b.jpg", "b.jpg", "c.jpg"],
        "caption": ["x", " ", "y", "z", "z"],
        "split": ["train", "train", "train", "val", "val"],
    }
    problems = {r.key: r.problem for r in read(write(tmp_path / "d.csv", rows)).records}
    assert problems["row 1"] == "row 1 of d.csv names no image"
    assert problems["a.jpg"] == "no caption"
    assert "several splits" in problems["b.jpg"]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.text(min_size=1).filter(str.strip)), min_size=1))
def test_every_caption_of_a_csv_arrives_once(tmp_path_factory, rows):
    rows = [(image, caption.encode("utf-8", "ignore").decode().replace("\r", " ").strip()) for image, caption in rows]
    rows = [(image, caption) for image, caption in rows if caption] or [("a", "b")]
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    pl.DataFrame({"image": [r[0] for r in rows], "caption": [r[1] for r in rows]}).write_csv(path)
    records = read(path).records
    assert sorted((r.key, c) for r in records for c in r.captions) == sorted(rows)
    assert len({r.key for r in records}) == len(records)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.csv", b"\xef\xbb\xbfimage,caption\na.jpg,one\nb.jpg,two\n"),
        ("windows.csv", b"image,caption\r\na.jpg,one\r\nb.jpg,two\r\n"),
        ("old-mac.csv", b"image,caption\ra.jpg,one\rb.jpg,two"),
        ("excel.csv", b"image;caption\na.jpg;one\nb.jpg;two\n"),
        ("flickr30k.csv", b"image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 4   no bar\nb.jpg| 0| two\n"),
        ("captions.txt", b"image,caption\na.jpg,one\nb.jpg,two\n"),
        ("spaces.csv", b" Image , CAPTION \n a.jpg , one \n\n b.jpg ,two,,\n"),
        ("wrong-name.csv", b"PAR1"),
        ("rows.json", b'{"image": "a.jpg", "caption": "one"}\n{"image": "b.jpg", "caption": "two"}\n'),
        ("bom.jsonl", b'\xef\xbb\xbf{"image": "a.jpg", "caption": "one"}\n\n{"image": "b.jpg", "caption": "two"}'),
        ("quotes.tsv", b'image\tcaption\na.jpg\tone\nb.jpg\ttwo\n'),
    ],
)  # fmt: skip
def test_tables_as_they_come(tmp_path, name, data):
    if data == b"PAR1":
        pl.DataFrame({"image": ["a.jpg", "b.jpg"], "caption": ["one", "two"]}).write_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    assert [(r.key, r.captions) for r in read(tmp_path / name).records] == [("a.jpg", ("one",)), ("b.jpg", ("two",))]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("d.csv", b"image,caption\na.jpg,a dog, running\n", r"line 2: 3 fields under 2 column names; .* ',' needs quotes"),
        ("d.csv", b"image,caption\na.jpg,x\nb.jpg,\"y\nc.jpg,z\n", r"line 4, cannot be read as csv: unexpected end"),
        ("d.csv", b"image,caption\na.jpg,\"x\" y\n", r"line 2, cannot be read as csv: .* expected after"),
        ("d.csv", b"image,caption,image\na,b,c\n", "two columns named 'image'; rename one"),
        ("d.csv", b"", "is empty"),
        ("d.csv", b"image,caption\n", "holds no records"),
        ("d.csv", "image,caption\na,b".encode("utf-16")[:-1], r"begins as UTF-16 but is damaged; write it again"),
        ("d.csv", b"image,caption\n" + b"a,b\n" * 5000 + b"a,\xe9t\xe9\n", r"line 5002: byte 0xe9 is not UTF-8"),
        ("d.csv", b"image,caption\na," + b"x" * 200_000, "a caption of 200,000 characters, the limit is 65,536"),
        ("d.jsonl", b'{"image": "a", "caption": "b"}\n{"image"\n', "line 2, cannot be read as JSON lines"),
        ("d.jsonl", b'{"image": "a", "caption": "b"}\n{"image": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("d.jsonl", b"3\n4\n", "no image column"),
        ("d.jsonl", b'{"image": "a", "caption": "b"}\n[1]\n', r"expected rows with named values, found '\[1\]'"),
        ("d.token.txt", b"a.jpg#0\tone\nb.jpg two\n", "line 2: expected NAME.jpg#0, a tab and a caption"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path / name)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(st.lists(st.tuples(CELL, CELL, st.sampled_from(["train", "val", "test"])), min_size=1, max_size=12))
def test_a_csv_comes_back_as_the_csv_module_wrote_it(tmp_path_factory, rows):
    """Against a slow oracle: quotes, commas, every kind of line end inside cells; order, captions and splits kept."""
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    expected: dict[str, tuple[list[str], set[str]]] = {}
    for image, caption, split in rows:
        if name := image_name(image):  # two spellings of a path are one image
            captions, splits = expected.setdefault(name, ([], set()))
            captions.extend([caption.strip()] if caption.strip() else [])
            splits.add(split)
    good = {image for image, (captions, splits) in expected.items() if captions and len(splits) == 1}
    if not good or any(image.startswith(("http://", "https://")) for image in expected):
        return
    records = list(read(path, ReadOptions(val_fraction=0)).records)
    named = [r for r in records if r.image]
    assert [(r.key, r.captions) for r in named] == [
        (image, tuple(captions)) for image, (captions, _) in expected.items()
    ]
    assert {r.key for r in records if not r.problem} == good
    assert all(r.split in expected[r.key][1] for r in named)
    assert len(records) - len(named) == sum(not image.strip() for image, _, _ in rows)
