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
from itertools import chain
from pathlib import Path

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import counted, printable
from .catalogue import Catalogue
from .files import EXPECTED, read_files
from .layouts import cure, read_folder
from .look import look_into
from .names import look_again, names_in
from .patterns import braces, matching
from .records import Record, split_of
from .sources import ImageFile, leads_out

CURES = {
    "webdataset": "qf reads the .txt and .json of a sample; --caption-column names a field of the JSON",
    "karpathy": "qf reads its sentences",
    "coco": "qf reads the captions of its annotations",
    "flickr tokens": "qf reads lines NAME.jpg#0, a tab and a caption",
}


@dataclass(frozen=True)
class Dataset:
    """Records, and a description of what was found at the source."""

    kind: str
    found: str
    records: Catalogue = field(repr=False)


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
        kind, found, records = read_folder(source, options)
    else:
        kind, found, records = read_files(list(dict.fromkeys(chain.from_iterable(map(_files, sources)))), options)
    watched = _Watched(records, options)
    catalogue = Catalogue(watched, (lambda key: split_of(key, None, options)) if fractions else None)
    if not len(catalogue):
        raise DatasetError(f"{source} holds no records; a dataset needs at least one image with a caption")
    if not sum(catalogue.splits.values()):
        help = f" ({_cure(kind, source, options)})" if catalogue.first_problem.endswith(": no caption") else ""
        raise DatasetError(f"{source}: none of {len(catalogue):,} records can be used; {catalogue.first_problem}{help}")
    if catalogue.drawn and sum(map(bool, catalogue.splits.values())) > 1:
        found += ", all of it train: other splits are drawn from it"
    if catalogue.left_out:
        found += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in catalogue.left_out.items())
    return Dataset(kind, found + str(watched), catalogue)


def check_apart(sources: Sequence[Path], folder: Path) -> None:
    """DatasetError if a source, or a file that its pattern names, lies in the folder that extraction writes and clears."""
    written = os.path.join(os.path.realpath(folder), "")
    for source in sources:
        for path in _named(source):
            if os.path.join(os.path.realpath(path), "").startswith(written):
                raise DatasetError(f"{path} lies in {folder}, which qf extract writes; choose another --workspace")


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
        out = f"; {counted(self._out, 'image')} outside the folder of the dataset" if self._out else ""
        if self._renamed:
            out += f"; {counted(self._renamed, 'image')} found under nearly the name that is given, such as {self._example}"
        return out


def _cure(kind: str, source: Path, options: ReadOptions) -> str:
    """What to do about a source whose images have no captions."""
    if kind == "sidecars":
        return cure(look_into(source, options.confine))
    return CURES.get(kind, "its caption column is empty; name another one with --caption-column")


def _named(source: Path) -> list[Path]:
    """The source itself if it exists, or else the paths that its pattern names, each once."""
    if os.path.exists(source):
        return [source]
    return list(dict.fromkeys(path for pattern in braces(source) for path in matching(pattern)))


def _files(source: Path) -> list[Path]:
    """The files that a source names: itself, or what its pattern matches. DatasetError if one does not exist."""
    if re.match("https?:/", str(source)):
        raise DatasetError(f"{source} is a URL; download it first, for image collections with img2dataset")
    if source.is_dir():
        raise DatasetError(f"{source} is a folder; give one folder alone, or files of one kind")
    paths = _named(source)
    for path in paths:
        if not os.path.exists(path):
            near = names_in(str(path.parent)).find(path.name)
            cure = f"{path.with_name(near.name)} does" if near.found else f"give {EXPECTED}"
            raise DatasetError(f"{path} does not exist; {cure}")
    return paths
