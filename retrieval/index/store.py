"""An index on disk: the vectors of images and of texts, and the rows that say what each vector shows.

An index knows the run and the features that it was built from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...pipeline.artifacts import MANIFEST, atomic_file, described, locked, read_manifest, write_manifest
from ...pipeline.errors import ArtifactError
from ...pipeline.schema import INDEX_COLUMNS
from .manifest import INDEX
from .vectors import flat, import_faiss

if TYPE_CHECKING:
    from ...pipeline.features.reader import Features

REBUILD = "rebuild it with `qf index`"
FILES = ("images.faiss", "texts.faiss", "rows.arrow")


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
    """Write the index as an artifact, in place of an earlier one. Returns its manifest."""
    faiss = import_faiss()
    with locked(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, part in (("images.faiss", index.images), ("texts.faiss", index.texts)):
            with atomic_file(folder / name) as file:
                file.write(faiss.serialize_index(part).data)
        with atomic_file(folder / "rows.arrow") as file, pa.ipc.new_file(file, index.rows.schema) as writer:
            writer.write_table(index.rows)
        files = [described(folder / name) for name in FILES]
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
        write_manifest(folder, INDEX, content)
    return read_manifest(folder, INDEX)


def open_index(folder: Path) -> Index:
    """A finished index. ArtifactError if a file is missing or damaged."""
    faiss = import_faiss()
    manifest = read_manifest(folder, INDEX)
    try:
        images, texts = (faiss.read_index(str(folder / name)) for name in ("images.faiss", "texts.faiss"))
        with pa.memory_map(str(folder / "rows.arrow")) as source:
            rows = pa.ipc.open_file(source).read_all()
    except (RuntimeError, OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"index {folder} is damaged or lacks a file; {REBUILD}") from error
    if images.ntotal != manifest["vectors"] or texts.ntotal != manifest["texts"] or rows.num_rows != manifest["images"]:
        raise ArtifactError(f"index {folder} is not what its manifest says; {REBUILD}")
    return Index(images, texts, manifest["per_image"], rows, *_texts(rows.column("captions").to_pylist()), manifest)


def origin(folder: Path, run: Path, run_sha256: str, features: "Features") -> dict[str, Any]:
    """The run and the features that an index at `folder` is built from, for its manifest. Paths are relative to the folder."""
    return {
        "run": {"path": os.path.relpath(run, folder), "sha256": run_sha256},
        "features": {"path": os.path.relpath(features.folder, folder), "identity": features.identity},
    }


def check_origin(folder: Path, manifest: dict[str, Any], run_sha256: str, features: "Features") -> None:
    """ArtifactError if the index was built from another model or from other features."""
    if manifest["run"]["sha256"] != run_sha256:
        raise ArtifactError(
            f"index {folder} was built from another model than {manifest['run']['path']} holds now; {REBUILD}"
        )
    if manifest["features"]["identity"] != features.identity:
        raise ArtifactError(f"index {folder} was built from other features than {features.folder} holds now; {REBUILD}")
