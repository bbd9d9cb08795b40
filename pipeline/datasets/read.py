"""`read` looks at a source, picks its reader, and describes what it found.

CSV, TSV, JSON lines, Parquet   a column for the image, one for the caption; a row a caption or a list of captions
JSON                            COCO captions, a Karpathy split, or an array of objects, which is a table
Flickr8k / Flickr30k tokens     `NAME.jpg#0<TAB>caption`, with `Flickr_8k.trainImages.txt` and the like beside it
folder of images                with `metadata.csv|jsonl|parquet`, or with a text or JSON beside each image
folder of Parquet shards        a Hugging Face dataset on disk
WebDataset                      a tar, a folder of tars
patterns                        `data/{00000..00031}.tar`, `captions_{train,val}2017.json`, `data/*.tar`: files of one kind
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import chain, product
from pathlib import Path

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import printable
from .annotations import read_flickr_tokens, read_json
from .arrow import is_arrow, read_arrow
from .catalogue import Catalogue
from .folders import metadata_of, read_metadata, read_sidecars
from .names import look_again
from .parquet import read_parquet
from .records import IMAGE_SUFFIXES, Record, split_of
from .rows import encoding_of, is_json_lines
from .sources import ImageFile, leads_out
from .tables import TABLES, read_tables
from .webdataset import COMPRESSED, read_tars

CAPTIONS = " (qf needs one: text in a .txt beside each image, or a metadata.csv with the columns file_name and caption)"
MAX_FILES = 1_000_000  # that a brace pattern names
EXPECTED = "a CSV, TSV, JSON lines or Parquet file, COCO or Karpathy JSON, Flickr8k tokens, a WebDataset tar, or a folder of these"


@dataclass(frozen=True)
class Dataset:
    """Records, and a description of what was found at the source."""

    kind: str
    found: str
    records: Catalogue = field(repr=False)


Found = tuple[str, str, Iterator[Record]]  # kind, in words, records


def read(sources: Path | Sequence[Path], options: ReadOptions | None = None) -> Dataset:
    """Read the caption dataset at a path or a pattern, or in several files of one kind. DatasetError if there is none, if
    keys repeat, or if no record can be used. Memory: see the reader of its kind and `Catalogue`."""
    options = options or ReadOptions()
    sources = [sources] if isinstance(sources, Path) else sources
    source = sources[0]
    look_again()
    fractions = options.val_fraction + options.test_fraction
    if fractions > 1:
        raise DatasetError(f"--val-fraction and --test-fraction are {fractions:g} together; all is 1")
    if options.images and not options.images.is_dir():
        raise DatasetError(f"--images {options.images} is no folder; give the folder that image paths start from")
    if len(sources) == 1 and source.is_dir():
        kind, found, records = _read_folder(source, options)
    else:
        kind, found, records = _read_files(list(dict.fromkeys(chain.from_iterable(map(_files, sources)))), options)
    watched = _Watched(records, options)
    catalogue = Catalogue(watched, (lambda key: split_of(key, None, options)) if fractions else None)
    if not len(catalogue):
        raise DatasetError(f"{source} holds no records; a dataset needs at least one image with a caption")
    if not sum(catalogue.splits.values()):
        cure = CAPTIONS if catalogue.first_problem.endswith(": no caption") else ""
        raise DatasetError(f"{source}: none of {len(catalogue):,} records can be used; {catalogue.first_problem}{cure}")
    if catalogue.drawn and sum(map(bool, catalogue.splits.values())) > 1:
        found += ", all of it train: other splits are drawn from it"
    if catalogue.left_out:
        found += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in catalogue.left_out.items())
    return Dataset(kind, found + str(watched), catalogue)


class _Watched:
    """Records on their way; counts the images that lie outside their folder, and those found under another name."""

    def __init__(self, records: Iterable[Record], options: ReadOptions) -> None:
        self._records, self._confined = records, options.confine
        self._out = self._renamed = 0
        self._example = ""

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            source = record.source
            if isinstance(source, ImageFile) and not record.problem:
                self._out += not self._confined and leads_out(source)
                if not record.image.endswith(source.name):
                    self._renamed += 1
                    self._example = self._example or f"{printable(source.name)} for {record.image}"
            yield record

    def __str__(self) -> str:
        out = f"; {self._out:,} images lie outside their folder" if self._out else ""
        if self._renamed:
            out += f"; {self._renamed:,} images have nearly the name that is given, such as {self._example}"
        return out


def _files(source: Path) -> list[Path]:
    """The files that a source names: itself, or what its pattern matches. DatasetError if one does not exist."""
    if re.match("https?:/", str(source)):
        raise DatasetError(f"{source} is a URL; download it first, for image collections with img2dataset")
    if source.is_dir():
        raise DatasetError(f"{source} is a folder; give one folder alone, or files of one kind")
    if os.path.exists(source):
        return [source]
    paths = list(dict.fromkeys(path for pattern in braces(source) for path in _matching(pattern)))
    for path in paths:
        if not os.path.exists(path):
            raise DatasetError(f"{path} does not exist; give {EXPECTED}")
    return paths


def _matching(pattern: Path) -> list[Path]:
    """The files that a pattern with * and ? matches, in order; itself where there are none."""
    found = glob(str(pattern).replace("[", "[[]"), recursive=True)
    return sorted(Path(name) for name in found if os.path.isfile(name)) or [pattern]


def braces(pattern: Path) -> list[Path]:
    """The paths that a pattern names: `{00..11}` counts, keeping leading zeros; `{a,b}` lists."""
    parts = re.split(r"\{([^{}]*)\}", str(pattern))
    choices: list[Sequence[str]] = []
    total = 1
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif count := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(count[1]), int(count[2])
            if abs(last - first) >= MAX_FILES:
                raise DatasetError(f"{pattern} names more than {MAX_FILES:,} files; give a smaller pattern")
            step = 1 if first <= last else -1
            choices.append([str(n).zfill(len(count[1])) for n in range(first, last + step, step)])
        else:
            choices.append(part.split(",") if "," in part else ["{" + part + "}"])
        total *= len(choices[-1])
    if total > MAX_FILES:
        raise DatasetError(f"{pattern} names more than {MAX_FILES:,} files; give a smaller pattern")
    return [Path("".join(choice)) for choice in product(*choices)]


def _read_files(paths: Sequence[Path], options: ReadOptions) -> Found:
    kinds = [_kind(path) for path in paths]
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


def _kind(path: Path) -> str:
    """The kind of a file: by its first bytes where they decide, otherwise by its name."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        start = file.read(2**16)
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


