"""WebDataset tars, as img2dataset writes them: members that follow each other and share a name up to the first dot are a
sample (`000000012.jpg`, `000000012.txt`, `000000012.json`).

Only headers and texts are read here: an image is left at its place, so that reading can start anywhere. The few parts of
the tar format that matter are read by hand (POSIX.1-2001 pax, "ustar" and GNU long names): ten million samples are thirty
million members, and the error for a truncated or damaged tar must say where. Memory: one sample's names and texts."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import counted, printable
from ..tar_format import REGULAR, DamagedTar, Member, tar_members
from .folders import MAX_SIDECAR, json_captions, text_captions
from .records import IMAGE_SUFFIXES, Record, split_of, splits_in_names
from .sources import FileSlice, ImageSource

COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


@dataclass(slots=True)
class _Sample:
    name: str
    image: str = ""
    image_suffix: str = ""
    source: ImageSource | None = None
    json: bytes | None = None
    text: bytes | None = None
    problems: list[str] = field(default_factory=list)


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
        sample: _Sample | None = None
        members = tar_members(file.fileno())
        damage = ""
        while True:
            try:
                member = next(members, None)
            except DamagedTar as error:
                member, damage = None, str(error)
            if member is None:
                break
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or member.kind == b"5":  # a folder, or a file that hides
                continue
            if sample is not None and sample.name != folder + slash + stem:
                yield _record(sample, prefix, split, options)
                sample = None
            sample = sample or _Sample(folder + slash + stem)
            _add(sample, member, suffix.lower(), path, file.fileno())
        if sample is not None:
            yield _record(sample, prefix, split, options)
    if damage:
        key = f"{prefix}#end"
        yield Record(key, path.name, None, (), split_of(key, split, options), f"{path.name}: {damage}")


def _add(sample: _Sample, member: Member, suffix: str, path: Path, fd: int) -> None:
    """Add the member to its sample: as the image, if it is the first one (`a.jpg` before `a.depth.png`), or as a caption."""
    last = suffix.rpartition(".")[2]
    if last not in IMAGE_SUFFIXES and suffix not in ("json", "txt"):
        return
    name = printable(member.name)
    if member.kind not in REGULAR:
        sample.problems.append(f"{name} is a link or device; only regular files are read")
    elif last in IMAGE_SUFFIXES:
        if sample.source is None or ("." in sample.image_suffix and suffix == last):
            sample.image, sample.image_suffix = name, suffix
            sample.source = FileSlice(str(path), member.offset, member.size)
    elif member.size > MAX_SIDECAR:
        sample.problems.append(f"{name} has more than {MAX_SIDECAR} bytes")
    elif suffix == "json":
        sample.json = os.pread(fd, member.size, member.offset)
    else:
        sample.text = os.pread(fd, member.size, member.offset)


def _record(sample: _Sample, prefix: str, split: str | None, options: ReadOptions) -> Record:
    key = f"{prefix}/{printable(sample.name)}"
    captions: list[str] = []
    problems = sample.problems
    try:  # the JSON first: a text in it may hold newlines
        if sample.json is not None:
            captions, named = json_captions(sample.json, options)
            split = named or split
        captions = captions or (text_captions(sample.text) if sample.text is not None else [])
    except (ValueError, RecursionError) as error:
        problems = [*problems, f"its caption cannot be read: {error}"]
    if sample.source is None:
        problems = [*problems, "no image in the sample"]
    elif not captions:
        problems = [*problems, "no caption"]
    image = sample.image or printable(sample.name)
    return Record(
        key,
        image,
        None if problems else sample.source,
        tuple(captions),
        split_of(key, split, options),
        "".join(problems[:1]),
    )
