"""Rows of text tables, CSV and JSON. An error names the line of the file.

A byte order mark tells UTF-16 and UTF-32; all else is UTF-8. Memory: one row, and one JSON document where the file is a single
one."""

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr, Literal

from ..errors import DatasetError

MAX_LINE = 64 * 2**20  # characters
HEAD = 100  # lines that tell the separator, and lines before the table that are no part of it
MARKS = (",", "\t", ";", "|")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_QUOTES: dict[str, Literal[0, 3]] = {
    ",": csv.QUOTE_MINIMAL,
    ";": csv.QUOTE_MINIMAL,
    "\t": csv.QUOTE_NONE,
    "|": csv.QUOTE_NONE,
}
_SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)  # Excel's first line
_PICTURE = re.compile(r"^https?://|\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def encoding_of(start: bytes) -> str:
    """The encoding that the first bytes of a text tell."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")


@dataclass(frozen=True)
class _Dialect:
    skip: int  # lines before the first row
    mark: str
    quotes: Literal[0, 3]  # csv.QUOTE_MINIMAL, or csv.QUOTE_NONE for raw texts that hold bare quotes


def csv_rows(path: Path, known: Collection[str]) -> Iterator[list[str]]:
    """The rows of a CSV file as lists of cells; the first one is mostly the line of names, of which some are `known`.

    The first lines tell the separator: comma, tab, semicolon or bar. Before them, empty lines, comments after # and Excel's
    `sep=;` are skipped. Newlines in quotes, empty lines and short rows are accepted. DatasetError for a row that is longer
    than the first one, and for anything else."""
    csv.field_size_limit(MAX_LINE)
    encoding = _encoding(path)
    rows = csv.reader(())
    try:
        dialect = _dialect(path, encoding, known)
        with open(path, encoding=encoding, newline="") as file:
            lines = _lines(file, path)
            for _ in range(dialect.skip):
                next(lines)
            rows = csv.reader(lines, delimiter=dialect.mark, quoting=dialect.quotes, strict=True)
            width = 0
            for row in rows:
                width = width or len(row)
                if len(row) > width and any(row[width:]):
                    raise DatasetError(
                        f"{path}, line {dialect.skip + rows.line_num}: {len(row)} fields under {width} column names; "
                        f"a text that holds {dialect.mark!r} needs quotes around it"
                    )
                if row:
                    yield row[:width]
    except UnicodeError as error:
        raise not_utf8(path, encoding) from error
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {dialect.skip + rows.line_num}, cannot be read as csv: {_in_csv(error)}"
        ) from error


def _in_csv(error: csv.Error) -> str:
    if "expected after" in str(error):
        return "a separator is expected after a quote; write quotes inside a quoted text twice"
    if "field limit" in str(error):
        return f"a text of more than {MAX_LINE:,} characters; is a quote never closed?"
    return "unexpected end; is a quote never closed?"


def _dialect(path: Path, encoding: str, known: Collection[str]) -> _Dialect:
    """How the file is to be read. DatasetError if it holds no row."""
    skip, mark = 0, ""
    with open(path, encoding=encoding, newline="") as file:
        head: list[str] = []
        for line in _lines(file, path):
            if not head and (told := _SEPARATOR.fullmatch(line.strip(" \r\n"))):
                skip, mark = skip + 1, told[1]
            elif not head and (not line.strip() or _is_comment(line, known)):
                skip += 1
            else:
                head.append(line)
            if skip > HEAD or len(head) == HEAD:
                break
    if not head:
        raise DatasetError(f"{path} is empty; expected a line of column names, then a row an image")
    mark = mark or _mark(path, head, known)
    quotes = _QUOTES.get(mark, csv.QUOTE_MINIMAL)
    if quotes == csv.QUOTE_NONE and _is_quoted(path, encoding, skip, mark):
        quotes = csv.QUOTE_MINIMAL
    return _Dialect(skip, mark, quotes)


def _is_comment(line: str, known: Collection[str]) -> bool:
    return line.startswith("#") and max(_known(line, mark, known) for mark in MARKS) < 2


def _known(line: str, mark: str, known: Collection[str]) -> int:
    """How many of the cells in a line are known names of columns."""
    return sum(cell.strip(' \t\r\n"#').lower() in known for cell in line.split(mark))


def _mark(path: Path, head: list[str], known: Collection[str]) -> str:
    """The separator: the one between known names; or else the one that sets a picture's name apart, or that splits most
    lines into as many cells as the first."""
    marks = MARKS if path.suffix.lower() != ".tsv" or "\t" not in head[0] else ("\t",)
    named = [_known(head[0], mark, known) for mark in marks]
    if any(named):
        return marks[named.index(max(named))]

    def apart(mark: str) -> tuple[bool, int, int]:
        try:
            rows = list(csv.reader(head, delimiter=mark, quoting=_QUOTES[mark]))
        except csv.Error:
            return False, 0, 0
        width = len(rows[0])
        pictures = any(_PICTURE.search(cell) and not any(other in cell for other in MARKS) for cell in rows[0])
        return (pictures, sum(len(row) == width for row in rows), width) if width > 1 else (False, 0, 0)

    return max(marks, key=apart)  # the first of equals


def _is_quoted(path: Path, encoding: str, skip: int, mark: str) -> bool:
    """Whether quotes in the file are those of CSV: each field that starts with one ends with one, and holds others twice.

    Otherwise fields are raw texts. A quoted text over several lines is a raw one if a further line is itself a row."""
    with open(path, encoding=encoding, newline="") as file:
        lines = _lines(file, path)
        for _ in range(skip):
            next(lines)
        recent: deque[str] = deque()
        rows = csv.reader(_kept(lines, recent), delimiter=mark, strict=True)
        width = 0
        try:
            for row in rows:
                width = width or len(row)
                recent.popleft()
                for line in recent:
                    cells = line.rstrip("\r\n").split(mark)
                    if len(cells) == width and any(_PICTURE.search(cell) for cell in cells):
                        return False
                recent.clear()
        except csv.Error:
            return False
    return True


def _kept(lines: Iterator[str], recent: deque[str]) -> Iterator[str]:
    for line in lines:
        recent.append(line)
        yield line


def json_lines(path: Path) -> Iterator[Any]:
    """A JSON value a line."""
    encoding = _encoding(path)
    text = None if encoding == "utf-8-sig" else encoding
    with open(path, "r" if text else "rb", encoding=text) as file:
        number = 0
        try:
            for line in _lines(file, path):
                number += 1
                if line.strip():
                    yield json.loads(line)
        except UnicodeError as error:
            raise not_utf8(path, encoding) from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number}, cannot be read as JSON lines: {in_words(error)}") from error


def json_document(path: Path) -> Any:
    """The one JSON value of a file."""
    try:
        return json.loads(path.read_bytes())
    except UnicodeError as error:
        raise not_utf8(path, _encoding(path)) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {in_words(error)}") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text, without their ends."""
    encoding = _encoding(path)
    try:
        with open(path, encoding=encoding) as file:
            for line in _lines(file, path):
                yield line.rstrip("\n")
    except UnicodeError as error:
        raise not_utf8(path, encoding) from error


def is_json_lines(path: Path) -> bool:
    """Whether a file that starts with a bracket holds a JSON object or array a line, not one over all lines."""
    with open(path, encoding=_encoding(path), errors="replace") as file:
        try:
            first = json.loads(file.readline(2**20))
            more = file.read(2**16).lstrip()[:1]
        except (ValueError, RecursionError):
            return False
    return (isinstance(first, dict) and more == "{") or (isinstance(first, list) and more == "[")


def in_words(error: Exception) -> str:
    """What is wrong with a JSON or a text, and where."""
    if isinstance(error, json.JSONDecodeError):
        return f"it is no valid JSON at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        return encoding_of(file.read(4))


def _lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DatasetError(
                f"{path} holds a line of more than {MAX_LINE} characters; it is no table that qf can read"
            )
        yield line


def not_utf8(path: Path, encoding: str = "utf-8-sig") -> DatasetError:
    """The error for a text that is not in the encoding which its first bytes tell."""
    if encoding != "utf-8-sig":
        return DatasetError(f"{path} begins as {encoding.upper()} but is damaged; write it again, as UTF-8")
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
