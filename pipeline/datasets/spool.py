"""Arrow rows in an unnamed temporary file, mapped into memory: much data in little memory, gone with the process."""

import errno
import mmap
import tempfile
from collections.abc import Iterable

import pyarrow as pa

from ..errors import DatasetError


def spool(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.RecordBatchFileReader:
    """Write the batches to a file in TMPDIR and open it for reading; one batch is in memory at a time. DatasetError if
    the file does not fit."""
    try:
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatasetError(
            f"{tempfile.gettempdir()} is full: the list of records does not fit; set TMPDIR to a folder with more room"
        ) from error
    return pa.ipc.open_file(pa.py_buffer(mapped))
