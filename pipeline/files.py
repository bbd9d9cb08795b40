"""Files that appear whole or not at all, their checksums, and locks on folders. Standard library at its import."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import ArtifactError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # names of files that are being written


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` only when the block ends well: written beside it, flushed, renamed.

    Its temporary name is its own, so that two writers never share a file, and a link in its place is never followed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it may never have been there
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the one that was asked for
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


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value. Spaces and the order of keys do not change it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def mapped(path: Path) -> Any:
    """The bytes of a file as a `pyarrow.Buffer`, memory-mapped. No file stays open, as one does with Python's own mmap.

    Its name need not be UTF-8. OSError as of `open`."""
    import pyarrow as pa

    with open(path, "rb"), pa.memory_map(os.fsencode(path)) as source:
        return source.read_buffer()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; ArtifactError if another process holds the lock.

    The lock is a file beside the folder, deleted at the end. The operating system releases it when the process ends, also
    after kill -9. Temporary files that such an end left in the folder are deleted (`sweep`)."""
    path = folder.parent / f".{folder.name}.lock"
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = _locked_file(path, folder)
    try:
        sweep(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def sweep(folder: Path) -> None:
    """Delete files in `folder` that were never finished. Call it with the folder locked."""
    for left in folder.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(left.name):
            left.unlink(missing_ok=True)


def _locked_file(path: Path, folder: Path) -> int:
    """The descriptor of the lock file `path`, locked. It is still the file of that name: its last owner deleted another."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ArtifactError(f"the lock {path} is a link, which is not followed; delete it") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.lstat(path)):
                return file
        except BlockingIOError as error:
            os.close(file)
            raise ArtifactError(
                f"another qf is writing {folder}; wait for it, or choose another --workspace"
            ) from error
        except FileNotFoundError:  # deleted between two looks
            pass
        os.close(file)
