"""Artifacts on disk: files that appear whole or not at all, manifests written last, checksums.

A folder is an artifact (features, a run, an index) exactly when it holds a `manifest.json`; whoever writes one writes
everything else first. (The idea of an index written after its shards is MosaicML Streaming's.) Standard library only.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import ArtifactError

MANIFEST = "manifest.json"
VERSION = 1  # of manifests
TEMPORARY = ".tmp"
LOCK = ".lock"
FILE = {"file": str, "bytes": int, "sha256": str}  # of an artifact, as its manifest lists it


@dataclass(frozen=True)
class Kind:
    """A kind of artifact: its name, the command that makes one, and the fields that its manifest holds at least.

    A field of type `list` holds descriptions of files (FILE). Each wing that writes artifacts declares its own kind."""

    name: str
    command: str
    fields: Mapping[str, type]


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` only when the block ends well: written beside it, flushed, renamed."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the one that was asked for
        temporary.unlink(missing_ok=True)
        raise


class Sink(Protocol):
    """Anything that takes bytes in order."""

    def write(self, data: Any, /) -> Any: ...


class HashedFile(io.RawIOBase):
    """A sink that passes bytes on, and counts and hashes them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += len(memoryview(data).cast("B"))
        return self._file.write(data)

    def tell(self) -> int:
        return self._size

    @property
    def sha256(self) -> str:
        """The hexadecimal SHA-256 of all bytes written so far."""
        return self._hash.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json_bytes(value, indent=2) + b"\n")


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8. Bytes of file names that are not UTF-8, which Python keeps as half surrogate pairs, are written as
    escapes, and read back as they were."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="backslashreplace")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; ArtifactError if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); make it again with --overwrite") from error


def has_manifest(folder: Path) -> bool:
    """Whether the artifact in `folder` is finished."""
    return (folder / MANIFEST).is_file()


def is_artifact(folder: Path) -> bool:
    """Whether `folder` holds an artifact that qf made."""
    try:
        return bool(read_manifest(folder))
    except ArtifactError:
        return False


def write_manifest(folder: Path, kind: Kind, content: dict[str, Any]) -> None:
    """Declare `folder` a finished artifact of `kind`. Call it last."""
    write_json(folder / MANIFEST, {"kind": kind.name, "version": VERSION, **content})


def read_manifest(folder: Path, kind: Kind | None = None) -> dict[str, Any]:
    """The manifest of `folder`. ArtifactError if there is none, or if it is not of `kind`; the message names the command
    that makes one. Without `kind` any kind is taken, and its fields are not checked."""
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file, not a folder; give the folder of the artifact")
    if not has_manifest(folder):
        state = "is unfinished" if folder.is_dir() and any(folder.iterdir()) else "does not exist or is empty"
        command = f"; make it with `{kind.command}`" if kind else ""
        raise ArtifactError(f"{kind.name if kind else 'artifact'} folder {folder} {state} (no {MANIFEST}){command}")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    known = isinstance(manifest, dict) and manifest.get("version") == VERSION and isinstance(manifest.get("kind"), str)
    if known and kind and manifest["kind"] != kind.name:
        raise ArtifactError(f"{folder} holds {manifest['kind']}, not {kind.name}; make that with `{kind.command}`")
    if not known or (kind and not _holds(manifest, kind.fields)):
        raise ArtifactError(
            f"{folder / MANIFEST} is not a manifest that this version of qf understands; make it again with --overwrite"
        )
    return manifest


def _holds(value: Any, fields: Mapping[str, type]) -> bool:
    """Whether `value` is an object whose fields have these types. Each entry of a list must describe a file (FILE)."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) and (kind is not list or all(_holds(part, FILE) for part in value[name]))
        for name, kind in fields.items()
    )


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path) -> dict[str, Any]:
    """A file of an artifact as manifests list it: {file, bytes, sha256}."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value. Spaces and the order of keys do not change it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of `value` without one key, such as a path: an identity does not depend on a place."""
    return {key: part for key, part in value.items() if key != name}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first difference between two identities, in words, or None. Nested keys are joined by dots."""
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := difference(a, b):
                return f"{key}.{inner}"
        elif a != b:
            return f"{key} was {a!r} and is now {b!r}"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; ArtifactError if another process holds the lock.

    The operating system releases the lock when the process ends, also after kill -9."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"another qf is writing {folder}; wait for it, or choose another --workspace"
            ) from error
        yield
