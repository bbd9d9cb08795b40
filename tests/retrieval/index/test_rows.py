"""The rows of an index, read one by one without pyarrow."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.pipeline.schema import INDEX_COLUMNS, TYPES
from qf.retrieval.index.rows import check_rows, open_rows, rows_of_table, save_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
RECORD = st.fixed_dictionaries(
    {
        "key": TEXT, "split": TEXT, "image": st.none() | TEXT, "captions": st.lists(TEXT, max_size=3),
        "thumbnail": st.binary(max_size=9),
    }
)  # fmt: skip


def table(records):
    """A table of these records in chunks of two."""
    schema = pa.schema([(name, TYPES[name]) for name in INDEX_COLUMNS])
    return pa.concat_tables(pa.Table.from_pylist(records[n : n + 2], schema) for n in range(0, len(records), 2))


@settings(max_examples=60)
@given(records=st.lists(RECORD, min_size=1, max_size=7))
def test_rows_are_read_as_they_were_written(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("rows")
    save_rows(rows_of_table(table(records)), folder)
    check_rows(folder)
    captions = [(number, caption) for number, record in enumerate(records) for caption in record["captions"]]
    numbers = np.arange(len(captions))[::-1]
    for rows in (open_rows(folder), rows_of_table(table(records))):
        assert (len(rows), rows.captions) == (len(records), len(captions))
        assert [rows.read(number) for number in reversed(range(len(records)))] == records[::-1]
        assert list(zip(rows.owners(numbers).tolist(), rows.texts(numbers), strict=True)) == captions[::-1]


@pytest.fixture
def folder(tmp_path):
    record = {"key": "a", "split": "train", "image": "a.jpg", "captions": ["x", "y"], "thumbnail": b"jpeg"}
    save_rows(rows_of_table(table([record, record | {"key": "b"}, record | {"key": "c", "captions": []}])), tmp_path)
    return tmp_path


def change(folder, place, value):
    starts = np.memmap(folder / "rows.starts", np.int64, "r+").reshape(-1, 3)
    starts[place] = value


@pytest.mark.parametrize(
    ("place", "value"), [((0, 0), 1), ((0, 2), 1), ((3, 0), 5), ((3, 0), -1)], ids=["first", "captions", "end", "minus"]
)
def test_files_that_do_not_go_together_are_refused(folder, place, value):
    change(folder, place, value)
    with pytest.raises(ValueError, match=r"rows\.bin|rows\.starts"):
        open_rows(folder)


@pytest.mark.parametrize("place", [(1, 0), (1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("value", [-1, 0, 3, 2**40])
def test_rows_that_are_not_as_they_were_written_are_found(folder, place, value):
    change(folder, place, value)
    with pytest.raises(Exception, match=r"rows\.starts is not in order|has not \d captions|JSON|truncated|missing"):
        check_rows(folder)


@pytest.mark.parametrize("length", [0, 5, 24, 95])
def test_a_file_of_starts_that_is_cut_is_refused(folder, length):
    path = folder / "rows.starts"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"."):
        open_rows(folder)
