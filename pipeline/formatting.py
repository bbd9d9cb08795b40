"""Numbers and names as text for people."""


def size(count: float) -> str:
    """Bytes in words: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, what: str) -> str:
    """A number in words: 1 step, 2,000 steps."""
    return f"{count:,} {what}" + "s" * (count != 1)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def by_split(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)


def encodable(text: str) -> str:
    """The text with half surrogate pairs, which JSON can write and UTF-8 cannot, replaced by question marks."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def printable(name: str) -> str:
    """A file name as text, its bytes that are not UTF-8 written as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
