"""Which members of a tar are one sample: those that follow each other and share a name up to the first dot; or up to the
last dot, where names such as `v1.05.jpg` hold dots themselves.

Memory: the members of one sample, at most MAX_MEMBERS."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..tar_format import Member
from .records import IMAGE_SUFFIXES
from .sidecars import is_caption_suffix

MAX_MEMBERS = 1000  # that share a name up to the first dot; more of them are told apart by the last dot
Suffixed = tuple[str, Member]  # the name after the first dot, in lower case


@dataclass(frozen=True)
class Sample:
    """A sample's name, its members by their suffixes, and how many hidden members stand among them."""

    name: str
    members: list[Suffixed]
    hidden: int = 0


def samples(members: Iterable[Member]) -> Iterator[Sample]:
    """The samples of a tar, in order. Members whose names begin with a dot are hidden; folders do not count."""
    name, group, hidden = "", list[Suffixed](), 0
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if member.kind == b"5":
            continue
        if not stem:
            hidden += 1
            continue
        if folder + slash + stem != name or len(group) == MAX_MEMBERS:
            last = _last_run(group) if folder + slash + stem == name else 0
            yield from _told_apart(name, group[: len(group) - last], hidden)
            hidden = 0 if group else hidden
            name, group = folder + slash + stem, group[len(group) - last :]
        group.append((suffix.lower(), member))
    yield from _told_apart(name, group, hidden)


def is_image_suffix(suffix: str) -> bool:
    """Whether a suffix, perhaps with dots in it, is that of a picture."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _last_run(group: list[Suffixed]) -> int:
    """How many members at the end share their names up to the last dot; 0 if all do."""
    stems = [_divided(suffix)[0] for suffix, _ in group]
    run = next((at for at, stem in enumerate(reversed(stems)) if stem != stems[-1]), len(stems))
    return run if run < len(stems) else 0


def _divided(suffix: str) -> tuple[str, str]:
    """What stands before the last dot, and what after it; of captions such as `00.captions.json`, two parts stay together."""
    start, _, last = suffix.rpartition(".")
    start, _, name = start.rpartition(".")
    if is_caption_suffix(f"{name}.{last}"):
        return start, f"{name}.{last}"
    return suffix.rpartition(".")[0], last


def _told_apart(name: str, group: list[Suffixed], hidden: int) -> Iterator[Sample]:
    """The members that share a name up to the first dot, as one sample or as several."""
    if not group:
        return
    stems: dict[str, list[Suffixed]] = {}
    for suffix, member in group:
        stem, last = _divided(suffix)
        stems.setdefault(stem, []).append((last, member))
    pictured = {stem for stem, some in stems.items() if any(is_image_suffix(suffix) for suffix, _ in some)}
    captioned = {stem for stem, some in stems.items() if any(is_caption_suffix(suffix) for suffix, _ in some)}
    complete = pictured & captioned
    if "" in complete or (not complete and ("" in pictured | captioned or len(pictured) < 2)):
        yield Sample(name, group, hidden)
        return
    for stem, some in stems.items():
        at = len(name) + bool(stem) + len(stem)
        yield Sample(some[0][1].name[:at], some, hidden)
        hidden = 0
