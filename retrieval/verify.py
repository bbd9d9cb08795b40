"""Is an artifact what its manifest says? Checksums of every file, then counts."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc

from ..pipeline.artifacts import has_manifest, read_manifest, sha256_file
from ..pipeline.errors import ArtifactError
from ..pipeline.extract.ledger import REJECTS
from ..pipeline.features.codecs import decode
from ..pipeline.features.reader import SPLITS, Features
from ..trainer.manifest import RUN
from ..trainer.qformer import QFormer
from .index.store import check_origin, open_index

CURES = {
    "features": "extract again with --overwrite",
    "run": "train again with --overwrite",
    "index": "rebuild it with `qf index`",
}
ROWS = 256  # of the features that are looked through at a time


def verify(folder: Path) -> dict[str, Any]:
    """Check the artifact in `folder`: {path, kind, files, bytes, problems, cure}; it is sound if `problems` is empty.

    ArtifactError if there is no finished artifact at all. Reads every byte once or twice; memory grows by some 20 bytes a
    record, besides `pooled`."""
    manifest = read_manifest(folder)
    kind = manifest["kind"]
    files = manifest["shards"] if kind == "features" else manifest["files"]
    problems = [problem for file in files for problem in _file_problems(folder, file)]
    if not problems:  # counts of damaged files would say the same again, or fail to be read
        try:
            problems = {"features": _features, "run": _run, "index": _index}[kind](folder, manifest)
        except ArtifactError as error:
            problems = [str(error)]
    return {
        "path": str(folder),
        "kind": kind,
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files),
        "problems": problems,
        "cure": CURES[kind],
    }


def _file_problems(folder: Path, file: dict[str, Any]) -> list[str]:
    path = folder / file["file"]
    if not path.is_file():
        return [f"{path} is missing"]
    if path.stat().st_size != file["bytes"]:
        return [f"{path} has {path.stat().st_size} bytes, not {file['bytes']}"]
    if sha256_file(path) != file["sha256"]:
        return [f"{path} has changed: its SHA-256 is not the manifest's"]
    return []


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
        "captions": pc.sum(pc.list_value_length(features.table.column("captions"))).as_py() or 0,
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
    QFormer.from_pretrained(folder)  # every weight has its name and shape
    return []


def _index(folder: Path, manifest: dict[str, Any]) -> list[str]:
    index = open_index(folder)  # compares images, vectors and texts with the manifest
    run, features = ((folder / manifest[name]["path"]).resolve() for name in ("run", "features"))
    if has_manifest(run) and has_manifest(features):
        check_origin(folder, manifest, read_manifest(run, RUN)["sha256"], Features(features))
    return _differences(manifest, {"vectors": len(index) * index.per_image, "texts": len(index.captions)})
