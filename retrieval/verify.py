"""Whether an artifact is what its manifest says: the checksum of every file, then counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc

from ..pipeline.artifacts import CHECKED, file_problem, has_manifest, is_sealed, read_manifest
from ..pipeline.errors import ArtifactError, QfError
from ..pipeline.features.codecs import decode
from ..pipeline.features.manifest import REJECTS, TEXTS
from ..pipeline.features.reader import Features
from ..pipeline.formatting import counted, size
from ..pipeline.results import Result
from ..pipeline.schema import SPLITS
from ..pipeline.tensor_files import check_tensors
from ..trainer.manifest import CHECKPOINTS, RUN
from ..trainer.qformer import QFormer
from ..trainer.stage2.model import open_soft_prompt
from .index.store import check_origin, open_index, origin_folder
from .info import read_known
from .mix_file import REFIT, load_mix

CURES = {
    "features": "extract again with --overwrite",
    "run": "train again with --overwrite",
    "index": "rebuild it with `qf index`",
}
ROWS = 256  # rows of the features that are checked at a time


@dataclass(frozen=True)
class Verified(Result):
    """The outcome of a check. The artifact is sound if `problems` is empty."""

    path: str
    kind: str
    files: int
    bytes: int
    problems: list[str]
    cure: str

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(f"{self.kind:<9} {problem}" for problem in self.problems)
        return f"{self.kind:<9} {self.path}: sound; {counted(self.files, 'file')}, {size(self.bytes)}"


def verify(folder: Path) -> Verified:
    """Check the artifact in `folder`: every checksum, then every count.

    ArtifactError if there is no finished artifact. Reads every byte once or twice. Memory: about 20 bytes a record, besides
    `pooled`."""
    kind, manifest = read_known(folder)
    files = [*manifest.get("shards", []), *manifest["files"]]
    problems = [problem for file in files if (problem := file_problem(folder, file))]
    if (folder / CHECKED).exists() and not is_sealed(folder / CHECKED):
        problems.append(f"{folder / CHECKED} is damaged; delete it, and it is written anew")
    if not problems:  # the counts of damaged files would repeat the problem, or fail to be read
        try:
            problems = {"features": _features, "run": _run, "index": _index}[kind.name](folder, manifest)
        except ArtifactError as error:
            problems = [str(error)]
    cure = CURES[kind.name]
    if kind is RUN and not problems:
        try:
            load_mix(folder, manifest["sha256"])
        except ArtifactError as error:
            problems, cure = [str(error)], REFIT
    count = sum(file["bytes"] for file in files)
    return Verified(str(folder), kind.name, len(files), count, problems, cure)


def refuse_problems(checked: Sequence[Verified]) -> None:
    """QfError that names the first problem, if there is any."""
    wrong = [result for result in checked if result.problems]
    if wrong:
        count = sum(len(result.problems) for result in wrong)
        raise QfError(f"{wrong[0].problems[0]} (problems in all: {count}); {wrong[0].cure}")


def _differences(manifest: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: the manifest says {manifest[name]}, there are {value}"
        for name, value in found.items()
        if manifest[name] != value
    ]


def _features(folder: Path, manifest: dict[str, Any]) -> list[str]:
    features = Features(folder)
    splits = {count["values"]: count["counts"] for count in features.table.column("split").value_counts().to_pylist()}
    found = {
        "records": len(features),
        **{
            name: pc.sum(pc.list_value_length(features.table.column(name))).as_py() or 0
            for name in ("captions", *features.optional)
        },
        "splits": {split: splits.get(split, 0) for split in SPLITS},
        "rejected": _lines(folder / REJECTS),
    }
    problems = _differences(manifest, found)
    held = np.bincount(features.shard_numbers(features.rows()), minlength=len(manifest["shards"]))
    problems += [
        f"{shard['file']}: the manifest says {shard['records']} records, there are {count}"
        for shard, count in zip(manifest["shards"], held, strict=True)
        if shard["records"] != count
    ]
    keys = pl.Series(features.table.column("key"))
    repeated = keys.filter(keys.is_duplicated()).unique(maintain_order=True)
    problems += [f"key {key!r} is there more than once" for key in repeated]
    problems += _damaged(sorted(folder.glob(f"{TEXTS}*.safetensors")))
    pooled = None if features.pooled is None else np.isfinite(features.pooled).all(1)
    for number in range(features.views + 1):
        rows = features.rows("train" if number else None)
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            finite = decode(features.read(some, np.full(len(some), number))).isfinite().flatten(1).all(1).numpy()
            if number == 0 and pooled is not None:
                finite &= pooled[some]
            problems += [f"the features of {keys[int(row)]!r} are not all finite" for row in some[~finite]]
    return problems


def _lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


def _run(folder: Path, manifest: dict[str, Any]) -> list[str]:
    if manifest["stage"] == 2:
        open_soft_prompt(folder, manifest)
    else:
        QFormer.from_pretrained(folder)  # every weight has its name and shape
    return _damaged(sorted((folder / CHECKPOINTS).glob("*.safetensors")))


def _damaged(files: Sequence[Path]) -> list[str]:
    """The problems of files that hold their own checksum."""
    problems = []
    for path in files:
        try:
            check_tensors(path)
        except ArtifactError as error:
            problems.append(str(error))
    return problems


def _index(folder: Path, manifest: dict[str, Any]) -> list[str]:
    open_index(folder)  # compares images, vectors and texts with the manifest
    origins = [origin_folder(folder, manifest, name) for name in ("run", "features") if manifest[name] is not None]
    if all(map(has_manifest, origins)):
        *run, features = origins
        check_origin(folder, manifest, read_manifest(run[0], RUN)["sha256"] if run else None, Features(features))
    return []
