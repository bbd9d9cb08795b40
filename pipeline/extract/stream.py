"""Records to blocks of features, in order. A piece is a run of records that are encoded together; a block is its rows.

Decoding and encoding run side by side in threads; Pillow and PyTorch release Python's lock while they work. On a GPU two encoder
streams share the device: one computes while the other copies. On a CPU each encoder stream computes its own batch on its own
core, so that no batch waits for cores that are busy with decoding.

Memory: at most `workers` + encoder streams + 4 batches of pictures as the encoder takes them, and one original a worker. Pictures
inside Parquet files are read in order by one thread, which holds the originals of `workers` + 4 batches."""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ExtractOptions
from ..datasets.records import Record
from ..datasets.sources import Fetched, fetch, load
from ..device import EncoderStreams
from ..encoders.identity import FrozenEncoder
from ..encoders.views import View, draw_view
from ..features.arrow_shards import Block
from ..features.codecs import check, encode, largest
from ..features.tar_shards import key_problem
from ..images import UnreadableImage, load_image, thumbnail
from ..prefetch import map_ahead
from ..schema import OPTIONAL_COLUMNS, RECORD_COLUMNS, VIEW
from .ledger import Reject


@dataclass(frozen=True)
class Piece:
    """Successive records of one shard, encoded together."""

    shard: int
    records: Sequence[Record]


@dataclass(frozen=True)
class EncodedPiece:
    """A piece after encoding: the rows of its readable records, and its rejects."""

    piece: Piece
    block: Block
    rejects: Sequence[Reject]
    seconds: float = 0.0  # spent encoding


@dataclass(frozen=True)
class _Opened:
    piece: Piece
    sources: deque[Fetched]  # one for each record; each is removed when it is decoded


@dataclass(frozen=True)
class _Decoded:
    piece: Piece
    rows: dict[str, list[Any]]
    pixels: np.ndarray  # (rows, then the views of all rows, 3, H, W) uint8
    rejects: list[Reject]


class Stream:
    """An encoder with threads around it: `options.workers` that decode, one a core if 0. Use as a context manager."""

    def __init__(self, encoder: FrozenEncoder, options: ExtractOptions) -> None:
        self.encoder, self.options = encoder, options
        self.streams = EncoderStreams(encoder.device)
        self.workers = options.workers or len(os.sched_getaffinity(0))
        self.seconds = 0.0  # spent encoding, summed over the encoder streams
        self._began = time.perf_counter()
        self._sources = ThreadPoolExecutor(1)
        self._pictures = ThreadPoolExecutor(self.workers)
        self._batches = ThreadPoolExecutor(self.streams.count, initializer=self.streams.enter)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.shutdown(cancel_futures=True)
        self._pictures.shutdown(cancel_futures=True)
        self._batches.shutdown(cancel_futures=True)
        self.streams.leave()

    @property
    def piece_size(self) -> int:
        """Records in a piece: with their views they fill a batch."""
        return max(1, self.options.batch_size // (1 + self.options.views))

    @property
    def waited(self) -> float:
        """The share of time in which the encoder streams had nothing to encode."""
        return max(0.0, 1 - self.seconds / self.streams.count / (time.perf_counter() - self._began))

    def encoded(self, pieces: Iterable[Piece]) -> Iterator[EncodedPiece]:
        """The pieces in their order. EncoderError if features cannot be stored in the codec."""
        fetched = map_ahead(self._sources, _fetch, pieces, 2)
        decoded = map_ahead(self._pictures, self._decode, fetched, self.workers + 2)
        for part in map_ahead(self._batches, self._encode, decoded, self.streams.count + 2):
            self.seconds += part.seconds
            yield part

    def _decode(self, opened: _Opened) -> _Decoded:
        rows: dict[str, list[Any]] = {name: [] for name in (*RECORD_COLUMNS, "views", *OPTIONAL_COLUMNS)}
        pixels: list[np.ndarray] = []
        more: list[np.ndarray] = []
        rejects: list[Reject] = []
        for record in opened.piece.records:
            source = opened.sources.popleft()
            if self.options.shard_format == "webdataset" and (problem := key_problem(record.key)):
                source = UnreadableImage(problem)
            try:
                image = load_image(load(source))
            except UnreadableImage as error:
                rejects.append(Reject(record.key, record.image, str(error)))
                continue
            preprocessing, views = self.encoder.preprocessing, self._views(record, image.width, image.height)
            pixels.append(preprocessing(image))
            more += [preprocessing.view(image, view) for view in views]
            values = (
                record.key, record.split, record.image, list(record.captions), thumbnail(image), image.width, image.height,
                [asdict(view) for view in views], [one.to_row() for one in record.questions],
                [list(turns) for turns in record.conversations],
            )  # fmt: skip
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
        return _Decoded(opened.piece, rows, np.stack(pixels + more) if pixels else np.empty(0), rejects)

    def _views(self, record: Record, width: int, height: int) -> list[View]:
        """The views of a training image; none of any other."""
        how = self.options
        count = how.views if record.split == "train" else 0
        aspect = self.encoder.preprocessing.aspect(width, height)
        return [draw_view(how.seed, record.key, n, width, height, how.flip, aspect) for n in range(1, count + 1)]

    def _encode(self, decoded: _Decoded) -> EncodedPiece:
        rows: dict[str, Any] = decoded.rows
        keys = rows["key"]
        if not keys:
            return EncodedPiece(decoded.piece, rows, decoded.rejects)
        began = time.perf_counter()
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(decoded.pixels), self.options.batch_size):
            tokens, pooled = self.encoder.encode(decoded.pixels[start : start + self.options.batch_size])
            columns = encode(self.options.codec, tokens) | {"largest": largest(tokens)}
            if pooled is not None:
                columns["pooled"] = pooled
            for name, values in columns.items():
                parts.setdefault(name, []).append(values)
        arrays = {name: self.streams.fetch(torch.cat(values)) for name, values in parts.items()}
        self.streams.wait()
        seconds = time.perf_counter() - began
        owners = keys + [key for key, views in zip(keys, rows["views"], strict=True) for _ in views]
        check(self.options.codec, arrays.pop("largest"), owners)
        count = len(keys)
        block = rows | {name: values[:count].numpy() for name, values in arrays.items()}
        block |= {VIEW + name: values[count:].numpy() for name, values in arrays.items() if name != "pooled"}
        return EncodedPiece(decoded.piece, block, decoded.rejects, seconds)


def _fetch(piece: Piece) -> _Opened:
    return _Opened(piece, deque(UnreadableImage(r.problem) if r.problem else fetch(r.source) for r in piece.records))
