"""A folder to records: which of the files in it are the dataset. Names only suggest it; a look inside decides."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..artifacts import is_own
from ..config import ReadOptions
from ..errors import DatasetError
from ..lfs import CURE, is_lfs_pointer
from .annotations import COCO, caption_document, read_flickr_tokens
from .arrow import read_arrow
from .columns import TableColumns, image_name, is_url
from .files import Found, kind_of, read_files
from .folders import holds_captions, metadata_of, read_metadata, read_pictures, read_sidecars
from .look import Look, look_into, speaks_of_captions
from .names import image_folder, images_below, names_in
from .parquet import read_parquet
from .records import SPLIT_ALIASES
from .rows import json_document
from .shards import picture_leaf
from .tables import TABLES, first_images
from .vqa import ASKED, is_asked
from .webdataset import read_tars

MAX_PROBED = 100  # tables that are looked into
MAX_DOCUMENT = 2**26  # bytes of a JSON file that is read to find out what it is; of a larger one, its ends
ENDS = 2**16
PICTURES = "pictures"  # the kind of a folder that holds no captions
CALLED = {
    "tar": "tar",
    "parquet": "Parquet file",
    "arrow": "Arrow file",
    "table": "table",
    "zip": "zip",
    "compressed": "compressed file",
}


@dataclass(frozen=True)
class Candidate:
    """A file that may be the dataset: the folder of its images if --images must say so, or the reason why it is none.
    `missing`: it is one, but none of its first images is there."""

    path: Path
    images: Path | None = None
    reason: str = ""
    missing: bool = False
    asked: bool = False  # questions or annotations of VQAv2, OK-VQA or GQA: all such files are one dataset


def read_folder(folder: Path, options: ReadOptions) -> Found:
    """Kind, a description, and the records of a folder. DatasetError if it holds no dataset, or several."""
    if is_own(folder):
        raise DatasetError(f"{folder} was written by qf; give the dataset that it was made from")
    look = look_into(folder, options.confine)
    used: set[Path] = set()
    kind, found, records = _choose(look, options, used)
    for name, called in CALLED.items() if kind != PICTURES else ():
        rest = [path for path in look.of(name) if path not in used]
        if rest:
            look.passed.add(called, str(rest[0].relative_to(folder)), count=len(rest))
    if kind in ("webdataset", "parquet", "arrow"):
        look.passed.add("picture", look.a_picture, " beside them", look.pictures)
    passed = [look.passed, look.others] if kind == PICTURES else [look.passed]
    left = ", ".join(filter(None, map(str, passed)))
    return kind, found + (f"; not read: {left}" if left else ""), records


def _choose(look: Look, options: ReadOptions, used: set[Path]) -> Found:
    """The dataset in a folder. The files that are read are added to `used`."""
    folder = look.folder
    if tables := metadata_of(look):
        used.update(_checked(look, tables, options))
        return "imagefolder", *read_metadata(folder, tables, options)
    if shards := _arrow_files(look):
        used.update(look.of("arrow"))
        return "arrow", *read_arrow(_checked(look, shards, options), options, _saved_split(shards))
    if tokens := [path for path in _near(look, "text") if _is_token_file(path)]:
        if len(tokens) > 1:
            raise _several(folder, tokens)
        found, records = read_flickr_tokens(_checked(look, tokens, options)[0], _with_images(look, tokens[0], options))
        return "flickr tokens", f"{tokens[0].name}: {found}", records
    if tars := look.of("tar"):
        used.update(_checked(look, tars, options))
        return "webdataset", *read_tars(tars, folder, options)
    beside = holds_captions(look, options)
    with_tables = 2 * look.captioned < look.pictures or not beside
    strict = replace(options, allow_uncaptioned=False, questions=None)
    candidates = _candidates(look, replace(strict, captioned=True), with_tables)
    if not beside and all(candidate.reason for candidate in candidates):
        asked = _candidates(look, strict, with_tables)
        candidates = asked if not all(candidate.reason for candidate in asked) else candidates
    if options.allow_uncaptioned and not look.pictures and all(candidate.reason for candidate in candidates):
        candidates = _candidates(look, options, with_tables)
    whole = [candidate for candidate in candidates if not candidate.reason]
    if whole:
        return _read_candidates(look, whole, options, used)
    if look.pictures:
        return _read_pictures(look, candidates, beside, options)
    if missing := [candidate for candidate in candidates if candidate.missing]:
        return _read_candidates(look, missing, options, used)
    failed = [candidate for candidate in candidates if candidate.path.suffix.lower() in TABLES]
    others = [candidate for candidate in candidates if COCO in candidate.reason or len(candidates) == 1]
    if failed or others:
        raise DatasetError((failed or others)[0].reason)
    passed = f", and not read: {look.passed}" if str(look.passed) else ""
    raise DatasetError(
        f"{folder} holds no pictures and no captions (qf reads pictures alone or with a .txt beside each, tars, Parquet shards, "
        f"and tables with the columns file_name and caption, such as metadata.csv; seen: {look}{passed}); name a caption "
        "file itself, with --image-column and --caption-column if its columns have unusual names"
    )


def _candidates(look: Look, options: ReadOptions, with_tables: bool) -> list[Candidate]:
    """The files that may be the dataset; `with_tables` also tables and texts, where nothing else is one."""
    found = [_parquet(look, options)] if look.names.get("parquet") else []
    found += [_document(path, look, options) for path in _near(look, "json")]
    if with_tables and all(candidate.reason for candidate in found):
        found += [_table(path, look, options) for path in (*_near(look, "table"), *_near(look, "text"))]
    return found


def _read_pictures(look: Look, failed: Sequence[Candidate], beside: bool, options: ReadOptions) -> Found:
    """The pictures of a folder, with the captions that stand `beside` them, or without any.

    DatasetError if one of the files that `failed` to be read as a table seems to hold their captions."""
    asked = (options.image_column or options.caption_column) and not options.allow_uncaptioned
    if not beside and not options.allow_uncaptioned:
        for candidate in failed:
            if speaks_of_captions(candidate.path):
                cure = (
                    "" if "--allow" in candidate.reason else "; --allow-uncaptioned takes the pictures without captions"
                )
                raise DatasetError(candidate.reason + cure)
    if beside or asked:
        return "sidecars", *read_sidecars(look, options)
    return PICTURES, *read_pictures(look, options)


def _near(look: Look, kind: str) -> list[Path]:
    """The files of a kind in the folder or in a folder in it; at most MAX_PROBED."""
    return [path for path in look.of(kind) if len(path.relative_to(look.folder).parts) <= 2][:MAX_PROBED]


def _is_token_file(path: Path) -> bool:
    return path.name.endswith((".token.txt", ".token")) and ".lemma." not in path.name


def _several(folder: Path, paths: Sequence[Path]) -> DatasetError:
    names = " and ".join(str(path.relative_to(folder)) for path in paths[:5])
    return DatasetError(f"{folder} holds {names}; name the one to read, or a pattern that matches all")


def _checked(look: Look, paths: Sequence[Path], options: ReadOptions) -> Sequence[Path]:
    """The files, all regular and readable. DatasetError if a link among them leads out although links are confined."""
    top = os.path.join(os.path.realpath(look.folder), "")
    for path in paths:
        if options.confine and not os.path.realpath(path).startswith(top):
            raise DatasetError(f"{path} is a link out of {look.folder}; leave out --confine if you trust it")
        kind_of(path)
    return paths


def _arrow_files(look: Look) -> list[Path]:
    """The Arrow files of one Hugging Face dataset: those that its state.json lists, without what its cache holds besides.
    DatasetError if there are several datasets."""
    every = [path for path in look.of("arrow") if not path.name.startswith(("cache-", "indices", "tmp"))]
    kept = []
    for folder in sorted({path.parent for path in every}):
        here = [path for path in every if path.parent == folder]
        state = _object(folder / "state.json")
        listed = {part.get("filename") for part in state.get("_data_files") or [] if isinstance(part, dict)}
        kept += [path for path in here if not listed or path.name in listed]
    roots = {
        path.parent.parent if (path.parent.parent / "dataset_dict.json").is_file() else path.parent for path in kept
    }
    if len(roots) > 1:
        raise _several(look.folder, sorted(roots))
    return kept


def _saved_split(shards: Sequence[Path]) -> str | None:
    """The split of a dataset that was saved alone."""
    split = _object(shards[0].parent / "state.json").get("_split")
    alone = len({path.parent for path in shards}) == 1
    return split if alone and isinstance(split, str) and split.lower() in SPLIT_ALIASES else None


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json_document(path) if path.is_file() and path.stat().st_size < MAX_DOCUMENT else {}
    except DatasetError:
        return {}
    return value if isinstance(value, dict) else {}


def _parquet(look: Look, options: ReadOptions) -> Candidate:
    """All Parquet files of a folder, which are one table. The first one tells what it is."""
    path = look.of("parquet")[0]
    for each in look.of("parquet"):
        if is_lfs_pointer(each):
            raise DatasetError(f"{each} {CURE}")
    try:
        kind_of(path)
        schema = pq.read_schema(path)
        columns = TableColumns.choose(schema.names, options, path)
        if picture_leaf(schema, columns.image, path):
            return Candidate(path)
        batches = pq.ParquetFile(path).iter_batches(100, columns=[columns.image])
        return _pointing(path, [row[columns.image] for row in next(batches).to_pylist()], look, options)
    except DatasetError as error:
        return Candidate(path, reason=str(error))
    except (pa.ArrowException, OSError, StopIteration, ValueError):
        return Candidate(path)  # its reader says what is wrong


def _document(path: Path, look: Look, options: ReadOptions) -> Candidate:
    """A JSON file, looked into: whole if it is small, otherwise at its ends."""
    if is_lfs_pointer(path):
        raise DatasetError(f"{path} {CURE}")
    try:
        if path.stat().st_size > MAX_DOCUMENT:
            with open(path, "rb") as file:
                ends = file.read(ENDS)
                file.seek(-ENDS, os.SEEK_END)
                ends += file.read()
            texts = rb"caption|sentences|raw" if options.captioned else rb"caption|sentences|raw|conversations"
            asked = not options.captioned and bool(re.search(ASKED, ends))
            found = asked or re.search(rb'"(' + texts + rb')"', ends)
            return Candidate(path, reason="" if found else f"{path} holds no captions", asked=asked)
        if kind_of(path) == "jsonl":
            return _table(path, look, options)
        document = json_document(path)
        if is_asked(document) and not options.captioned:
            return Candidate(path, asked=True)
        rows = caption_document(document, path, options)
        if rows is None:
            return Candidate(path, images=_images_of_coco(document, path, look, options))
        return _rows(path, rows, look, options)
    except DatasetError as error:
        return Candidate(path, reason=str(error))


def _images_of_coco(document: dict[str, Any], path: Path, look: Look, options: ReadOptions) -> Path | None:
    names = [str(image.get("file_name") or image.get("filename") or "") for image in document["images"][:100]]
    return _images(path, names, look, options)


def _table(path: Path, look: Look, options: ReadOptions) -> Candidate:
    """A CSV, TSV or JSON lines file, looked into."""
    if is_lfs_pointer(path):
        raise DatasetError(f"{path} {CURE}")
    try:
        kind = kind_of(path)
        if kind not in ("csv", "tsv", "jsonl"):
            return Candidate(path, reason=f"{path} is no table")
        return _pointing(path, first_images(path, kind == "jsonl", options), look, options)
    except DatasetError as error:
        return Candidate(path, reason=str(error))


def _rows(path: Path, rows: Sequence[Any], look: Look, options: ReadOptions) -> Candidate:
    some = [row for row in islice(rows, 1000) if isinstance(row, dict)]
    columns = TableColumns.choose(list(dict.fromkeys(name for row in some for name in row)), options, path)
    return _pointing(path, [row.get(columns.image) for row in some[:100]], look, options)


def _pointing(path: Path, cells: Sequence[Any], look: Look, options: ReadOptions) -> Candidate:
    """A table by its first cells that name images: it is the dataset if one of these is there."""
    names = [name for cell in cells if (name := image_name(cell)) is not None]
    if any(is_url(name) for name in names):
        return Candidate(
            path, reason=f"{path} holds image URLs, which qf does not download; fetch them with img2dataset first"
        )
    images = _images(path, names, look, options)
    place = images_below(options.images, names) if options.images else images or image_folder(path, names)
    if not any(names_in(str(place)).find(name).found for name in names[:20]):
        if any(isinstance(cell, dict) and cell.get("bytes") for cell in cells):
            return Candidate(path)
        example = f", such as {names[0]}" if names else ""
        return Candidate(
            path,
            reason=f"{path} names images that are not there{example}; say with --images DIR where they are",
            missing=True,
        )
    return Candidate(path, images)


def _images(path: Path, names: Sequence[str], look: Look, options: ReadOptions) -> Path | None:
    """Where the images of a table are, if that is not near it but in the folder that was named."""
    if options.images:
        return None
    near = image_folder(path, names)
    if any(names_in(str(near)).find(name).found for name in names[:20]):
        return None
    above = image_folder(look.folder / path.name, names)
    return above if any(names_in(str(above)).find(name).found for name in names[:20]) else None


def _with_images(look: Look, path: Path, options: ReadOptions) -> ReadOptions:
    """The options for a token file whose images are elsewhere in the folder that was named."""
    if options.images or path.parent == look.folder:
        return options
    with open(path, encoding="utf-8", errors="replace") as file:
        names = [line.split("#")[0] for line in islice(file, 20)]
    return replace(options, images=_images(path, names, look, options))


def _read_candidates(look: Look, whole: Sequence[Candidate], options: ReadOptions, used: set[Path]) -> Found:
    """The records of the one dataset among files that could each be it: a single one, or a file a split."""
    chosen = whole if all(candidate.asked for candidate in whole) else _one_dataset(whole)
    if chosen is None:
        raise _several(look.folder, [candidate.path for candidate in whole])
    paths = [candidate.path for candidate in chosen]
    if paths[0].suffix.lower() == ".parquet":
        used.update(_checked(look, shards := look.of("parquet"), options))
        return "parquet", *read_parquet(shards, options)
    used.update(_checked(look, paths, options))
    if chosen[0].images is not None:
        options = replace(options, images=chosen[0].images)
    kind, found, records = read_files(paths, options)
    return kind, f"{', '.join(str(path.relative_to(look.folder)) for path in paths[:4])}: {found}", records


def _one_dataset(whole: Sequence[Candidate]) -> Sequence[Candidate] | None:
    """The candidates that are one dataset, or None if it is not clear which: files whose names differ in split or number."""
    different = list(_different(whole))
    names = [
        os.path.relpath(each.path, os.path.commonpath([each.path.parent for each in different])) for each in different
    ]
    alike = len({(_shape(name), each.images) for name, each in zip(names, different, strict=True)}) == 1
    versions = any(re.search(r"(^|[^a-z])v(ersion)?[_-]?\d", name.lower()) for name in names)
    return different if len(different) == 1 or (alike and not versions) else None


def _shape(name: str) -> str:
    """A name without the words for splits, and without numbers."""
    plain = re.sub("[a-z]+", lambda word: "#" if word[0] in SPLIT_ALIASES else word[0], name.lower())
    return re.sub(r"\d+", "", plain)


def _different(whole: Sequence[Candidate]) -> Iterator[Candidate]:
    """The candidates without copies: Kaggle packs some tables twice."""
    seen: list[bytes | int] = []
    for candidate in sorted(whole, key=lambda each: len(each.path.parts)):
        size = candidate.path.stat().st_size
        content = candidate.path.read_bytes() if size <= MAX_DOCUMENT else size
        if content not in seen:
            seen.append(content)
            yield candidate
