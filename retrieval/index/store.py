"""An index on disk: the vectors of images and of texts, and the rows that say what each vector shows.

An index knows the run and the features that it was built from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...pipeline.artifacts import check_files, described, has_manifest, read_manifest, remember, write_manifest
from ...pipeline.errors import ArtifactError, first_line
from ...pipeline.files import atomic_file, locked, mapped
from ...pipeline.replacement import clear, place_to_write, settle
from ...pipeline.schema import INDEX_COLUMNS
from .manifest import IMAGES, INDEX, ROWS, TEXTS
from .vectors import flat, import_faiss, read_flat

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features

REBUILD = "rebuild it with `qf index`"
ROWS_AT_ONCE = 2**16  # vectors


@dataclass(frozen=True)
class Index:
    """Vectors of N images (`per_image` each, in a row) and of M texts, with what they stand for."""

    images: Any  # faiss index of N * per_image vectors
    texts: Any | None  # faiss index of M vectors
    per_image: int
    rows: pa.Table  # INDEX_COLUMNS, row for row as in the features
    text_rows: np.ndarray  # (M,) position in `rows` of each text's image
    captions: Sequence[str]  # (M,)
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def rows_of(self, items: np.ndarray) -> list[dict[str, Any]]:
        """The rows of these items (n,), as dicts. `take` would join the chunks, and fail at 2 GiB of thumbnails."""
        return [row for item in items.tolist() for row in self.rows.slice(item, 1).to_pylist()]


def make_index(features: "Features", images: np.ndarray, texts: np.ndarray | None, manifest: dict[str, Any]) -> Index:
    """An index in memory of the features' `images` (N, Q, E), or (N, E), and `texts` (M, E): all their captions, in order."""
    per_image = images.shape[1] if images.ndim == 3 else 1
    return Index(
        flat(images.reshape(-1, images.shape[-1])),
        None if texts is None else flat(texts),
        per_image,
        features.table.select(INDEX_COLUMNS),
        *_texts(features.captions),
        manifest,
    )


def _texts(captions: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    """Captions of each image -> (M,) the image of each, and all of them."""
    owners = np.repeat(np.arange(len(captions)), [len(some) for some in captions])
    return owners, [caption for some in captions for caption in some]


def save_index(index: Index, folder: Path) -> dict[str, Any]:
    """Write the index as an artifact; an earlier one stays until this one is complete. Returns its manifest."""
    faiss = import_faiss()
    with locked(folder):
        place = place_to_write(folder, overwrite=True, resumes=lambda there: not has_manifest(there))
        place.mkdir(parents=True, exist_ok=True)
        clear(place, INDEX)
        for name, part in ((IMAGES, index.images), (TEXTS, index.texts)):
            with atomic_file(place / name) as file:
                file.write(faiss.serialize_index(part).data)
        with atomic_file(place / ROWS) as file, pa.ipc.new_file(file, index.rows.schema) as writer:
            writer.write_table(index.rows)
        files = [described(place / name) for name in (IMAGES, TEXTS, ROWS)]
        content = {
            "type": "flat",
            "images": len(index),
            "vectors": int(index.images.ntotal),
            "texts": int(index.texts.ntotal),  # type: ignore[union-attr]
            "per_image": index.per_image,
            "bytes": sum(file["bytes"] for file in files),
            "files": files,
            **index.manifest,
        }
        write_manifest(place, INDEX, content)
        remember(place, files)
        settle(place, folder, INDEX)
    return read_manifest(folder, INDEX)


def open_index(folder: Path) -> Index:
    """A finished index, all of it from one build. ArtifactError if a file is missing or damaged."""
    before = None
    while (manifest := read_manifest(folder, INDEX)) != before:
        before = manifest
        try:
            index = _open(folder, manifest)
        except (ArtifactError, FileNotFoundError):
            if read_manifest(folder, INDEX) == manifest:
                raise
    return index  # the manifest is still the same: it was not rebuilt while it was read


def _open(folder: Path, manifest: dict[str, Any]) -> Index:
    unknown = check_files(folder, manifest["files"], REBUILD)
    try:
        images, texts = (read_flat(folder / name) for name in (IMAGES, TEXTS))
        rows = pa.ipc.open_file(mapped(folder / ROWS)).read_all().select(INDEX_COLUMNS)
        if unknown:
            rows.validate(full=True)
        captions = rows.column("captions").to_pylist()
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ArtifactError(f"index {folder} is damaged ({first_line(error)}); {REBUILD}") from error
    count, per_image = manifest["images"], manifest["per_image"]
    found = [images.ntotal, texts.ntotal, rows.num_rows, sum(map(len, captions)), images.d]
    if found != [manifest["vectors"], manifest["texts"], count, manifest["texts"], texts.d] or (
        images.ntotal != count * per_image
    ):
        raise ArtifactError(f"index {folder} is not what its manifest says; {REBUILD}")
    if unknown:
        if not all(_finite(part) for part in (images, texts)):
            raise ArtifactError(f"index {folder} holds vectors that are not finite; {REBUILD}")
        remember(folder, manifest["files"])
    return Index(images, texts, per_image, rows, *_texts(captions), manifest)


def _finite(index: Any) -> bool:
    """Whether all vectors of a FAISS index are finite, looked at some at a time."""
    return all(
        np.isfinite(index.reconstruct_n(start, min(ROWS_AT_ONCE, index.ntotal - start))).all()
        for start in range(0, index.ntotal, ROWS_AT_ONCE)
    )


def origin(folder: Path, run: Path, run_sha256: str, features: "Features") -> dict[str, Any]:
    """The run and the features that an index at `folder` is built from, for its manifest. Paths are relative to the folder."""
    return {
        "run": {"path": os.path.relpath(run, folder), "sha256": run_sha256},
        "features": {"path": os.path.relpath(features.folder, folder), "identity": features.identity},
    }


def origin_folder(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """The folder of the `run` or the `features` that an index at `folder` was built from. ArtifactError if it cannot exist."""
    try:
        return (folder / manifest[name]["path"]).resolve()
    except ValueError as error:  # a null byte, or half a surrogate pair
        raise ArtifactError(f"index {folder} names no folder of its {name}; {REBUILD}") from error


def check_origin(folder: Path, manifest: dict[str, Any], run_sha256: str, features: "Features") -> None:
    """ArtifactError if the index was built from another model or from other features."""
    if manifest["run"]["sha256"] != run_sha256:
        raise ArtifactError(
            f"index {folder} was built from another model than {manifest['run']['path']} holds now; {REBUILD}"
        )
    if manifest["features"]["identity"] != features.identity:
        raise ArtifactError(f"index {folder} was built from other features than {features.folder} holds now; {REBUILD}")
