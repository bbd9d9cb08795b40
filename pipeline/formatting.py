"""Numbers, names and texts for people. Texts from elsewhere reach a terminal through `plain` and `plain_lines` alone."""

import re

MESSAGE, PART = 2000, 200  # characters of a message, and of a name or a caption within a line
# the escape sequences of terminals: colours and cursors, titles and links, and the short ones
ESCAPES = re.compile(r"(\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[]PX^_][^\x07\x1b]*(\x07|\x1b\\)|\x1b[ -/]*[0-~]")
# control characters, marks that are invisible or turn the direction of writing, and halves of surrogate pairs
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


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


def texts_held(captions: int, questions: int = 0, conversations: int = 0) -> str:
    """How many texts images have: 5 captions, 3 questions."""
    counts = {"caption": captions, "question": questions, "conversation": conversations}
    return ", ".join(counted(count, what) for what, count in counts.items() if count) or "no captions"


def encodable(text: str) -> str:
    """The text with half surrogate pairs, which JSON can write and UTF-8 cannot, replaced by question marks."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def printable(name: str) -> str:
    """A file name as text, its bytes that are not UTF-8 written as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def plain(text: str, limit: int = MESSAGE) -> str:
    """The text as one line of at most `limit` characters that a terminal prints and does not obey.

    Escape sequences are removed, other control characters are written as escapes, and white space is one blank. A longer text
    loses its middle."""
    line = UNPRINTABLE.sub(_escaped, " ".join(ESCAPES.sub("", text).split()))
    if len(line) <= limit:
        return line
    tail = limit // 3
    return f"{line[: limit - tail - 1]}…{line[len(line) - tail :]}"


def plain_lines(text: str) -> str:
    """The text, its lines and blanks kept, without anything that a terminal obeys."""
    return "\n".join(UNPRINTABLE.sub(_escaped, ESCAPES.sub("", line)) for line in text.split("\n"))


def _escaped(character: re.Match[str]) -> str:
    """A character as an escape. Half a surrogate pair that stands for a byte of a file name is written as that byte."""
    code = ord(character[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character[0].encode("unicode_escape").decode()
