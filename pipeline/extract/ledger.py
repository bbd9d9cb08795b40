"""The records of an extraction's progress: a plan, a note beside each finished shard, and the rejects.

A note holds a shard's checksum and rejects. It is written after the shard, so that the same command resumes at the first shard
without a note (img2dataset's idea: resume is which records exist). The manifest comes last and replaces plan and notes."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..artifacts import (
    PLAN,
    described,
    difference,
    has_manifest,
    read_manifest,
    read_sealed,
    remember,
    without,
    write_manifest,
    write_sealed,
)
from ..datasets.catalogue import Catalogue
from ..encoders.identity import WEIGHTS, first_difference
from ..errors import ArtifactError, DatasetError
from ..features.manifest import FEATURES, REJECTS, Planned, ShardEntry
from ..files import atomic_file, json_bytes
from ..replacement import clear, replacement_of
from ..schema import OPTIONAL_COLUMNS

log = logging.getLogger(__name__)
AGAIN = "extract again with --overwrite"


@dataclass(frozen=True)
class Reject:
    """A record that could not be used, and why."""

    key: str
    image: str
    reason: str


class _Reject(TypedDict):
    key: str
    image: str
    reason: str


class _Note(ShardEntry):
    rejects: list[_Reject]


class Ledger:
    """The progress of a features folder. `plan` has the fields of `Planned`."""

    def __init__(self, folder: Path, plan: dict[str, Any], suffix: str) -> None:
        self.folder, self.plan = folder, json.loads(json.dumps(plan))  # tuples become lists, as in a file
        count = -(-plan["source"]["records"] // plan["shard_size"])
        self.shards = [folder / f"shard-{number:05d}{suffix}" for number in range(count)]

    def state(self, replaces: bool) -> Literal["finished", "resumable", "fresh"]:
        """The state of the folder. ArtifactError if it holds something else, unless it `replaces` others' work anyway.

        An unfinished folder without a finished shard counts as fresh: nothing in it could be mixed up. Changes nothing."""
        finished = has_manifest(self.folder)
        if not finished and not (self.folder / PLAN).is_file():
            return "fresh"
        try:
            old = self.manifest() if finished else read_sealed(self.folder / PLAN, Planned, AGAIN)
        except ArtifactError:
            if replaces:
                return "fresh"
            raise
        changed = _changed(old, self.plan)
        if not changed:
            return "finished" if finished else "resumable"
        if replaces or (not finished and not any(self.folder.glob("shard-*.json"))):
            return "fresh"
        raise ArtifactError(
            f"{self.folder} holds features made otherwise: {changed}; choose another --workspace, or replace them with "
            "--overwrite"
        )

    def begin(self) -> None:
        """Clear the folder and write the plan."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clear(self.folder, FEATURES)
        write_sealed(self.folder / PLAN, self.plan)

    def manifest(self) -> dict[str, Any]:
        """The manifest of the finished features."""
        return read_manifest(self.folder, FEATURES)

    def noted(self, number: int) -> list[Reject] | None:
        """The rejects of a finished shard; None if it is not finished, or if its note is damaged."""
        shard = self.shards[number]
        if not (shard.with_suffix(".json").is_file() and shard.is_file()):
            return None
        try:
            note = self._note(number)
        except ArtifactError as error:
            log.warning("%s", error)
            return None
        return [Reject(**reject) for reject in note["rejects"]] if shard.stat().st_size == note["bytes"] else None

    def _note(self, number: int) -> dict[str, Any]:
        return read_sealed(self.shards[number].with_suffix(".json"), _Note, "the shard is extracted again")

    def note(self, number: int, records: int, size: int, sha256: str, rejects: Sequence[Reject]) -> None:
        """Declare a shard finished."""
        shard = self.shards[number]
        about = {"file": shard.name, "records": records, "bytes": size, "sha256": sha256}
        write_sealed(shard.with_suffix(".json"), {**about, "rejects": [vars(reject) for reject in rejects]})

    def too_many(self, allowed: float) -> DatasetError:
        """The error to raise. Deletes the notes of shards with rejects, so that the next run retries them."""
        rejects = self._gather_rejects()
        for number, shard in enumerate(self.shards):
            if self.noted(number):
                shard.with_suffix(".json").unlink()
        first, total = rejects[0], self.plan["source"]["records"]
        cure = "" if len(rejects) == total else " (--max-rejects 1 leaves them out)"
        if first.reason == "no such file":
            cure = " (is --images right?)"
        return DatasetError(
            f"{len(rejects)} of {total} records were rejected, more than --max-rejects {allowed:g} allows; the first: "
            f"{first.image or first.key}: {first.reason}; all are in {self.folder / REJECTS}{cure}"
        )

    def _gather_rejects(self) -> list[Reject]:
        """The rejects of all finished shards; writes them to rejects.jsonl."""
        rejects = [reject for number in range(len(self.shards)) for reject in self.noted(number) or ()]
        with atomic_file(self.folder / REJECTS) as file:
            file.writelines(json_bytes(vars(reject)) + b"\n" for reject in rejects)
        return rejects

    def close(self, records: Catalogue) -> dict[str, Any]:
        """Turn the notes into rejects.jsonl and the manifest, and delete them. Returns the manifest."""
        shards = [without(self._note(number), "rejects") for number in range(len(self.shards))]
        rejects = self._gather_rejects()
        rejected = {reject.key for reject in rejects}
        splits = dict(records.splits)
        names = ("captions", *(name for name in OPTIONAL_COLUMNS if name in records.optional))
        texts = {name: sum(getattr(records, name).values()) for name in names}
        for record in records if rejected else ():
            if record.key in rejected and not record.problem:  # the counts leave out records with a problem
                splits[record.split] -= 1
                for name in names:
                    texts[name] -= len(getattr(record, name))
        content = {
            **self.plan,
            "records": sum(splits.values()),
            **texts,
            "splits": splits,
            "rejected": len(rejects),
            "shards": [shard for shard in shards if shard["records"]],
            "files": [described(self.folder / REJECTS)],
        }
        write_manifest(self.folder, FEATURES, content)
        remember(self.folder, [*content["shards"], *content["files"]])
        self.sweep()
        return self.manifest()

    def sweep(self) -> None:
        """Delete plan, notes and shards without a record from finished features."""
        kept = {shard["file"] for shard in self.manifest()["shards"]}
        for shard in self.shards:
            shard.with_suffix(".json").unlink(missing_ok=True)
            if shard.name not in kept:
                shard.unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)


