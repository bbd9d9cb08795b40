"""`read` looks at a source, picks its reader, and describes what it found.

CSV, TSV, JSON lines, Parquet   a column for the image, one for the caption; a row a caption or a list of captions
                                also of questions with answers, or of conversations
JSON                            COCO captions, a Karpathy split, VQAv2, OK-VQA, GQA, or an array of objects, which is a table
Flickr8k / Flickr30k tokens     `NAME.jpg#0<TAB>caption`, with `Flickr_8k.trainImages.txt` and the like beside it
folder of images                with `metadata.csv|jsonl|parquet`, or with a text or JSON beside each image, or no caption at all
folder of Parquet shards        a Hugging Face dataset on disk
WebDataset                      a tar, a folder of tars
patterns                        `data/{00000..00031}.tar`, `captions_{train,val}2017.json`, `data/*.tar`: files of one kind
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import counted, printable, texts_held
from .catalogue import Catalogue
from .files import EXPECTED, read_files
from .joining import Joined, read_questions
from .layouts import PICTURES, read_folder
from .names import look_again, names_in
from .patterns import braces, matching
from .records import Record, split_of
from .sources import ImageFile, leads_out

NO_CAPTION = "no caption"
EMPTY_COLUMN = "its caption column is empty; name another one with --caption-column"
CURES = {  # what to do about a source whose images have no captions, by its kind
    "sidecars": "qf reads the .txt or .json beside an image; --caption-column names a field of the JSON",
    "webdataset": "qf reads the .txt and .json of a sample; --caption-column names a field of the JSON",
    "karpathy": "qf reads its sentences",
    "coco": "qf reads the captions of its annotations",
    "flickr tokens": "qf reads lines NAME.jpg#0, a tab and a caption",
}


@dataclass(frozen=True)
class Dataset:
    """Records, and a description of what was found at the source. `uncaptioned`: how many cannot be used because they have
    no caption."""

    kind: str
    found: str
    records: Catalogue = field(repr=False)
    uncaptioned: int = 0

    @property
    def cure(self) -> str:
        """What would keep records that cannot be used, or nothing."""
        return f"; {self.uncaptioned:,} have no caption: --allow-uncaptioned keeps them" if self.uncaptioned else ""


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
    reading = options
    if options.questions:  # the columns are those in its files
        reading = replace(options, question_column=None, answer_column=None, type_column=None, conversation_column=None)
    if len(sources) == 1 and source.is_dir():
        kind, found, records = read_folder(source, reading)
    else:
        kind, found, records = read_files(list(dict.fromkeys(chain.from_iterable(map(_files, sources)))), reading)
    asked = None
    if options.questions:
        asked = Joined(records, read_questions(_question_files(options.questions), options), source)
    watched = _Watched(asked or records, options, options.allow_uncaptioned or kind == PICTURES)
    draws = fractions and (asked or kind != PICTURES)
    catalogue = Catalogue(watched, (lambda key: split_of(key, None, options)) if draws else None)
    if not len(catalogue):
        raise DatasetError(f"{source} holds no records; a dataset needs at least one image with a caption")
    dataset = Dataset(kind, "", catalogue, watched.uncaptioned)
    if not sum(catalogue.splits.values()):
        problem = catalogue.first_problem
        help = f" ({CURES.get(kind, EMPTY_COLUMN)})" if problem.endswith(f": {NO_CAPTION}") else ""
        raise DatasetError(f"{source}: none of {len(catalogue):,} records can be used; {problem}{help}{dataset.cure}")
    if catalogue.drawn and sum(map(bool, catalogue.splits.values())) > 1:
        found += ", all of it train: other splits are drawn from it"
    if asked:
        found += asked.left_out
        catalogue.left_out.update(asked.source_left_out)
    if catalogue.left_out:
        found += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in catalogue.left_out.items())
    if catalogue.optional:
        counts = [sum(of.values()) for of in (catalogue.captions, catalogue.questions, catalogue.conversations)]
        found += f"; {texts_held(*counts)}"
    return replace(dataset, found=found + str(watched))


def _question_files(named: Sequence[Path]) -> list[Path]:
    """The files and folders that --questions names."""
    each = ([path] if path.is_dir() else _files(path) for path in named)
    return list(dict.fromkeys(chain.from_iterable(each)))


def check_apart(sources: Sequence[Path], folder: Path) -> None:
    """DatasetError if a source, or a file that its pattern names, lies in the folder that extraction writes and clears."""
    written = os.path.join(os.path.realpath(folder), "")
    for source in sources:
        for path in _named(source):
            if os.path.join(os.path.realpath(path), "").startswith(written):
                raise DatasetError(f"{path} lies in {folder}, which qf extract writes; choose another --workspace")


class _Watched:
    """Records on their way; counts the images that lie outside their folder, and those found under another name.

    A record without a caption, a question or a conversation gets a problem, and is counted, unless such records are `allowed`."""

    def __init__(self, records: Iterable[Record], options: ReadOptions, allowed: bool) -> None:
        self._records, self._options, self._allowed = records, options, allowed
        self.uncaptioned = self._kept = self._out = self._renamed = 0
        self._example = ""

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            if not (record.has_text or record.problem):
                self._kept += self._allowed
                if not self._allowed:
                    record = replace(record, problem=record.lacking or NO_CAPTION)
                    self.uncaptioned += 1
            source = record.source
            if isinstance(source, ImageFile) and not record.problem:
                self._out += not self._options.confine and leads_out(source)
                if not record.image.endswith(source.name):
                    self._renamed += 1
                    self._example = self._example or f"{printable(source.name)} for {record.image}"
            yield record

    def __str__(self) -> str:
        out = f"; {counted(self._out, 'image')} outside the folder of the dataset" if self._out else ""
        if self._kept and self._options.allow_uncaptioned:
            out += f"; {counted(self._kept, 'image')} without a caption"
        if self._renamed:
            out += f"; {counted(self._renamed, 'image')} found under nearly the name that is given, such as {self._example}"
        return out


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
