"""Text tables as people and programs write them: separators, quotes, encodings, first lines; pictures in cells."""

import base64
import csv
import io
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.config import ReadOptions
from qf.pipeline.datasets.read import read
from qf.pipeline.datasets.sources import load
from qf.pipeline.errors import DatasetError

from conftest import draw  # isort: skip

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be")
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
CAPTION = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]) | st.sampled_from(" \t\n,;|\"'"),
    max_size=20,
)
CAPTIONS = st.lists(CAPTION.map(str.strip).filter(bool), min_size=1, max_size=8)


def encoded(text, encoding):
    return MARKS.get(encoding, b"") + text.encode(encoding)


def captions_of(path, **options):
    return [(r.key, *r.captions) for r in read(path, ReadOptions(**options)).records]


@given(
    CAPTIONS,
    st.sampled_from([("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t"), ("csv", "|")]),
    st.sampled_from(ENCODINGS),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_what_a_csv_writer_wrote_comes_back(tmp_path_factory, captions, kind, encoding, end, every):
    """As pandas' to_csv writes with any separator: quotes around a text that needs them, doubled inside."""
    file = io.StringIO(newline="")
    out = csv.writer(file, delimiter=kind[1], lineterminator=end, quoting=csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL)
    out.writerows([["filepath", "title"], *([f"{n}.jpg", text] for n, text in enumerate(captions))])
    path = tmp_path_factory.mktemp("csv") / f"d.{kind[0]}"
    path.write_bytes(encoded(file.getvalue(), encoding))
    assert captions_of(path) == [(f"{n}.jpg", text) for n, text in enumerate(captions)]


RAW = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]) | st.sampled_from(" ,;'"),
    min_size=1,
    max_size=20,
)


