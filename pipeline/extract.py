"""The stage: a caption dataset to cached features of a frozen encoder.

Records are cut into shards in the order of the dataset. A finished shard has a JSON beside it with its checksum and its
rejects, so that the same command, run again after whatever stopped it, goes on at the first shard that has none; the
manifest comes last and replaces those notes (img2dataset's idea: resume is which records exist)."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .ahead import map_ahead
from .artifacts import (
    MANIFEST,
    atomic_file,
    described,
    difference,
    has_manifest,
    locked,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from .catalogue import Catalogue
from .codecs import CODECS, encode
from .datasets import Dataset
from .encoders import FrozenEncoder
from .errors import ArtifactError, DatasetError, QfError
from .features import Row, schema, write_shard
from .images import Preprocessing, UnreadableImage, load_image, thumbnail
from .records import Record
from .sources import load

PLAN = "plan.json"
REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class ExtractOptions:
    """How to extract. `max_rejects` is the fraction of records that may be unreadable before the run fails."""

    codec: str = "float16"
    shard_size: int = 1024
    batch_size: int = 64
    workers: int = 0  # threads that decode; 0: one a core
    max_rejects: float = 0.05
    overwrite: bool = False


@dataclass(frozen=True)
class Reject:
    """A record that could not be used, and why."""

    key: str
    image: str
    reason: str


Progress = Callable[[int, int], None]  # records done, records in all


def extract(
    dataset: Dataset,
    source: str,
    encoder: FrozenEncoder,
    folder: Path,
    options: ExtractOptions,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Fill `folder` with features and return a summary (fields of contract 2). What is already there is kept.

    ArtifactError if the folder holds features of something else; QfError if too many records are rejected."""
    if options.codec not in CODECS:
        raise QfError(f"--codec {options.codec}: use one of {', '.join(CODECS)}")
    records = dataset.records
    plan = {
        "encoder": encoder.identity,
        "codec": options.codec,
        "source": {"path": source, "kind": dataset.kind, "records": len(records), "sha256": records.sha256},
        "shard_size": options.shard_size,
    }
    plan = json.loads(json.dumps(plan))  # as it will be read back
    started = time.perf_counter()
    with locked(folder):
        if _finished(folder, plan, options.overwrite):
            manifest = read_manifest(folder, "features")
            return _summary(manifest, folder, 0, time.perf_counter() - started, 0.0)
        write_json(folder / PLAN, plan)
        identity = encoder.identity
        columns = schema(identity["tokens"], identity["width"], identity["joint"], options.codec)
        shards = range(0, len(records), options.shard_size)  # their first records
        clock = _Clock(encoder)

        def advance(before: int, seen: int) -> None:
            progress(before + seen, len(records))

        done = encoded = rejected = 0
        with ThreadPoolExecutor(options.workers or len(os.sched_getaffinity(0))) as pool:
            for number, first in enumerate(shards):
                shard = range(first, min(first + options.shard_size, len(records)))
                path = folder / f"shard-{number:05d}.arrow"
                if not _noted(path):
                    rejects: list[Reject] = []
                    rows = _encode(
                        records[shard.start : shard.stop],
                        clock,
                        pool,
                        options,
                        rejects,
                        partial(advance, done),
                    )
                    count = write_shard(path, columns, rows)
                    encoded += count
                    note = {**described(path), "records": count, "rejects": [vars(reject) for reject in rejects]}
                    write_json(path.with_suffix(".json"), note)
                rejected += len(read_json(path.with_suffix(".json"))["rejects"])
                if rejected > options.max_rejects * len(records):
                    raise _too_many_rejects(folder, number + 1, options.max_rejects, len(records))
                done += len(shard)
                advance(done, 0)
        manifest = _finish(folder, plan, len(shards), records)
    return _summary(manifest, folder, encoded, time.perf_counter() - started, clock.seconds)


