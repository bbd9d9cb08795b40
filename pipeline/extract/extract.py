"""The stage: a caption dataset to cached features of a frozen encoder.

Records are cut into shards in the order of the dataset, shards into pieces that are encoded together; pieces never span shards,
so that a shard's bytes depend on nothing but its records and the settings."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import HashedFile, atomic_file, locked
from ..config import ExtractOptions
from ..datasets.read import Dataset
from ..encoders.identity import FrozenEncoder
from ..errors import DatasetError, QfError
from ..features.arrow_shards import schema, write_arrow_shard
from ..features.codecs import CODECS, columns
from ..features.tar_shards import write_tar_shard
from .ledger import Ledger, Reject
from .stream import Encoded, Piece, Stream

FORMATS = {"arrow": ".arrow", "webdataset": ".tar"}  # the suffixes of shards
SAMPLE = 64  # pictures that a dry run encodes to tell how long all will take
ROW_BYTES = 4000  # of a record besides features and captions: mostly its thumbnail


@dataclass(frozen=True)
class Status:
    """How far extraction is. `waited`: the share of time so far that the encoder had nothing to do."""

    done: int  # records
    total: int
    images_per_second: float
    waited: float


Progress = Callable[[Status], None]


def extract(
    dataset: Dataset,
    source: str,
    encoder: FrozenEncoder,
    folder: Path,
    options: ExtractOptions,
    progress: Progress = lambda status: None,
) -> dict[str, Any]:
    """Fill `folder` with features and return a summary (fields of contract 2). What is already there is kept.

    ArtifactError if the folder holds features of something else; QfError if too many records are rejected, or if the features
    cannot fit on the disk."""
    _check(options)
    records, started = dataset.records, time.perf_counter()
    plan = {
        "encoder": encoder.identity,
        "codec": options.codec,
        "format": options.shard_format,
        "views": options.views,
        "augmentation": {"flip": options.flip, "seed": options.seed} if options.views else None,
        "source": {"path": source, "kind": dataset.kind, "records": len(records), "sha256": records.sha256},
        "shard_size": options.shard_size,
    }
    with locked(folder):
        ledger = Ledger(folder, plan, FORMATS[options.shard_format])
        state = ledger.state(options.overwrite)
        if state == "finished":
            ledger.sweep()
            return _summary(ledger.manifest(), folder, time.perf_counter() - started)
        every = range(len(ledger.shards))
        todo = [number for number in every if state == "fresh" or ledger.noted(number) is None]
        _check_problems(dataset, options)
        _check_space(dataset, encoder, options, folder, len(todo) / len(every), state == "fresh")
        if state == "fresh":
            ledger.begin()
        rejected = sum(len(ledger.noted(number) or ()) for number in every)
        total, encoded = len(records), 0
        done = total - sum(len(_span(number, total, options)) for number in todo)
        with Stream(encoder, options) as stream:

            def watched(some: Iterator[Encoded]) -> Iterator[Encoded]:
                nonlocal encoded, done
                for part in some:
                    encoded += len(part.block["key"])
                    done += len(part.piece.records)
                    seconds = time.perf_counter() - started
                    progress(Status(done, total, encoded / seconds, stream.waited))
                    yield part

            parts = stream.encoded(_pieces(dataset, todo, stream.piece_size, options))
            for number, some in groupby(watched(parts), key=lambda part: part.piece.shard):
                rejected += _write_shard(ledger, number, some, encoder, options)
                if rejected > options.max_rejects * total:
                    raise ledger.too_many(options.max_rejects)
            encoder_seconds = stream.seconds / stream.lanes.count
            waited = stream.waited
        if rejected == total or rejected > options.max_rejects * total:
            raise ledger.too_many(options.max_rejects)
        manifest = ledger.close(records)
    return _summary(manifest, folder, time.perf_counter() - started, encoded, encoder_seconds, waited)


def _check(options: ExtractOptions) -> None:
    if options.codec not in CODECS:
        raise QfError(f"--codec {options.codec}: use one of {', '.join(CODECS)}")
    if options.shard_format not in FORMATS:
        raise QfError(f"--format {options.shard_format}: use {' or '.join(FORMATS)}")


def _span(shard: int, total: int, options: ExtractOptions) -> range:
    """The numbers of the records of a shard."""
    first = shard * options.shard_size
    return range(first, min(first + options.shard_size, total))


def _pieces(dataset: Dataset, shards: list[int], size: int, options: ExtractOptions) -> Iterator[Piece]:
    for shard in shards:
        span = _span(shard, len(dataset.records), options)
        for start in range(span.start, span.stop, size):
            yield Piece(shard, dataset.records[start : min(start + size, span.stop)])


def _write_shard(
    ledger: Ledger, number: int, parts: Iterator[Encoded], encoder: FrozenEncoder, options: ExtractOptions
) -> int:
    """Write a shard and its note; how many of its records were rejected."""
    rejects: list[Reject] = []

    def blocks() -> Iterator[Any]:
        for part in parts:
            rejects.extend(part.rejects)
            if part.block["key"]:
                yield part.block

    with atomic_file(ledger.shards[number]) as file:
        hashed = HashedFile(file)
        if options.shard_format == "arrow":
            identity = encoder.identity
            described = columns(options.codec, identity["tokens"], identity["width"])
            count = write_arrow_shard(hashed, schema(described, identity["joint"], options.views > 0), blocks())
        else:
            count = write_tar_shard(hashed, blocks())
    ledger.note(number, count, hashed.tell(), hashed.sha256, rejects)
    return len(rejects)


def estimate(dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions, folder: Path) -> dict[str, Any]:
    """What extraction would do, nothing being written: {records, captions, splits, bytes, free, images_per_second, seconds}.

    `images_per_second` is measured on a sample of records spread over the dataset, where any of them can be read."""
    _check(options)
    records = dataset.records
    with Stream(encoder, options) as stream:
        count = min(len(records), max(1, SAMPLE // (1 + options.views)))
        chosen = [records[int(n)] for n in np.linspace(0, len(records) - 1, count)]
        pieces = [Piece(0, chosen[i : i + stream.piece_size]) for i in range(0, count, stream.piece_size)]
        list(stream.encoded(pieces[:1]))  # warm
        began = time.perf_counter()
        parts = list(stream.encoded(pieces))
        seconds = time.perf_counter() - began
    readable = sum(len(part.block["key"]) for part in parts)
    return {
        "records": len(records),
        "captions": sum(records.captions.values()),
        "splits": records.splits,
        "sampled": count,
        "sampled_rejects": count - readable,
        "bytes": _bytes(dataset, encoder, options),
        "free": _free(folder),
        "images_per_second": round(readable / seconds, 2),
        "seconds": round(len(records) * seconds / readable, 1) if readable else None,
        "features": str(folder),
    }


def _bytes(dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions) -> int:
    """What the features of all records will weigh, about."""
    identity, splits = encoder.identity, dataset.records.splits
    described = columns(options.codec, identity["tokens"], identity["width"]).values()
    picture = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in described)
    tar = 1024 * (2 + len(described)) if options.shard_format == "webdataset" else 0  # headers and padding
    row = picture + 4 * (identity["joint"] or 0) + ROW_BYTES + tar
    return sum(splits.values()) * row + splits["train"] * options.views * picture


def _free(folder: Path) -> int:
    """Bytes free on the disk that holds `folder`, or will."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise DatasetError(f"{there} is a file; choose another --workspace")
    return shutil.disk_usage(there).free


