"""Files to records: the kind of a file, and the reader of each kind."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..artifacts import is_own
from ..config import ReadOptions
from ..errors import DatasetError
from ..lfs import CURE, is_lfs_text
from .annotations import read_flickr_tokens, read_json
from .arrow import is_arrow, read_arrow
from .look import SIGNATURES, cannot_open
from .parquet import read_parquet
from .records import Record
from .rows import encoding_of, is_json_lines
from .tables import TABLES, read_tables
from .webdataset import COMPRESSED, read_tars

EXPECTED = "a CSV, TSV, JSON lines or Parquet file, COCO or Karpathy JSON, Flickr8k tokens, a WebDataset tar, or a folder of these"
Found = tuple[str, str, Iterator[Record]]  # kind, in words, records


def read_files(paths: Sequence[Path], options: ReadOptions) -> Found:
    """Kind, a description, and the records of one or several files of one kind. DatasetError if they are none."""
    kinds = [kind_of(path) for path in paths]
    kind = kinds[0]
    for path, other in zip(paths, kinds, strict=True):
        if other != kind:
            raise DatasetError(f"{paths[0]} is {kind} but {path} is {other}; name files of one kind")
    path = paths[0]
    match kind:
        case "webdataset":
            common = Path(os.path.commonpath([path.parent for path in paths]))
            return kind, *read_tars(paths, common, options)
        case "parquet":
            return kind, *read_parquet(paths, options)
        case "arrow":
            return kind, *read_arrow(paths, options)
        case "json":
            return read_json(paths, options)
    if kind != "flickr tokens":
        return kind, *read_tables(paths, kind == "jsonl", options)
    if len(paths) > 1:
        raise DatasetError(f"{paths[0]} and {paths[1]}: several token files cannot be read at once; join them into one")
    return kind, *read_flickr_tokens(path, options)


def kind_of(path: Path) -> str:
    """The kind of a file: by its first bytes where they decide, otherwise by its name. DatasetError if it is none, if it
    cannot be opened, or if qf wrote it."""
    suffix = path.suffix.lower()
    start = _start(path)
    if is_own(path.parent):
        raise DatasetError(f"{path} was written by qf; give the dataset that it was made from")
    text = start.decode(encoding_of(start), errors="replace").lstrip()
    if start.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    if is_arrow(start):
        return "arrow"
    if start[257:262] == b"ustar" or suffix == ".tar":
        return "webdataset"
    if start.startswith(tuple(COMPRESSED)):
        cure = next(cure for magic, cure in COMPRESSED.items() if start.startswith(magic))
        raise DatasetError(f"{path} is compressed; unpack it first, as with {cure}")
    if start.startswith(b"PK\x03\x04"):
        raise DatasetError(f"{path} is a zip archive; unzip it, and give the folder or the table in it")
    if SIGNATURES.match(start) and suffix not in (*TABLES, ".json", ".txt", ".token"):
        raise DatasetError(f"{path} is a picture; give the folder that holds it, or the table that names it")
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json" or (suffix not in TABLES and text[:1] in ("{", "[")):
        return "jsonl" if is_json_lines(path) else "json"
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    line = text.partition("\n")[0]
    if suffix == ".token" or re.match(r"[^\t]+#\d+\t", line):
        return "flickr tokens"
    if suffix == ".txt" and re.search(r"[,\t;|]", line):  # Kaggle's Flickr8k has a CSV in captions.txt
        return "tsv" if "\t" in line else "csv"
    raise DatasetError(f"{path} is none of the datasets that qf reads; give {EXPECTED}")


def _start(path: Path) -> bytes:
    """The first bytes of a regular file. DatasetError if it is none, or a Git LFS pointer; nothing else is opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DatasetError(
                f"{path} is no regular file but a pipe, socket or device; save its content to a file first"
            )
        with open(path, "rb") as file:
            start = file.read(2**16)
    except OSError as error:
        raise cannot_open(path, error) from error
    if is_lfs_text(start):
        raise DatasetError(f"{path} {CURE}")
    return start
