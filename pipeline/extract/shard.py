"""Shards: which records each one holds, and how one is written."""

from collections.abc import Collection, Iterator
from typing import Any

from ..config import ExtractOptions
from ..datasets.read import Dataset
from ..encoders.identity import FrozenEncoder
from ..errors import QfError
from ..features.arrow_shards import schema, write_arrow_shard
from ..features.codecs import CODECS, columns
from ..features.tar_shards import write_tar_shard
from ..files import HashedFile, atomic_file
from .ledger import Ledger, Reject
from .stream import EncodedPiece, Piece

SHARD_SUFFIXES = {"arrow": ".arrow", "webdataset": ".tar"}


def check_options(options: ExtractOptions) -> None:
    """QfError if the codec or the format is unknown."""
    if options.codec not in CODECS:
        raise QfError(f"--codec {options.codec}: use one of {', '.join(CODECS)}")
    if options.shard_format not in SHARD_SUFFIXES:
        raise QfError(f"--format {options.shard_format}: use {' or '.join(SHARD_SUFFIXES)}")


def span(shard: int, total: int, options: ExtractOptions) -> range:
    """The numbers of the records of a shard, of `total` records."""
    first = shard * options.shard_size
    return range(first, min(first + options.shard_size, total))


def pieces(dataset: Dataset, shards: list[int], size: int, options: ExtractOptions) -> Iterator[Piece]:
    """The records of the shards in pieces of at most `size`. A piece never spans two shards."""
    for shard in shards:
        records = span(shard, len(dataset.records), options)
        for start in range(records.start, records.stop, size):
            yield Piece(shard, dataset.records[start : min(start + size, records.stop)])


def write_shard(
    ledger: Ledger,
    number: int,
    parts: Iterator[EncodedPiece],
    encoder: FrozenEncoder,
    options: ExtractOptions,
    optional: Collection[str] = (),
) -> int:
    """Write a shard from its pieces, then its note. Returns the number of its rejected records. `optional` names the columns
    that the dataset has, where only some do."""
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
            columns_of_shard = schema(described, identity["joint"], options.views > 0, optional)
            count = write_arrow_shard(hashed, columns_of_shard, blocks())
        else:
            count = write_tar_shard(hashed, blocks(), optional)
    ledger.note(number, count, hashed.tell(), hashed.sha256, rejects)
    return len(rejects)
