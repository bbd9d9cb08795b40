"""The headers of an uncompressed tar (POSIX.1-2001 pax, "ustar" and GNU long names): where each member's bytes are.

Read by hand: ten million samples are thirty million members, and a truncated or damaged tar must tell where it breaks off."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from .formatting import printable

BLOCK = 512  # bytes
ZEROS = bytes(BLOCK)
REGULAR = (b"0", b"\0", b"7")  # types of regular files
MAX_HEADER = 2**20  # bytes of an extended header
MAX_DIGITS = 18  # of a decimal number
MAX_ZEROS = 2**26  # bytes between joined tars, and after the last one


@dataclass(frozen=True, slots=True)
class Member:
    """A member's name and type, and where its bytes are."""

    name: str
    kind: bytes
    offset: int
    size: int


class DamagedTar(Exception):
    """The tar is truncated or damaged; the message says where."""


def tar_members(fd: int) -> Iterator[Member]:
    """The complete members of an uncompressed tar, or of several joined, in order. DamagedTar where it breaks off."""
    end = os.fstat(fd).st_size
    at, long_name, attributes = 0, b"", dict[bytes, bytes]()
    closed = False  # a block of zeros ends a tar
    zeros = 0  # bytes
    while True:
        header = os.pread(fd, BLOCK, at)
        if len(header) < BLOCK:
            if closed:
                return
            raise DamagedTar(f"truncated after {end:,} bytes" if end else "empty file")
        if closed := header == ZEROS:
            at, zeros = at + BLOCK, zeros + BLOCK
            if zeros > MAX_ZEROS:
                at, zeros = _after_hole(fd, at), 0
            continue
        size = _number(header[124:136], at)
        kind = header[156:157]
        if _number(header[148:156], at) != sum(header) - sum(header[148:156]) + 256:
            raise DamagedTar(f"damaged, or no tar, at byte {at:,}: the header's checksum is wrong")
        data = at + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_HEADER:
                raise DamagedTar(f"damaged at byte {at:,}: a name of {size:,} bytes")
            value = os.pread(fd, size, data)
            if len(value) < size:
                raise DamagedTar(f"truncated inside a header, after {end:,} bytes")
            if kind == b"L":
                long_name = value.split(b"\0")[0]
            elif kind == b"x":
                attributes = _attributes(value, at)
        else:
            name = header[:100].split(b"\0")[0]
            if header[257:263] == b"ustar\0" and (start := header[345:500].split(b"\0")[0]):
                name = start + b"/" + name
            name = attributes.get(b"path") or long_name or name
            size = _decimal(attributes[b"size"], at) if b"size" in attributes else size
            if kind not in REGULAR and kind in b"123456":  # links and devices have no data, whatever size they state
                size = 0
            if data + size > end:
                raise DamagedTar(f"truncated inside {printable(os.fsdecode(name))}, after {end:,} bytes")
            if any(attribute.startswith(b"GNU.sparse") for attribute in attributes):
                kind = b"S"
            yield Member(os.fsdecode(name), kind, data, size)
            long_name, attributes = b"", {}
        at = data + -(-size // BLOCK) * BLOCK


def _after_hole(fd: int, at: int) -> int:
    """The block of the next data behind a hole in a sparse file; the end of the file if there is none. DamagedTar if `at`
    is in no hole."""
    try:
        found = os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK
    except OSError as error:
        if error.errno != errno.ENXIO:  # the file system knows no holes
            raise DamagedTar(f"zeros up to byte {at:,}, the rest is not read") from error
        return os.fstat(fd).st_size
    if found <= at:
        raise DamagedTar(f"zeros up to byte {at:,}, the rest is not read")
    return found


def _number(field: bytes, at: int) -> int:
    """A number in octal digits, or in GNU's base 256 if it is too large for them."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.split(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):
        raise DamagedTar(f"damaged, or no tar, at byte {at:,}: no number where one belongs")
    return int(digits, 8)


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > MAX_DIGITS:
        raise DamagedTar(f"damaged at byte {at:,}: no number where one belongs")
    return int(text)


def _attributes(value: bytes, at: int) -> dict[bytes, bytes]:
    """The attributes in lines of `LENGTH KEY=VALUE`. LENGTH counts the bytes of the whole line."""
    found = {}
    value = value.rstrip(b"\0")
    start = 0
    while start < len(value):
        length = value[start : start + MAX_DIGITS].partition(b" ")[0]
        size = _decimal(length, at)
        key, equals, text = value[start + len(length) + 1 : start + size - 1].partition(b"=")
        if not equals or not len(length) + 1 < size <= len(value) - start:
            raise DamagedTar(f"damaged at byte {at:,}: no attributes where they belong")
        found[key] = text
        start += size
    return found