def resumes(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether `folder` holds an unfinished extraction of this plan."""
    if has_manifest(folder) or not (folder / PLAN).is_file():
        return False
    try:
        return not _changed(read_sealed(folder / PLAN, Planned, AGAIN), json.loads(json.dumps(plan)))
    except ArtifactError:
        return False


def recorded_precision(folder: Path, overwrite: bool) -> str | None:
    """The precision of the encoder, such as "bfloat16", in which the work in `folder` began; None if none did.

    With `overwrite` finished features are replaced whole: the precision is that of an unfinished replacement."""
    if overwrite and has_manifest(folder):
        folder = replacement_of(folder)
    try:
        if has_manifest(folder):
            recorded = read_manifest(folder, FEATURES)
        elif (folder / PLAN).is_file():
            recorded = read_sealed(folder / PLAN, Planned, AGAIN)
        else:
            return None
    except ArtifactError:
        if overwrite:
            return None
        raise
    return str(recorded["encoder"]["precision"])


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first difference between two plans that forbids mixing their shards, as text, or None."""
    if first_difference(old["encoder"], new["encoder"], WEIGHTS):
        ids = (old["encoder"]["id"], new["encoder"]["id"])
        return f"encoder was {ids[0]} and is now {ids[1]}" + (" with other weights" if ids[0] == ids[1] else "")
    changed = difference(_comparable(old), _comparable(new))
    if changed and changed.startswith("source."):
        paths = (old["source"]["path"], new["source"]["path"])
        if paths[0] == paths[1]:
            return f"{paths[0]} gives other records: it has changed, or the options that say how to read it have ({changed})"
        return f"source was {paths[0]} and is now {paths[1]}"
    return changed


def _comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """The fields that must be equal in all shards of a folder. The places of encoder and dataset may differ."""
    return {
        **{key: plan[key] for key in Planned.__annotations__},
        "encoder": without(plan["encoder"], "id"),
        "source": without(plan["source"], "path"),
    }
