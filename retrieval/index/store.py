"""An index on disk: the vectors of images and of texts in one space or two, and the rows that say what each vector shows.

An index knows the run and the features that it was built from."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import MsgspecError

from ...pipeline.artifacts import check_files, described, has_manifest, read_manifest, remember, write_manifest
from ...pipeline.errors import ArtifactError, first_line
from ...pipeline.files import atomic_file, locked
from ...pipeline.replacement import clear, place_to_write, settle
from .compact import Form
from .manifest import ENCODER_TEXT, INDEX, ROWS, SPACES, STARTS
from .rows import Row, Rows, check_rows, open_rows, rows_of_table, save_rows
from .space import Space
from .vectors import import_faiss

if TYPE_CHECKING:
    from ...pipeline.features.manifest import FeaturesFolder
    from ...pipeline.features.reader import Features

REBUILD = "rebuild it with `qf index`"


@dataclass(frozen=True)
class Index:
    """N images and M texts in each space, with what their vectors stand for."""

    spaces: dict[str, Space]  # by scorer, see SPACES
    rows: Rows  # row for row as in the features
    manifest: dict[str, Any]
    encoder_text: bytes | None = None  # describes the encoder's text model for queries; see encode/encoder_text.py

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def first(self) -> Space:
        """The run's space, or the encoder's if there is no run."""
        return next(self.spaces[scorer] for scorer in SPACES if scorer in self.spaces)

    def rows_of(self, items: np.ndarray) -> list[Row]:
        """The rows of these items (n,), as dicts."""
        return [self.rows.read(item) for item in items.tolist()]


def make_index(
    features: "Features", spaces: dict[str, Space], manifest: dict[str, Any], encoder_text: bytes | None = None
) -> Index:
    """An index in memory of all images and captions of the features, in their order."""
    from ...pipeline.schema import INDEX_COLUMNS

    return Index(spaces, rows_of_table(features.table.select(INDEX_COLUMNS)), manifest, encoder_text)


def save_index(index: Index, folder: Path) -> dict[str, Any]:
    """Write the index as an artifact; an earlier one stays until this one is complete. Returns its manifest."""
    faiss = import_faiss()
    with locked(folder):
        place = place_to_write(folder, overwrite=True, resumes=lambda there: not has_manifest(there))
        place.mkdir(parents=True, exist_ok=True)
        clear(place, INDEX)
        names = [name for scorer in index.spaces for name in SPACES[scorer]]
        parts = [part for space in index.spaces.values() for part in (space.images, space.texts)]
        for name, part in zip(names, parts, strict=True):
            with atomic_file(place / name) as file:
                file.write(faiss.serialize_index(part).data)
        if index.encoder_text is not None:
            with atomic_file(place / ENCODER_TEXT) as file:
                file.write(index.encoder_text)
            names.append(ENCODER_TEXT)
        save_rows(index.rows, place)
        files = [described(place / name) for name in (*names, ROWS, STARTS)]
        content = {
            "type": index.first.form.type,
            "images": len(index),
            "vectors": len(index) * index.first.per_image,
            "texts": index.rows.captions,
            "spaces": {
                scorer: {**asdict(space.form), "slots": list(space.form.slots)}
                for scorer, space in index.spaces.items()
            },
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
    names = {entry["file"] for entry in manifest["files"]}
    if not names >= {ROWS, STARTS}:
        raise ArtifactError(f"index {folder} was written by an earlier version of qf; {REBUILD}")
    unknown = check_files(folder, manifest["files"], REBUILD)
    try:
        spaces = {
            scorer: Space.read(
                (folder / name for name in SPACES[scorer]), Form(**{**form, "slots": tuple(form["slots"])})
            )
            for scorer, form in manifest["spaces"].items()
        }
        rows = open_rows(folder)
        if unknown:
            check_rows(folder)
    except (ValueError, MsgspecError) as error:
        raise ArtifactError(f"index {folder} is damaged ({first_line(error)}); {REBUILD}") from error
    encoder_text = (folder / ENCODER_TEXT).read_bytes() if ENCODER_TEXT in names else None
    index = Index(spaces, rows, manifest, encoder_text)
    counts = (manifest["images"], manifest["images"] * index.first.per_image, manifest["texts"])
    right = counts == (len(index), manifest["vectors"], rows.captions)
    right &= all(space.shape == (len(index) * space.per_image, rows.captions, True) for space in spaces.values())
    if not right or ("itc" in spaces) != (manifest["run"] is not None):
        raise ArtifactError(f"index {folder} is not what its manifest says; {REBUILD}")
    if unknown:
        if not all(space.is_finite() for space in spaces.values()):
            raise ArtifactError(f"index {folder} holds vectors that are not finite; {REBUILD}")
        remember(folder, manifest["files"])
    return index


def origin(folder: Path, run: tuple[Path, str] | None, features: "Features") -> dict[str, Any]:
    """The run (its folder and SHA-256), if there is one, and the features that an index at `folder` is built from, for its
    manifest. Paths are relative to the folder."""
    return {
        "run": None if run is None else {"path": os.path.relpath(run[0], folder), "sha256": run[1]},
        "features": {"path": os.path.relpath(features.folder, folder), "identity": features.identity},
    }


def origin_folder(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """The folder of the `run` or the `features` that an index at `folder` was built from. ArtifactError if it cannot exist."""
    try:
        return (folder / manifest[name]["path"]).resolve()
    except ValueError as error:  # a null byte, or half a surrogate pair
        raise ArtifactError(f"index {folder} names no folder of its {name}; {REBUILD}") from error


def check_origin(
    folder: Path, manifest: dict[str, Any], run_sha256: str | None, features: "Features | FeaturesFolder"
) -> None:
    """ArtifactError if the index was built from another model or from other features. `run_sha256` is that of its run now."""
    if manifest["run"] is not None and manifest["run"]["sha256"] != run_sha256:
        raise ArtifactError(
            f"index {folder} was built from another model than {manifest['run']['path']} holds now; {REBUILD}"
        )
    if manifest["features"]["identity"] != features.identity:
        raise ArtifactError(f"index {folder} was built from other features than {features.folder} holds now; {REBUILD}")
