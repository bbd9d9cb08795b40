"""The size and the duration of an extraction, estimated before it begins."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import ExtractOptions
from ..datasets.read import Dataset
from ..encoders.identity import FrozenEncoder
from ..errors import DatasetError
from ..features.codecs import columns
from ..formatting import by_split, duration, size, texts_held
from ..results import Result
from .shard import check_options
from .stream import Piece, Stream

SAMPLE = 64  # pictures that a dry run encodes
ROW_BYTES = 4000  # bytes of a record besides features and captions: mostly its thumbnail
TAR_BYTES = 1024  # bytes of a tar member's header and padding


@dataclass(frozen=True)
class Estimated(Result):
    """The expected features. The rate is measured on a sample; `seconds` is None if none of it can be read."""

    records: int
    captions: int
    splits: dict[str, int]
    sampled: int
    sampled_rejects: int
    bytes: int
    free: int  # bytes free on the disk
    images_per_second: float
    seconds: float | None
    features: str
    questions: int = 0
    conversations: int = 0

    def __str__(self) -> str:
        short = "" if self.bytes <= self.free else ": too little"
        unread = f"; {self.sampled_rejects} of them cannot be read" if self.sampled_rejects else ""
        rate = f"about {duration(self.seconds)} at {self.images_per_second:.1f} images/s" if self.seconds else "unknown"
        texts = texts_held(self.captions, self.questions, self.conversations)
        return "\n".join(
            [
                f"records   {self.records:,} images ({by_split(self.splits)}), {texts}",
                f"features  about {size(self.bytes)} in {self.features}, where {size(self.free)} are free{short}",
                f"time      {rate}, measured on a sample of {self.sampled}{unread}",
            ]
        )


def estimate(dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions, folder: Path) -> Estimated:
    """Estimate an extraction into `folder`; nothing is written. The sample is spread over the dataset."""
    check_options(options)
    records = dataset.records
    with Stream(encoder, options) as stream:
        count = min(len(records), max(1, SAMPLE // (1 + options.views)))
        chosen = [records[int(n)] for n in np.linspace(0, len(records) - 1, count)]
        sample = [Piece(0, chosen[i : i + stream.piece_size]) for i in range(0, count, stream.piece_size)]
        list(stream.encoded(sample[:1]))  # warm-up
        began = time.perf_counter()
        parts = list(stream.encoded(sample))
        seconds = time.perf_counter() - began
    readable = sum(len(part.block["key"]) for part in parts)
    return Estimated(
        records=len(records),
        captions=sum(records.captions.values()),
        splits=records.splits,
        sampled=count,
        sampled_rejects=count - readable,
        bytes=feature_bytes(dataset, encoder, options),
        free=free_bytes(folder),
        images_per_second=round(readable / seconds, 2),
        seconds=round(len(records) * seconds / readable, 1) if readable else None,
        features=str(folder),
        questions=sum(records.questions.values()),
        conversations=sum(records.conversations.values()),
    )


def feature_bytes(dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions) -> int:
    """The approximate bytes of the features of all records."""
    identity, splits = encoder.identity, dataset.records.splits
    described = columns(options.codec, identity["tokens"], identity["width"]).values()
    picture = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in described)
    tar = TAR_BYTES * (2 + len(described)) if options.shard_format == "webdataset" else 0
    row = picture + 4 * (identity["joint"] or 0) + ROW_BYTES + tar
    texts = 2 * (identity["joint"] or 0) * sum(dataset.records.captions.values()) if options.texts else 0
    return sum(splits.values()) * row + splits["train"] * options.views * picture + texts


def free_bytes(folder: Path) -> int:
    """The bytes free on the disk that holds `folder`, or will hold it. DatasetError if a file is in its way."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise DatasetError(f"{there} is a file; choose another --workspace")
    return shutil.disk_usage(there).free


def check_space(dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions, folder: Path, share: float) -> None:
    """DatasetError if that share of the features does not fit on the disk, beside those that they may replace."""
    needed, free = int(feature_bytes(dataset, encoder, options) * share), free_bytes(folder)
    if needed > free:
        raise DatasetError(
            f"the features need about {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB free; free some space, "
            "choose another --workspace, or store them smaller with --codec int8"
        )
