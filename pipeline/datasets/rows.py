"""Rows of text tables, CSV and JSON, as objects. An error names the line of the file.

Memory: one row, and one JSON document where the file is a single one."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, Literal

from ..errors import DatasetError

MAX_LINE = 64 * 2**20  # characters


def csv_rows(path: Path) -> Iterator[Any]:
    """The names in the header, then each row as an object. The header tells the separator: comma, tab, semicolon or bar.

    A byte order mark, newlines in quotes, empty lines and short rows are accepted; anything else is a DatasetError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline(2**16)
            mark = "\t" if path.suffix.lower() == ".tsv" else max(",\t;|", key=head.count)  # the first of equals
            file.seek(0)
            # captions between tabs hold bare quotes
            quotes: Literal[0, 3] = csv.QUOTE_MINIMAL if mark in ",;" else csv.QUOTE_NONE
            rows = csv.reader(_lines(file, path), delimiter=mark, quoting=quotes, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not any(header):
                raise DatasetError(f"{path} starts with an empty line or is empty; expected a line of column names")
            yield header
            width = len(header)
            for row in rows:
                if len(row) > width and any(row[width:]):
                    raise DatasetError(
                        f"{path}, line {rows.line_num}: {len(row)} fields under {width} column names; "
                        f"a text that holds {mark!r} needs quotes around it"
                    )
                if row:
                    yield dict(zip(header, row, strict=False))
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {rows.line_num}, cannot be read as csv: {error} (is a quote closed too early, or not at all?)"
        ) from error


def json_lines(path: Path) -> Iterator[Any]:
    """A JSON value a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except UnicodeDecodeError as error:
                    raise not_utf8(path) from error
                except (ValueError, RecursionError) as error:
                    raise DatasetError(f"{path}, line {number}, cannot be read as JSON lines: {error}") from error


def json_document(path: Path) -> Any:
    """The one JSON value of a file."""
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, without their ends."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in _lines(file, path):
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def is_json_lines(path: Path) -> bool:
    """Whether a file that starts with `{` holds a JSON object a line, not one over all lines."""
    with open(path, "rb") as file:
        try:
            return isinstance(json.loads(file.readline(2**20)), dict) and file.read(2**16).lstrip()[:1] == b"{"
        except (ValueError, RecursionError):
            return False


def _lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DatasetError(
                f"{path} holds a line of more than {MAX_LINE} characters; it is no table that qf can read"
            )
        yield line


def not_utf8(path: Path) -> DatasetError:
    """The error for a text that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return DatasetError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; "
                    "convert the file, as with iconv -f ENCODING -t UTF-8"
                )
    return DatasetError(f"{path} is not UTF-8; convert the file, as with iconv -f ENCODING -t UTF-8")
