"""WebDataset tars, as img2dataset writes them: members that follow each other and share a name are a sample
(`000000012.jpg`, `000000012.txt`, `000000012.json`).

Only headers and texts are read here: an image is left at its place, so that reading can start anywhere. The few parts of
the tar format that matter are read by hand (POSIX.1-2001 pax, "ustar" and GNU long names): ten million samples are thirty
million members, and the error for a truncated or damaged tar must say where. Memory: one sample's names and texts."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import counted, printable
from ..tar_format import REGULAR, DamagedTar, Member, tar_members
from .records import Record, split_of, splits_in_names
from .samples import Sample, is_image_suffix, samples
from .sidecars import MAX_SIDECAR, Sidecars, UnreadableSidecar, captions_of, is_caption_suffix
from .sources import FileSlice

COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
NO_IMAGE = "no image in the sample"
MAX_LACKING = 100_000  # samples of a tar that are remembered because they lack something


def read_tars(paths: Sequence[Path], top: Path, options: ReadOptions) -> tuple[str, Iterator[Record]]:
    """A description of what was found, and the records of the tars.

    A key is the tar's path below `top` and the sample's name, since two tars may hold a sample of the same name. The split
    comes from a sample's JSON, or else from the tar's name (`splits_in_names`).

    A damaged tar's samples are used up to the damage, which is a record with a problem. DatasetError if one is
    compressed."""
    names = [os.path.relpath(path, top).removesuffix(".tar") for path in paths]
    for path in paths:
        with open(path, "rb") as file:
            start = file.read(8)
        for magic, cure in COMPRESSED.items():
            if start.startswith(magic):
                raise DatasetError(
                    f"{path} is compressed; qf reads images at their place in a tar: run {cure} on it first"
                )
    splits = splits_in_names(names)
    found = f"WebDataset: {counted(len(paths), 'tar')}"
    if splits[0] is not None:
        found += ", splits in their names"

    def records() -> Iterator[Record]:
        for path, name, split in zip(paths, names, splits, strict=True):
            yield from _tar_records(path, printable(name), split, options)

    return found, records()


def _tar_records(path: Path, prefix: str, split: str | None, options: ReadOptions) -> Iterator[Record]:
    with open(path, "rb", buffering=0) as file:
        damage: list[str] = []
        lacking: dict[str, bool] = {}  # samples so far that lack a picture, or else a caption
        for sample in samples(_until_damage(tar_members(file.fileno()), damage)):
            record = _record(sample, path, file.fileno(), prefix, split, options)
            if record is None:
                continue
            if not record.captions or record.problem == NO_IMAGE:
                pictured = record.problem != NO_IMAGE
                if lacking.get(sample.name, pictured) != pictured:
                    raise DatasetError(
                        f"{path}: picture and caption of {printable(sample.name)} do not follow each other; write the tar "
                        "again with its members sorted, as with tar --sort=name"
                    )
                if len(lacking) < MAX_LACKING:
                    lacking[sample.name] = pictured
            yield record
    if damage:
        key = f"{prefix}#end"
        yield Record(key, path.name, None, (), split_of(key, split, options), f"{path.name}: {damage[0]}")


def _until_damage(members: Iterator[Member], damage: list[str]) -> Iterator[Member]:
    """The members up to where the tar is damaged, which is noted."""
    try:
        yield from members
    except DamagedTar as error:
        damage.append(str(error))


def _record(sample: Sample, path: Path, fd: int, prefix: str, split: str | None, options: ReadOptions) -> Record | None:
    """A sample as a record: its picture is the first one of the plainest name (`a.jpg` before `a.depth.png`). None if it
    holds neither picture nor caption."""
    pictures: list[tuple[bool, str, Member]] = []
    parts: dict[str, bytes] = {}
    problems: list[str] = []
    asked = (options.caption_column or "").lower().lstrip(".")
    for suffix, member in sample.members:
        is_picture = is_image_suffix(suffix)
        if not is_picture and not is_caption_suffix(suffix) and suffix != asked:
            continue
        name = printable(member.name)
        if member.kind not in REGULAR:
            problems.append(f"{name} is a link or device; only regular files are read")
        elif is_picture:
            pictures.append(("." in suffix, name, member))
        elif member.size > MAX_SIDECAR:
            problems.append(f"{name} has more than {MAX_SIDECAR} bytes")
        elif suffix not in parts:
            parts[suffix] = os.pread(fd, member.size, member.offset)
    if not pictures and not parts and not problems:
        return None
    key = f"{prefix}/{printable(sample.name)}"
    found = Sidecars([], None, ())
    try:
        found = captions_of(parts, options)
    except UnreadableSidecar as error:
        problems.append(str(error))
    _, image, picture = min(pictures, key=lambda some: some[0]) if pictures else (False, "", None)
    if picture is None:
        problems.append(NO_IMAGE)
    source = FileSlice(str(path), picture.offset, picture.size) if picture and not problems else None
    left_out = ("hidden members",) * sample.hidden + ("further pictures of a sample",) * (len(pictures) - 1)
    return Record(
        key,
        image or printable(sample.name),
        source,
        tuple(found.captions),
        split_of(key, found.split or split, options),
        "".join(problems[:1]),
        left_out,
        "" if found.captions else found.lacking({f".{suffix}" for suffix, _ in sample.members}),
    )
