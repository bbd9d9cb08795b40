"""A shard as an uncompressed tar that the webdataset library reads: the rows of arrow_shards.py, a few members each.

    KEY.json            key, split, image, captions, width, height; questions, conversations, and how its views were cut out,
                        where the dataset has some
    KEY.jpg             the thumbnail
    KEY.pooled.npy      (P,) float32, where the encoder has a joint space
    KEY.tokens.npy      and the further columns of the codec: one record's array each
    KEY.view_*.npy      (K, …): the same of its K views, where there are some

The array of a member lies behind a header of known length, so a memory-mapped tar is read in place, as Arrow is. Opening one
takes a pass over its headers, which Arrow does without; what is kept of it is the texts, an offset a row and column, and some
300 bytes a row for the place of the thumbnail."""

import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from itertools import groupby
from math import prod
from pathlib import Path
from tarfile import PAX_FORMAT, TarInfo
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ArtifactError
from ..files import Sink, mapped
from ..formatting import printable
from ..schema import JSON_COLUMNS, OPTIONAL_COLUMNS, VIEW
from ..tar_format import BLOCK, MAX_HEADER, DamagedTar, Member, tar_members
from .arrow_shards import Block, schema
from .codecs import TokenColumns

NPY_HEADER = 128  # bytes; a multiple of 64, so that data is aligned as well as the tar's blocks are

MAX_NAME = MAX_HEADER - 1024  # bytes of a key in a name; a suffix and the header's other fields follow

# Characters that a name cannot hold. A dot ends the key, "/" at an end or twice is no path, webdataset skips "__…__/".
UNSAFE = re.compile(rb"[^A-Za-z0-9_/-]|(?<![^/])/|/(?![^/])|^_(?=_)")


def member_name(key: str) -> str:
    """A key as the start of its members' names: percent-encoded UTF-8, no two keys alike."""
    return UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], key.encode()).decode() or "%"


def key_problem(key: str) -> str:
    """Why a key cannot be the name of a member, or nothing."""
    size = len(member_name(key))
    return f"its key takes {size:,} bytes as a name in a tar, the limit is {MAX_NAME:,}" if size > MAX_NAME else ""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_tar_shard(file: Sink, blocks: Iterable[Block], optional: Collection[str] = ()) -> int:
    """Write one shard; returns the number of records. Its bytes depend on the rows alone, not on how they are blocked.
    `optional` names the columns of the records that only some datasets have."""
    count = 0
    for block in blocks:
        for name, data in _members(block, optional):
            header = TarInfo(name)  # no time, no owner
            header.size = len(data)
            file.write(header.tobuf(PAX_FORMAT) + data + bytes(-len(data) % BLOCK))
        count += len(block["key"])
    file.write(bytes(2 * BLOCK))
    return count