@given(
    st.lists(RAW.map(str.strip).filter(lambda text: text and '"' not in text and "|" not in text), max_size=6),
    st.sampled_from("\t|"),
)
def test_raw_texts_between_tabs_keep_their_quotes(tmp_path_factory, captions, mark):
    """One text shows that the quotes in the file are not those of CSV."""
    captions = ['a 5" pipe', *captions, '"quote" at the start', 'ends with a "quote"']
    path = tmp_path_factory.mktemp("raw") / "d.csv"
    lines = [f"filepath{mark}title", *(f"{n}.jpg{mark}{text}" for n, text in enumerate(captions))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert captions_of(path) == [(f"{n}.jpg", text) for n, text in enumerate(captions)]


def test_two_lone_quotes_do_not_swallow_the_rows_between(tmp_path):
    (tmp_path / "d.tsv").write_text('image\tcaption\na.jpg\t"open\nb.jpg\tclosed"\nc.jpg\tplain\n')
    assert captions_of(tmp_path / "d.tsv") == [("a.jpg", '"open'), ("b.jpg", 'closed"'), ("c.jpg", "plain")]


ROWS = "a.jpg;one dog\nb.jpg;two dogs\n"


@pytest.mark.parametrize(
    "first",
    ["sep=;\n", '"sep=;"\r\n', "\n\n", "# made by hand\n# image, then caption\n", "#\n\nsep=;\n", "\ufeff\n"],
)
def test_lines_before_the_names_are_skipped(tmp_path, first):
    (tmp_path / "d.csv").write_text(first + "image;caption\n" + ROWS)
    assert captions_of(tmp_path / "d.csv") == [("a.jpg", "one dog"), ("b.jpg", "two dogs")]


def test_a_line_of_names_may_begin_with_a_hash(tmp_path):
    (tmp_path / "d.csv").write_text("#image;caption\n" + ROWS)
    (tmp_path / "e.csv").write_text("#;image;caption\n0;" + ROWS.replace("\n", "\n1;", 1))
    for name in ("d.csv", "e.csv"):
        assert captions_of(tmp_path / name) == [("a.jpg", "one dog"), ("b.jpg", "two dogs")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "order",
    ["{image}{mark}{text}", "{text}{mark}{image}", "{n}{mark}{image}{mark}{text}", "{image}{mark}{text}{mark}val"],
)
def test_a_table_without_names_is_read_where_its_columns_are_certain(tmp_path, mark, order):
    text = 'a thing, number {n}; "so" | it says' if mark in "\t" else "a thing of number {n}"
    lines = [order.format(n=n, mark=mark, image=f"images/{n}.jpg", text=text.format(n=n)) for n in range(3)]
    for end in ("csv", "tsv"):
        (tmp_path / f"d.{end}").write_text("\n".join(lines) + "\n")
        dataset = read(tmp_path / f"d.{end}")
        assert [(r.key, *r.captions) for r in dataset.records] == [
            (f"images/{n}.jpg", text.format(n=n)) for n in range(3)
        ]
        assert dataset.found.startswith("no line of column names, image column '")


def test_columns_without_names_are_named_by_numbers(tmp_path):
    (tmp_path / "d.csv").write_text("0001,a dog runs,two dogs run\n0002,a cat sits,two cats sit\n")
    assert captions_of(tmp_path / "d.csv", no_header=True, image_column="1", caption_column="3") == [
        ("0001", "two dogs run"),
        ("0002", "two cats sit"),
    ]
    (tmp_path / "d.csv").write_text("a.jpg,a dog runs,two dogs run\nb.jpg,a cat sits,two cats sit\n")
    with pytest.raises(
        DatasetError,
        match=r"no line of column names: its first line is 'a\.jpg, a dog .*--no-header with --image-column 1 ",
    ):
        read(tmp_path / "d.csv")
    # a cell of the first line names its column, and is no name of one
    expected = [("a.jpg", "a dog runs"), ("b.jpg", "a cat sits")]
    assert captions_of(tmp_path / "d.csv", image_column="a.jpg", caption_column="a dog runs") == expected


def test_suffixless_names_are_data_where_the_files_are_there(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.csv").write_text("one,a dog runs\ntwo,a cat sits\n")
    assert captions_of(tmp_path / "d.csv") == [("one", "a dog runs"), ("two", "a cat sits")]


@pytest.mark.parametrize(
    "text",
    [
        "a dog runs\thttps://x.org/1.jpg\na cat sits\thttps://x.org/2.jpg\n",
        "link,says\nHTTPS://x.org/1.jpg,a dog\n",
        "url,alt\nhttp://x.org/1,a dog\n",
        "id,https://x.org/1.jpg,a dog runs,and so on it goes\n",
    ],
)
def test_urls_are_sent_to_img2dataset_whatever_the_shape(tmp_path, text):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DatasetError, match="img2dataset"):
        read(tmp_path / "d.csv")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_in_any_encoding_that_its_first_bytes_tell(tmp_path, encoding):
    rows = [{"image": "ä.jpg", "caption": "größer"}, {"image": "b.jpg", "caption": "日本"}]
    (tmp_path / "d.json").write_bytes(encoded(json.dumps(rows, ensure_ascii=False), encoding))
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("d.jsonl", "lines.json"):
        (tmp_path / name).write_bytes(encoded(lines, encoding))
    for name in ("d.json", "d.jsonl", "lines.json"):
        assert captions_of(tmp_path / name) == [("ä.jpg", "größer"), ("b.jpg", "日本")]


def picture(colour, kind="JPEG"):
    file = io.BytesIO()
    draw(colour, "bar").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_pictures_in_base64_are_pictures(tmp_path, kind):
    """In CSV, JSON lines and Parquet; plain or as data URLs; one of two captions is one record."""
    data = [picture("red", kind), picture("blue", kind)]
    cells = [
        base64.b64encode(data[0]).decode(),
        f"data:image/{kind.lower()};base64," + base64.b64encode(data[1]).decode(),
    ]
    rows = [{"image": cells[n], "caption": f"caption {c} of {n}"} for n in (0, 1) for c in (0, 1)]
    pl.DataFrame(rows).write_csv(tmp_path / "d.csv")
    pl.DataFrame(rows).write_csv(tmp_path / "raw.csv", include_header=False)
    pl.DataFrame(rows).write_ndjson(tmp_path / "d.jsonl")
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    for name in ("d.csv", "raw.csv", "d.jsonl", "d.parquet"):
        records = list(read(tmp_path / name).records)
        assert [r.captions for r in records] == [(f"caption 0 of {n}", f"caption 1 of {n}") for n in (0, 1)]
        assert [load(r.source) for r in records] == data
        assert all(len(r.key) < 40 for r in records)


def test_structs_of_bytes_and_path_are_pictures_in_any_spelling(tmp_path):
    """As `datasets` writes an Image column with to_csv."""
    red, blue = picture("red"), picture("blue")
    with open(tmp_path / "d.csv", "w", newline="") as file:
        rows = [[{"bytes": red, "path": "r.jpg"}, "red"], [{"bytes": blue, "path": None}, "blue"]]
        csv.writer(file).writerows([["image", "text"], *rows, [{"bytes": None, "path": "there.jpg"}, "file"]])
    first, second, third = read(tmp_path / "d.csv").records
    assert (first.key, load(first.source), load(second.source)) == ("r.jpg", red, blue)
    assert (third.key, third.source.name) == ("there.jpg", "there.jpg")


def test_converted_webdataset_parquet_is_read(tmp_path):
    """Columns jpg, txt, json and __key__."""
    rows = [
        {"jpg": {"bytes": b"x%d" % n, "path": f"{n}.jpg"}, "txt": f"{n}", "json": {"a": n}, "__key__": f"k{n}"}
        for n in range(3)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "converted.parquet")
    assert captions_of(tmp_path / "converted.parquet") == [(f"k{n}", f"{n}") for n in range(3)]
    pl.DataFrame([{**row, "txt": row["txt"].encode()} for row in rows]).write_parquet(tmp_path / "converted.parquet")
    assert captions_of(tmp_path / "converted.parquet") == [(f"k{n}", f"{n}") for n in range(3)]
