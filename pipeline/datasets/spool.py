"""Arrow rows, or pictures, in an unnamed temporary file in TMPDIR: much data in little memory, gone with the process."""

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from ..errors import DatasetError


def spool(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.RecordBatchFileReader:
    """Write the batches to a file, which is mapped into memory, and open it for reading; one batch is in memory at a time.
    DatasetError if the file does not fit."""
    with _room("the list of records"), tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write(batch)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped))


class PictureSpool:
    """Pictures, one after the other in a file."""

    def __init__(self) -> None:
        self._file = -1  # its descriptor, from the first picture on
        self.size = 0  # bytes

    def add(self, data: bytes) -> int:
        """Write a picture; returns the byte where it begins. DatasetError if the file does not fit."""
        start = self.size
        with _room("the pictures that the table holds"):
            if self._file < 0:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            while data:
                written = os.write(self._file, data)
                data = data[written:]
                self.size += written
        return start

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a picture."""
        return os.pread(self._file, size, offset)


@contextmanager
def _room(what: str) -> Iterator[None]:
    """A full disk as a DatasetError that names what does not fit."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatasetError(
            f"{tempfile.gettempdir()} is full: {what} cannot be kept there; set TMPDIR to a folder with more room"
        ) from error
