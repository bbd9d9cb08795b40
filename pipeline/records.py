"""Caption datasets to records. One reader a kind of dataset, each a generator; `read` looks at the source and picks.

CSV, TSV, JSON lines, Parquet   a column for the image, one for the caption; a row a caption or a list of captions
Flickr8k / Flickr30k tokens     `NAME.jpg#0<TAB>caption`, with `Flickr_8k.trainImages.txt` and the like beside it
folder of images                with `metadata.csv|jsonl|parquet` (the Hugging Face imagefolder convention), also one a split
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from .errors import DatasetError

IMAGE_COLUMNS = (
    "image", "image_path", "file_name", "filename", "filepath", "file_path", "path", "file", "img", "image_name",
    "image_file", "photo", "picture", "url", "image_url",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "captions", "text", "texts", "sentence", "sentences", "description", "descriptions", "comment", "title",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
KEY_COLUMNS = ("key",)
SPLITS = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images")


@dataclass(frozen=True)
class Record:
    """One image with its captions. `problem` says why it cannot be used, if the dataset itself already tells."""

    key: str
    image: str  # as the dataset names it
    source: Path | bytes
    captions: tuple[str, ...]
    split: str
    problem: str = ""


@dataclass(frozen=True)
class ReadOptions:
    """What the dataset cannot tell by itself. Fractions are of all records, drawn by a hash of the key."""

    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    key_column: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0


@dataclass(frozen=True)
class Dataset:
    """Records, and in words what was found at the source."""

    kind: str
    found: str
    records: list[Record] = field(repr=False)


def read(source: Path, options: ReadOptions | None = None) -> Dataset:
    """Read the caption dataset at `source`. DatasetError if there is none, it has no captions, or keys repeat."""
    options = options or ReadOptions()
    if str(source).startswith(("http://", "https://", "http:/", "https:/")):
        raise DatasetError(f"{source} is a URL; download it first, for image collections with img2dataset")
    if not source.exists():
        raise DatasetError(
            f"{source} does not exist; give a CSV, TSV, JSON lines or Parquet file, or a folder of images"
        )
    if source.is_dir():
        kind, found, records = _read_folder(source, options)
    elif source.suffix.lower() in TABLES:
        kind = source.suffix.lower()[1:]
        found, records = _read_table(source, options)
    elif source.suffix.lower() in (".txt", ".token"):
        kind, found = "flickr tokens", "NAME#n<TAB>caption lines"
        records = _read_flickr_tokens(source, options)
    else:
        raise DatasetError(
            f"{source} is none of the datasets that qf reads: {', '.join(TABLES)}, Flickr8k .token.txt, "
            "a folder with metadata.csv, .jsonl or .parquet"
        )
    dataset = Dataset(kind, found, list(records))
    if not dataset.records:
        raise DatasetError(f"{source} holds no records; a dataset needs at least one image with a caption")
    _check_unique(dataset.records, source)
    return dataset


def _check_unique(records: Iterable[Record], source: Path) -> None:
    seen: set[str] = set()
    for record in records:
        if record.key in seen:
            raise DatasetError(f"{source}: two images have the key {record.key!r}; choose another --key-column")
        seen.add(record.key)


def _split_of(key: str, named: str | None, options: ReadOptions) -> str:
    """The split that the data names, or one drawn by a hash of the key: the same for ever, whatever else is there."""
    if named is not None:
        if named.strip().lower() not in SPLITS:
            raise DatasetError(f"split {named!r} of {key} is not train, val or test; choose another --split-column")
        return SPLITS[named.strip().lower()]
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if draw < options.test_fraction:
        return "test"
    return "val" if draw < options.test_fraction + options.val_fraction else "train"


def _load_table(path: Path) -> pl.DataFrame:
    try:
        match path.suffix.lower():
            case ".csv":
                return pl.read_csv(path, infer_schema=False)
            case ".tsv":
                return pl.read_csv(path, infer_schema=False, separator="\t", quote_char=None)
            case ".parquet":
                return pl.read_parquet(path)
            case _:
                return pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error


def _pick(columns: list[str], wanted: str | None, usual: tuple[str, ...], option: str, path: Path) -> str | None:
    """The column named by the option, or the first of the usual names that is there, whatever its case."""
    if wanted is not None:
        if wanted not in columns:
            raise DatasetError(f"{path} has no column {wanted!r} (it has {', '.join(columns)}); check {option}")
        return wanted
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def _texts(value: Any) -> list[str]:
    """The captions in a cell: a text or a list of texts; empty ones do not count."""
    values = value if isinstance(value, list) else [value]
    return [text for v in values if v is not None and (text := str(v).strip())]


def _read_table(path: Path, options: ReadOptions, split: str | None = None) -> tuple[str, Iterator[Record]]:
    """Rows of one image become one record, in the order of their first rows."""
    table = _load_table(path)
    columns = table.columns
    image = _pick(columns, options.image_column, IMAGE_COLUMNS, "--image-column", path)
    caption = _pick(columns, options.caption_column, CAPTION_COLUMNS, "--caption-column", path)
    split_column = _pick(columns, options.split_column, SPLIT_COLUMNS, "--split-column", path)
    key = _pick(columns, options.key_column, KEY_COLUMNS, "--key-column", path)
    for name, column, option in (("image", image, "--image-column"), ("caption", caption, "--caption-column")):
        if column is None:
            raise DatasetError(f"{path} has no {name} column (it has {', '.join(columns)}); name it with {option}")
    assert image is not None
    assert caption is not None
    found = f"image column {image!r}, caption column {caption!r}, " + (
        f"split column {split_column!r}" if split_column else "no split column"
    )
    return found, _table_records(table, path, (image, caption, split_column, key), options, split)


def _table_records(
    table: pl.DataFrame,
    path: Path,
    columns: tuple[str, str, str | None, str | None],
    options: ReadOptions,
    split: str | None,
) -> Iterator[Record]:
    image_column, caption_column, split_column, key_column = columns
    folder = _image_folder(path.parent, table[image_column], options)
    rows: dict[str, tuple[Path | bytes, list[str], set[str | None], str]] = {}
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        image, source = _image_of(row[image_column], folder)
        if not image:
            yield Record(f"row {number}", "", b"", (), "train", f"row {number} of {path.name} names no image")
            continue
        if image.startswith(("http://", "https://")) and not isinstance(source, bytes):
            raise DatasetError(
                f"{path} holds image URLs, which qf does not download; fetch them with img2dataset first"
            )
        key = str(row[key_column]) if key_column else image
        entry = rows.setdefault(image, (source, [], set(), key))
        entry[1].extend(_texts(row[caption_column]))
        entry[2].add(row[split_column] if split_column else split)
    for image, (source, captions, splits, key) in rows.items():
        problem = "" if captions else "no caption"
        if len(splits) > 1:
            problem = f"its rows are in several splits: {', '.join(sorted(map(str, splits)))}"
        yield Record(key, image, source, tuple(captions), _split_of(key, next(iter(splits)), options), problem)


def _image_folder(folder: Path, images: pl.Series, options: ReadOptions) -> Path:
    """Where relative image paths start: `--images`, the dataset's folder, or a folder of images in it that has the first."""
    if options.images:
        return options.images
    first = next((str(image) for image in images if isinstance(image, str) and image.strip()), "")
    candidates = [folder, *(folder / name for name in IMAGE_FOLDERS)]
    return next((f for f in candidates if first and (f / first.strip()).is_file()), folder)


