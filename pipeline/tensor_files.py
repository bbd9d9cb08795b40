"""Tensors on disk: safetensors files that hold a JSON value and their own checksum, written atomically."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import ArtifactError
from .files import atomic_file

ZEROS = "0" * 64  # in place of the checksum while it is computed
CHECKSUM = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # in the JSON value, which is a text in the header's JSON
MAX_HEADER = 10**8  # bytes, as safetensors itself allows


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and a JSON value into one safetensors file with a checksum of all of it.

    Equal tensors and values give equal bytes: there is one field of metadata, because safetensors does not order several."""
    metadata = {"info": json.dumps({"sha256": ZEROS, **info})}
    data = memoryview(save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, metadata))
    found = CHECKSUM.search(data[: 8 + int.from_bytes(data[:8], "little")])
    assert found is not None
    digest = hashlib.sha256(data).hexdigest()
    with atomic_file(path) as file:
        for part in (data[: found.start(1)], digest.encode(), data[found.end(1) :]):
            file.write(part)


def check_tensors(path: Path) -> None:
    """ArtifactError if a file that `save_tensors` wrote has changed in any byte. Reads the whole file."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
        found = CHECKSUM.search(header)
        digest = hashlib.sha256(length)
        if found:
            start, stop = found.span(1)
            digest.update(header[:start] + ZEROS.encode() + header[stop:])
        while part := file.read(2**20):
            digest.update(part)
    if not found or digest.hexdigest().encode() != found[1]:
        raise ArtifactError(f"{path} is damaged: it is not what its checksum says")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened as by `safe_open`. OSError as of `open`; ArtifactError if it is no safetensors file.

    The name of the file need not be UTF-8."""
    with open(path, "rb") as file:
        try:
            with safe_open(f"/dev/fd/{file.fileno()}", "pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ArtifactError(f"{path} is no complete safetensors file: it is damaged or truncated") from error


def read_info(path: Path) -> dict[str, Any]:
    """The JSON value beside the tensors of a file that `save_tensors` wrote. Errors as of `open_tensors`."""
    with open_tensors(path) as file:
        try:
            info = json.loads(file.metadata()["info"])
            del info["sha256"]
        except (KeyError, TypeError, ValueError, RecursionError):
            info = None
    if not isinstance(info, dict):
        raise ArtifactError(f"{path} holds no information of qf beside its tensors")
    return info
