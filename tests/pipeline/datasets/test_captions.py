"""Captions in cells: lists that are spelled as text, limits, and what is left out."""

import csv
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.datasets.captions import MAX_CAPTION, MAX_CAPTIONS, cell_captions, spelled, spells_lists, texts
from qf.pipeline.datasets.read import read
from qf.pipeline.errors import DatasetError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20).filter(lambda text: text.strip())


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize("spell", [json.dumps, repr, lambda some: repr(tuple(some)), lambda some: str(np.array(some))])
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_a_list_comes_back_from_any_spelling(spell, captions):
    """NumPy's has no commas, and ends texts at zeros."""
    found = spelled(spell(captions))
    assert found is not None
    assert texts(found) == [text.strip() for text in captions]


@given(st.text() | st.text("[](){}'\",\\ ab\n"))
def test_any_text_is_a_caption_or_spells_a_list(text):
    found = spelled(text)
    assert found is None or isinstance(found, list | dict)
    captions, problem = cell_captions(text, lists=True)
    assert captions or problem or not text.strip() or not texts(found)


def test_a_column_of_lists_holds_several_captions_a_cell(tmp_path):
    rows = [["image", "caption"], *([f"{n}.jpg", repr([f"it's {n}", f'"{n}"'])] for n in range(3)), ["3.jpg", "plain"]]
    dataset = read(write(tmp_path / "d.csv", rows))
    assert [r.captions for r in dataset.records] == [*((f"it's {n}", f'"{n}"') for n in range(3)), ("plain",)]
    assert "caption column 'caption' (lists)" in dataset.found
    frame = pl.DataFrame(rows[1:], schema=["image", "caption"], orient="row")
    frame.write_parquet(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet").records.sha256 == dataset.records.sha256


def test_a_column_of_texts_keeps_the_odd_one_with_brackets(tmp_path):
    captions = ["a dog", "[sic] a cat", '["a", "b"] on a wall', '["not", "a list"]', "(two) horses"]
    rows = [["image", "caption"], *([f"{n}.jpg", text] for n, text in enumerate(captions))]
    assert [r.captions for r in read(write(tmp_path / "d.csv", rows)).records] == [(text,) for text in captions]
    assert not spells_lists(["[1]", "[2]"])


def test_a_list_that_cannot_be_read_is_a_reject(tmp_path):
    rows = [["image", "caption"], ["a.jpg", '["x", "y"]'], ["b.jpg", '["z"]'], ["c.jpg", '["cut o']]
    *_, cut = read(write(tmp_path / "d.csv", rows)).records
    assert (cut.problem, cut.captions) == ("its list of captions cannot be read", ())


def test_rows_without_a_caption_are_counted(tmp_path):
    rows = [["image", "caption"], ["a.jpg", "x"], ["a.jpg", ""], ["a.jpg", " "], ["b.jpg", "y"], ["c.jpg", ""]]
    dataset = read(write(tmp_path / "d.csv", rows))
    assert dataset.found.endswith("; left out: 2 rows without a caption that can be used")
    assert [r.problem for r in dataset.records] == ["", "", "no caption"]


def test_captions_have_a_limit_and_so_has_their_number(tmp_path):
    long = "x" * 200_000  # more than the csv module takes unless asked
    rows = [["image", "caption"], ["a.jpg", long], ["b.jpg", "y"], ["b.jpg", long], ["c.jpg", "z" * MAX_CAPTION]]
    rows += [["d.jpg", f"{n}"] for n in range(MAX_CAPTIONS + 7)]
    dataset = read(write(tmp_path / "d.csv", rows))
    a, b, c, d = dataset.records
    assert (a.problem, b.captions) == ("a caption of 200,000 characters, the limit is 65,536", ("y",))
    assert (len(c.captions), len(d.captions)) == (1, MAX_CAPTIONS)
    assert "1 rows without a caption that can be used, 7 captions beyond the first 1,000 of an image" in dataset.found


def test_a_long_text_that_all_rows_share_takes_memory_once(tmp_path):
    """A Parquet file of a few kB that unpacks to 10 GB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    indices = pa.array([0] * 2000, pa.int32())
    texts = {"s": pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 5_000_000]))}
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(2000)], "text": texts["s"]}), tmp_path / "d.parquet")
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(
            DatasetError, match="none of 2,000 records can be used; 0.jpg: a caption of 5,000,000 charac"
        ):
            read(tmp_path / "d.parquet")
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 50_000_000