def _members(block: Block, optional: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The names and bytes of a block's members, row by row."""
    no_arrays = (*JSON_COLUMNS, *OPTIONAL_COLUMNS, "thumbnail", "views")
    arrays = [name for name in block if name not in no_arrays and not name.startswith(VIEW) and block[name] is not None]
    arrays.sort(key=lambda name: name != "pooled")
    first = 0  # the row's first view among the block's
    for row, key in enumerate(block["key"]):
        name = member_name(key)
        about = {column: block[column][row] for column in JSON_COLUMNS}
        about.update(width=int(about["width"]), height=int(about["height"]), captions=list(about["captions"]))
        about.update({column: block[column][row] for column in OPTIONAL_COLUMNS if column in optional})
        views = block["views"][row] if block.get("views") else []
        if views:
            about["views"] = views
        yield f"{name}.json", json.dumps(about, ensure_ascii=False).encode()
        yield f"{name}.jpg", block["thumbnail"][row]
        for column in arrays:
            yield f"{name}.{column}.npy", _npy(block[column][row])
        if views:
            last = first + len(views)
            for column in arrays:
                if column != "pooled":
                    yield f"{name}.{VIEW}{column}.npy", _npy(block[VIEW + column][first:last])
            first = last


def _npy(values: np.ndarray) -> bytes:
    return _npy_header(values.dtype, values.shape) + values.tobytes()


@cache
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of an array in NumPy's format 1.0. Its length does not depend on the installed NumPy."""
    about = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    magic = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    return magic + about.ljust(NPY_HEADER - len(magic) - 1) + b"\n"


# ---- reading ---------------------------------------------------------------------------------------------------------


class TarShard:
    """A shard, memory-mapped: `table`, `memory`, `offsets` and `joint` as an ArrowShard has them."""

    def __init__(self, path: Path, encoded: TokenColumns) -> None:
        """ArtifactError if the file is not a tar that `write_tar_shard` wrote. OSError if it cannot be opened."""
        self._types = {name: (np.dtype(str(d).removeprefix("torch.")), shape) for name, (d, shape) in encoded.items()}
        self._found = {name: array("q") for name in ("pooled", *encoded, *(VIEW + name for name in encoded))}
        buffer = mapped(path)
        self.memory = np.frombuffer(buffer, np.uint8)
        try:
            with open(path, "rb", buffering=0) as file:
                self.table = self._read(file.fileno(), buffer, encoded)
        except (DamagedTar, AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); extract again with --overwrite") from error
        self.offsets = {name: np.array(found, np.int64) for name, found in self._found.items()}
        self.joint: int | None = self._types["pooled"][1][0] if "pooled" in self._types else None

    def validate(self) -> None:
        """Nothing is left to check: every header and every text was read when it was opened."""

    def _read(self, tar: int, mapped: pa.Buffer, encoded: TokenColumns) -> pa.Table:
        """Record the offset of every array. Returns the other columns of the rows."""
        arrays: list[str] = []  # of a row without views
        rows: list[dict[str, Any]] = []
        thumbnails: list[pa.Array] = []
        for name, found in groupby(tar_members(tar), key=lambda member: member.name.partition(".")[0]):
            members = {member.name.partition(".")[2].removesuffix(".npy"): member for member in found}
            if not {"json", "jpg"} <= members.keys():
                raise DamagedTar(f"{printable(name)} is no record of features")
            about = json.loads(self._part(members.pop("json")))
            views = about.setdefault("views", [])
            if not arrays:
                arrays = [*encoded]
                if "pooled" in members:
                    arrays.append("pooled")
                    width = (members["pooled"].size - NPY_HEADER) // 4
                    self._types["pooled"] = (np.dtype(np.float32), (width,))
            thumbnails.append(_mapped_binary(mapped, members.pop("jpg")))
            if members.keys() != {*arrays, *(VIEW + column for column in encoded if views)}:
                raise DamagedTar(f"{printable(name)} has other members than its neighbours")
            for column in arrays:
                self._found[column].append(self._data(members[column], *self._types[column]))
            for column in encoded:
                dtype, shape = self._types[column]
                at = self._data(members[VIEW + column], dtype, (len(views), *shape)) if views else -1
                self._found[VIEW + column].append(at)
            rows.append(about)
        optional = [name for name in OPTIONAL_COLUMNS if any(name in about for about in rows)]
        texts = (*JSON_COLUMNS, *optional, "views")
        fields = [field for field in schema(encoded, None, views=True, optional=optional) if field.name in texts]
        columns = [pa.array([about[field.name] for about in rows], field.type) for field in fields]
        table = pa.table(columns, schema=pa.schema(fields))
        return table.append_column("thumbnail", pa.chunked_array(thumbnails, pa.binary()))

    def _part(self, member: Member) -> bytes:
        return self.memory[member.offset : member.offset + member.size].tobytes()

    def _data(self, member: Member, dtype: np.dtype, shape: tuple[int, ...]) -> int:
        """Where the values of an array begin."""
        start = member.offset + NPY_HEADER
        size = NPY_HEADER + dtype.itemsize * prod(shape)
        if member.size != size or self.memory[member.offset : start].tobytes() != _npy_header(dtype, shape):
            raise DamagedTar(f"{printable(member.name)} is no array of {dtype} {shape}")
        return start


def _mapped_binary(mapped: pa.Buffer, member: Member) -> pa.Array:
    """One value of a binary column, left where it is: copies of the thumbnails would not fit in memory."""
    ends = pa.py_buffer(np.array([0, member.size], np.int32))
    return pa.BinaryArray.from_buffers(pa.binary(), 1, [None, ends, mapped.slice(member.offset, member.size)])