def _finished(folder: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder already holds what the plan would make. Clears it for --overwrite; ArtifactError if it holds
    something else."""
    if overwrite:
        for path in [folder / MANIFEST, *folder.glob("*.json"), *folder.glob("shard-*"), folder / REJECTS]:
            path.unlink(missing_ok=True)
        return False
    finished = has_manifest(folder)
    if not finished and not (folder / PLAN).is_file():
        return False
    old = read_manifest(folder, "features") if finished else read_json(folder / PLAN)
    changed = difference(_comparable(old), _comparable(plan))
    if changed:
        raise ArtifactError(
            f"{folder} holds features made otherwise: {changed}; choose another --workspace, or replace them with --overwrite"
        )
    return finished


def _comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for shards to be mixed: not where encoder and dataset lie."""
    return {
        "encoder": {key: value for key, value in plan["encoder"].items() if key != "id"},
        "codec": plan["codec"],
        "source": {key: value for key, value in plan["source"].items() if key != "path"},
        "shard_size": plan["shard_size"],
    }


def _noted(shard: Path) -> bool:
    """Whether the shard is complete: its note is written after it."""
    note = shard.with_suffix(".json")
    return note.is_file() and shard.is_file() and shard.stat().st_size == read_json(note)["bytes"]


def _gather_rejects(folder: Path, shards: int) -> list[dict[str, str]]:
    """The rejects of the first `shards` shards, also written to rejects.jsonl."""
    notes = [read_json(folder / f"shard-{number:05d}.json") for number in range(shards)]
    rejects = [reject for note in notes for reject in note["rejects"]]
    with atomic_file(folder / REJECTS) as file:
        file.writelines(json.dumps(reject, ensure_ascii=False).encode() + b"\n" for reject in rejects)
    return rejects


def _too_many_rejects(folder: Path, shards: int, allowed: float, records: int) -> DatasetError:
    """The error to raise. Shards with rejects lose their notes, so that they are done again once the cause is mended."""
    rejects = _gather_rejects(folder, shards)
    for number in range(shards):
        note = folder / f"shard-{number:05d}.json"
        if read_json(note)["rejects"]:
            note.unlink()
    first = rejects[0]
    return DatasetError(
        f"{len(rejects)} of {records} records were rejected, more than --max-rejects {allowed:g} allows; the first: "
        f"{first['image'] or first['key']}: {first['reason']}; all are in {folder / REJECTS} (is --images right?)"
    )


def _finish(folder: Path, plan: dict[str, Any], shards: int, records: Catalogue) -> dict[str, Any]:
    """Gather the shards' notes into rejects and manifest, and take them away."""
    notes = [read_json(folder / f"shard-{number:05d}.json") for number in range(shards)]
    rejects = _gather_rejects(folder, shards)
    rejected = {reject["key"] for reject in rejects}
    splits, captions = dict(records.splits), dict(records.captions)
    for record in records if rejected else ():
        if record.key in rejected and not record.problem:  # those with a problem are not counted there
            splits[record.split] -= 1
            captions[record.split] -= len(record.captions)
    manifest = {
        **{key: plan[key] for key in ("encoder", "codec", "source", "shard_size")},
        "records": sum(splits.values()),
        "captions": sum(captions.values()),
        "splits": splits,
        "rejected": len(rejects),
        "shards": [{k: v for k, v in note.items() if k != "rejects"} for note in notes if note["records"]],
    }
    write_manifest(folder, "features", manifest)
    for number in range(shards):
        (folder / f"shard-{number:05d}.json").unlink()
    (folder / PLAN).unlink()
    return read_manifest(folder, "features")


def _summary(
    manifest: dict[str, Any], folder: Path, encoded: int, seconds: float, encoder_seconds: float
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
        "features": str(folder),
        "splits": manifest["splits"],
        "encoded": encoded,
    }


class _Clock:
    """An encoder, and the seconds spent in it."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        self.encoder, self.seconds = encoder, 0.0

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        started = time.perf_counter()
        out = self.encoder.encode(pixels)
        self.seconds += time.perf_counter() - started
        return out


@dataclass(frozen=True)
class _Decoded:
    record: Record
    pixels: np.ndarray  # (3, H, W) uint8
    thumbnail: bytes
    width: int
    height: int


def _decode(record: Record, preprocessing: Preprocessing) -> _Decoded | Reject:
    if record.problem:
        return Reject(record.key, record.image, record.problem)
    try:
        image = load_image(load(record.source))
    except UnreadableImage as error:
        return Reject(record.key, record.image, str(error))
    return _Decoded(record, preprocessing(image), thumbnail(image), image.width, image.height)


def _encode(
    shard: Sequence[Record],
    clock: _Clock,
    pool: ThreadPoolExecutor,
    options: ExtractOptions,
    rejects: list[Reject],
    progress: Callable[[int], None],
) -> Iterator[list[Row]]:
    """The rows of a shard, batch by batch: threads decode ahead while the encoder works. Batches never span shards."""
    preprocessing = clock.encoder.preprocessing
    batch: list[_Decoded] = []
    for seen, decoded in enumerate(
        map_ahead(pool, lambda r: _decode(r, preprocessing), shard, 3 * options.batch_size), start=1
    ):
        if isinstance(decoded, Reject):
            rejects.append(decoded)
        else:
            batch.append(decoded)
        if batch and (len(batch) == options.batch_size or seen == len(shard)):
            tokens, pooled = clock.encode(np.stack([d.pixels for d in batch]))
            keys = [d.record.key for d in batch]
            encoded = {n: a.numpy() for n, a in encode(options.codec, torch.from_numpy(tokens), keys).items()}
            yield [
                Row(
                    d.record.key, d.record.split, d.record.image, d.record.captions,
                    {n: a[i] for n, a in encoded.items()}, None if pooled is None else pooled[i], d.thumbnail, d.width, d.height,
                )
                for i, d in enumerate(batch)
            ]  # fmt: skip
            batch = []
            progress(seen)
