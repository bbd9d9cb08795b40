"""Artifacts on disk: sealed JSON, manifests written last, and files that are checked before they are trusted.

A folder is an artifact (features, a run, an index) exactly when it holds a `manifest.json`; whoever writes one writes
everything else first. (The idea of an index written after its shards is MosaicML Streaming's.) Sealed JSON holds its own
checksum, and each kind declares the types and ranges of its fields once, as a TypedDict that msgspec checks."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta, ValidationError, convert

from .errors import ArtifactError
from .files import atomic_file, json_bytes, sha256_file
from .formatting import size

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PLAN, CONFIG = "plan.json", "config.json"  # sealed as well: of features that are not finished, of a run
CHECKED = ".checked.json"  # remembers which files were compared with their checksums
VERSION = 2  # of manifests
CHECKSUM = "checksum"  # the last field of sealed JSON
MAX_JSON = 2**28  # bytes of sealed JSON
LONG_CHECK = 2**31  # bytes whose checksums take so long that a line says so

Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**40)]  # of a tensor's side, or of another thing that cannot be empty
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Meta(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # in the folder itself, not hidden


class FileEntry(TypedDict):
    """A file of an artifact, as its manifest lists it."""

    file: FileName
    bytes: Count
    sha256: Sha256


class _Any(TypedDict):
    """The fields that every manifest has."""

    kind: str
    version: int


@dataclass(frozen=True)
class Kind:
    """A kind of artifact. Each wing that writes artifacts declares its own.

    `fields` is the TypedDict of its manifest; `files` are patterns of the names that qf gives in such a folder, besides the
    manifest; `overwrites` tells whether the command needs --overwrite to make it anew."""

    name: str
    command: str
    fields: type
    files: tuple[str, ...]
    overwrites: bool = True


# ---- sealed JSON -----------------------------------------------------------------------------------------------------


def sealed(content: dict[str, Any]) -> bytes:
    """`content` as indented JSON with its own checksum as the last field. One content has one form."""
    body = json_bytes(content, indent=2)
    digest = hashlib.sha256(body).hexdigest()
    return body.removesuffix(b"\n}") + f',\n  "{CHECKSUM}": "{digest}"\n}}\n'.encode()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write sealed JSON, atomically."""
    with atomic_file(path) as file:
        file.write(sealed(content))


def read_sealed(path: Path, fields: type, cure: str) -> dict[str, Any]:
    """The content of sealed JSON. ArtifactError that ends with `cure` if it is damaged, or if a field is not as `fields`, a
    TypedDict, declares it. OSError if it cannot be opened."""
    with open(path, "rb") as file:
        data = file.read(MAX_JSON)
    try:
        content = json.loads(data)
        intact = isinstance(content, dict) and content.pop(CHECKSUM, None) is not None and sealed(content) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise ArtifactError(f"{path} is damaged or was edited: it is not what its checksum says; {cure}")
    check_fields(path, content, fields, cure)
    return content


def check_fields(path: Path, content: dict[str, Any], fields: type, cure: str) -> None:
    """ArtifactError that ends with `cure` if a field of the content of `path` is not as `fields` declares it."""
    try:
        convert(content, fields)
    except (ValidationError, UnicodeError) as error:  # msgspec checks no text with half a surrogate pair
        raise ArtifactError(f"{path} is not what this version of qf writes: {error}; {cure}") from error


def is_sealed(path: Path) -> bool:
    """Whether `path` holds JSON that qf sealed, and nothing has changed since."""
    try:
        read_sealed(path, dict, "")
    except (OSError, ArtifactError):
        return False
    return True