def _image_of(value: Any, folder: Path) -> tuple[str, Path | bytes]:
    """Name and source of an image cell: a path relative to `folder`, or a Hugging Face `{bytes, path}` struct."""
    if isinstance(value, dict):
        data, name = value.get("bytes"), str(value.get("path") or "")
        if data:
            return name or "sha256:" + hashlib.sha256(data).hexdigest()[:32], bytes(data)
        value = name
    name = str(value or "").strip()
    return name, folder / name


def _read_flickr_tokens(path: Path, options: ReadOptions) -> Iterator[Record]:
    """`NAME.jpg#0<TAB>caption` a line; the official split lists beside the file are used where they are."""
    candidates = [options.images] if options.images else [path.parent / name for name in IMAGE_FOLDERS]
    folder = next((f for f in candidates if f.is_dir()), path.parent)
    captions: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise DatasetError(
                f"{path}, line {number}: expected NAME.jpg#0, a tab and a caption, as Flickr8k.token.txt has"
            )
        captions.setdefault(name.rsplit("#", 1)[0], []).extend(_texts(caption))
    splits: dict[str, str] = {}
    for name, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        for file in sorted(path.parent.glob(f"*.{name}Images.txt")):
            splits.update({line.strip(): split for line in file.read_text().splitlines() if line.strip()})
    for name, texts in captions.items():
        split = _split_of(name, splits.get(name) if splits else None, options)
        problem = "in none of the split lists" if splits and name not in splits else "" if texts else "no caption"
        yield Record(name, name, folder / name, tuple(texts), split, problem)


def _read_folder(folder: Path, options: ReadOptions) -> tuple[str, str, Iterator[Record]]:
    """A folder with `metadata.*` in it, or in its `train`, `validation`, `test` folders; or with a Flickr8k token file."""
    tables = [t for t in (folder / f"metadata{suffix}" for suffix in TABLES) if t.is_file()]
    if tables:
        found, records = _read_table(tables[0], options)
        return "imagefolder", f"{tables[0].name}: {found}", records
    parts = []
    for part in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in SPLITS):
        for table in [t for t in (part / f"metadata{suffix}" for suffix in TABLES) if t.is_file()][:1]:
            found, records = _read_table(table, options, split=part.name)
            parts.append((part.name, f"{part.name}/{table.name}: {found}", records))
    if parts:
        renamed = (_inside(name, record) for name, _, records in parts for record in records)
        return "imagefolder", "; ".join(found for _, found, _ in parts), renamed
    tokens = sorted(folder.glob("*.token.txt")) + sorted(folder.glob("*.token"))
    if tokens:
        return "flickr tokens", tokens[0].name, _read_flickr_tokens(tokens[0], options)
    raise DatasetError(
        f"{folder} holds no captions: expected metadata.csv, metadata.jsonl or metadata.parquet in it "
        "(columns file_name and caption), or name the caption file itself"
    )


def _inside(folder: str, record: Record) -> Record:
    """The same record, its names told apart from another split's."""
    return Record(
        f"{folder}/{record.key}",
        f"{folder}/{record.image}",
        record.source,
        record.captions,
        record.split,
        record.problem,
    )