def _read_folder(folder: Path, options: ReadOptions) -> Found:
    if tables := metadata_of(folder):
        return "imagefolder", *read_metadata(folder, _within(folder, tables), options)
    tokens = [path for path in (*folder.glob("*.token.txt"), *folder.glob("*.token")) if ".lemma." not in path.name]
    if len(tokens) > 1:
        raise DatasetError(f"{folder} holds {' and '.join(sorted(path.name for path in tokens))}; name the one to read")
    if tokens:
        found, records = read_flickr_tokens(_within(folder, tokens)[0], options)
        return "flickr tokens", f"{tokens[0].name}: {found}", records
    if tars := sorted(_below(folder, ".tar")):
        return "webdataset", *read_tars(_within(folder, tars), folder, options)
    if captions := [*folder.glob("captions_*.json"), *folder.glob("annotations.json"), *folder.glob("dataset_*.json")]:
        return read_json(_within(folder, sorted(captions)), options)
    if shards := sorted(_below(folder, ".parquet")):
        return "parquet", *read_parquet(_within(folder, shards), options)
    if any(_below(folder, *(f".{suffix}" for suffix in IMAGE_SUFFIXES))):
        return "sidecars", "images with a .txt or .json beside each", read_sidecars(folder, options)
    if next(folder.glob("*.arrow"), None):
        raise DatasetError(
            f"{folder} holds features that qf extracted, or Arrow files as save_to_disk of Hugging Face datasets writes them; "
            "save the dataset with to_parquet instead"
        )
    raise DatasetError(
        f"{folder} holds no captions: expected metadata.csv, metadata.jsonl or metadata.parquet in it (columns file_name and "
        "caption), texts beside images, tars or Parquet shards, or name the caption file itself"
    )


def _below(folder: Path, *suffixes: str) -> Iterator[Path]:
    for top, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(top, name) for name in names if name.lower().endswith(suffixes) and not name.startswith("."))


def _within(folder: Path, files: list[Path]) -> list[Path]:
    """The files, unless a link among them leads out of the folder."""
    top = os.path.join(os.path.realpath(folder), "")
    for file in files:
        if not os.path.realpath(file).startswith(top):
            raise DatasetError(
                f"{file} is a link out of {folder}; name the file itself if you trust it, or copy it there"
            )
    return files