def bears_seal(path: Path) -> bool:
    """Whether qf sealed the file, even if it has changed since."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 128))
            return f'"{CHECKSUM}": "'.encode() in file.read(128)
    except (OSError, ValueError):
        return False


# ---- manifests -------------------------------------------------------------------------------------------------------


def has_manifest(folder: Path) -> bool:
    """Whether the artifact in `folder` is finished."""
    return (folder / MANIFEST).is_file()


def is_own(folder: Path) -> bool:
    """Whether qf wrote `folder`: features, a run or an index, also if it is unfinished or damaged."""
    return any(bears_seal(folder / name) for name in (MANIFEST, PLAN, CONFIG))


def is_artifact(folder: Path) -> bool:
    """Whether `folder` holds an artifact that qf made, even if it is damaged."""
    return bears_seal(folder / MANIFEST)


def write_manifest(folder: Path, kind: Kind, content: dict[str, Any]) -> None:
    """Declare `folder` a finished artifact of `kind`. Call it last."""
    write_sealed(folder / MANIFEST, {"kind": kind.name, "version": VERSION, **content})


def read_manifest(folder: Path, kind: Kind | None = None) -> dict[str, Any]:
    """The manifest of `folder`. ArtifactError if there is none, if it is damaged, or if it is not of `kind`; the message names
    the command that makes one. Without `kind` any kind is taken, and its fields are not checked."""
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file, not a folder; give the folder of the artifact")
    if not has_manifest(folder):
        state = "is unfinished" if folder.is_dir() and any(folder.iterdir()) else "does not exist or is empty"
        command = f"; make it with `{kind.command}`" if kind else ""
        raise ArtifactError(f"{kind.name if kind else 'artifact'} folder {folder} {state} (no {MANIFEST}){command}")
    cure = f"make it again{f' with `{kind.command}`' if kind else ''}"
    cure += " and --overwrite" if kind is None or kind.overwrites else ""
    path = folder / MANIFEST
    manifest = read_sealed(path, _Any, cure)
    if manifest["version"] != VERSION:
        raise ArtifactError(f"{path} was written by another version of qf ({manifest['version']}); {cure}")
    if kind and manifest["kind"] != kind.name:
        raise ArtifactError(f"{folder} holds {manifest['kind']}, not {kind.name}; make that with `{kind.command}`")
    if kind:
        check_fields(path, manifest, kind.fields, cure)
    return manifest


# ---- files -----------------------------------------------------------------------------------------------------------


def described(path: Path) -> dict[str, Any]:
    """A file of an artifact as manifests list it: {file, bytes, sha256}."""
    digest, status = _digest(path)
    return {"file": path.name, "bytes": status.st_size, "sha256": digest}


def file_problem(folder: Path, entry: dict[str, Any]) -> str | None:
    """The difference between a file and its entry in the manifest, in words, or None. Reads the whole file."""
    path = folder / entry["file"]
    try:
        digest, status = _digest(path)
    except FileNotFoundError:
        return f"{path} is missing"
    if status.st_size != entry["bytes"]:
        return f"{path} has {status.st_size} bytes, not {entry['bytes']}"
    return None if digest == entry["sha256"] else f"{path} has changed: its SHA-256 is not the manifest's"


def check_files(folder: Path, entries: Iterable[dict[str, Any]], cure: str) -> set[str]:
    """Compare files with their entries in the manifest. ArtifactError that ends with `cure` if one is missing or has changed.

    Checksums are computed once: `remember` notes what is known of a file, and it counts as long as size and time of the file
    stay. Returns the names of the files that were not known; the caller looks at them closely, then calls `remember`."""
    entries, known = list(entries), _known(folder)
    unknown = {entry["file"]: entry for entry in entries if known.get(entry["file"]) != _mark(folder, entry)}
    if (count := sum(entry["bytes"] for entry in unknown.values())) > LONG_CHECK:
        log.warning("checking %s in %s, once", size(count), folder)
    for entry in unknown.values():
        if problem := file_problem(folder, entry):
            raise ArtifactError(f"{problem}; {cure}")
    return set(unknown)


def remember(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Note that these files are as the manifest says. A folder that cannot be written is checked each time."""
    known = _known(folder)
    marks = known | {entry["file"]: mark for entry in entries if (mark := _mark(folder, entry))}
    if marks != known:
        with suppress(OSError):
            write_sealed(folder / CHECKED, marks)


def remembered_sha256(folder: Path, path: Path) -> str:
    """The SHA-256 of a file outside of an artifact, such as an encoder's weights. The artifact in `folder` remembers it, as
    `remember` does for its own files."""
    name = str(path.absolute())
    known = _known(folder).get(name)
    if known and known == _mark(folder, {"file": name, "sha256": known[0]}):
        return str(known[0])
    digest = sha256_file(path)
    if name.isprintable():  # a name that is no text would make the note unreadable
        remember(folder, [{"file": name, "sha256": digest}])
    return digest


def _known(folder: Path) -> dict[str, Any]:
    """The marks of the files that were checked before; nothing if there is no note of it, or a damaged one."""
    try:
        return read_sealed(folder / CHECKED, dict[str, list[int | str]], "")
    except (OSError, ArtifactError):
        return {}


def _mark(folder: Path, entry: dict[str, Any]) -> list[Any] | None:
    """The facts that stay the same as long as nobody writes the file; None if there is no such file."""
    try:
        status = os.stat(folder / entry["file"])
    except FileNotFoundError:
        return None
    return [entry["sha256"], status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(path: Path) -> tuple[str, os.stat_result]:
    """The hexadecimal SHA-256 of a file, and its status."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno())


# ---- differences -----------------------------------------------------------------------------------------------------


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