def _check_problems(dataset: Dataset, options: ExtractOptions) -> None:
    """Records that the dataset itself tells to be of no use are rejects already: too many of them need no encoder to find."""
    records = dataset.records
    problems = len(records) - sum(records.splits.values())
    if problems > options.max_rejects * len(records):
        raise DatasetError(
            f"{problems} of {len(records)} records cannot be used, more than --max-rejects {options.max_rejects:g} allows; the "
            f"first: {records.first_problem}"
        )


def _check_space(
    dataset: Dataset, encoder: FrozenEncoder, options: ExtractOptions, folder: Path, share: float, fresh: bool
) -> None:
    """DatasetError if that share of the features cannot fit; what a fresh start clears away counts as free."""
    needed, free = int(_bytes(dataset, encoder, options) * share), _free(folder)
    if fresh:
        free += sum(path.stat().st_size for path in folder.glob("shard-*"))
    if needed > free:
        raise DatasetError(
            f"the features will weigh about {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB free; make room, "
            "choose another --workspace, or store them smaller with --codec int8"
        )


def _summary(
    manifest: dict[str, Any],
    folder: Path,
    seconds: float,
    encoded: int = 0,
    encoder_seconds: float = 0.0,
    waited: float = 0.0,
) -> dict[str, Any]:
    return {
        "records": manifest["records"],
        "captions": manifest["captions"],
        "rejected": manifest["rejected"],
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "seconds": round(seconds, 3),
        "images_per_second": round(encoded / seconds, 2) if seconds else 0.0,
        "encoder_images_per_second": round(encoded / encoder_seconds, 2) if encoder_seconds else 0.0,
        "waited": round(waited, 4),
        "features": str(folder),
        "splits": manifest["splits"],
        "encoded": encoded,
    }
