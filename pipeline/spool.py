"""Arrow rows in an unnamed temporary file, mapped into memory: much data in little memory, gone with the process."""

import mmap
import tempfile
from collections.abc import Iterable

import pyarrow as pa


def spool(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.RecordBatchFileReader:
    """Write the batches to a file in TMPDIR and open it for reading; one batch is in memory at a time."""
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write(batch)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped))
