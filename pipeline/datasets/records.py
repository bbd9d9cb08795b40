"""Records, each one image with its texts, and the rules that all readers of datasets share."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..config import ReadOptions
from ..errors import DatasetError
from ..schema import Conversation, Question
from .sources import Bounds, ImageSource

SPLIT_ALIASES = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_SUFFIXES = frozenset((
    "avif", "bmp", "gif", "heic", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "jxl", "pbm", "pgm", "png", "pnm", "ppm",
    "svg", "tga", "tif", "tiff", "webp",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its captions, questions and conversations.

    `problem` is the reason why it cannot be used, if the dataset itself already shows one. `lacking` says why there is no
    caption, and what would take one, where more is known than that. `left_out` names, in the plural, each thing of the record
    that is not used although the record is."""

    key: str
    image: str  # as the dataset names it
    source: ImageSource | None  # None only with a problem
    captions: tuple[str, ...]
    split: str
    problem: str = ""
    left_out: tuple[str, ...] = ()
    lacking: str = ""
    questions: tuple[Question, ...] = ()
    conversations: tuple[Conversation, ...] = ()

    @property
    def has_text(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.captions or self.questions or self.conversations)


def split_of(key: str, named: str | None, options: ReadOptions) -> str:
    """The split that the data names, or one drawn by a hash of the key, which never changes when records are added."""
    if named and named.strip() and not options.redraw_splits:
        if named.strip().lower() not in SPLIT_ALIASES:
            raise DatasetError(f"split {named!r} of {key} is not train, val or test; choose another --split-column")
        return SPLIT_ALIASES[named.strip().lower()]
    draw = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8]) / 2**64
    if draw < options.test_fraction:
        return "test"
    return "val" if draw < options.test_fraction + options.val_fraction else "train"


def bounds_of(options: ReadOptions) -> Bounds:
    """What may not lead out of the dataset's folder."""
    return "links" if options.confine else "names" if options.names_stay else ""


def split_in_path(name: str) -> str | None:
    """The split that the first folder of a relative path names, as in `train/a.jpg`."""
    first, *more = PurePosixPath(name).parts or ("",)
    return SPLIT_ALIASES.get(first.lower()) if more else None


def splits_in_names(names: Sequence[str]) -> list[str | None]:
    """The split that each name tells, as in `train-00000-of-00002.parquet`, `captions_val2017.json`, `test/00001.tar`.

    Where a name tells none, there are None for all."""
    found = [
        {SPLIT_ALIASES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_ALIASES} for name in names
    ]
    if any(len(splits) != 1 for splits in found):
        return [None] * len(names)
    return [splits.pop() for splits in found]
