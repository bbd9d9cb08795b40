"""What is served: an opened index, its pictures, and the pictures that people uploaded."""

import io
import logging
import os
import secrets
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...pipeline.artifacts import MANIFEST
from ...pipeline.config import ComputeOptions
from ...pipeline.encoders.picture import Picture, same_encoder, seen_by
from ...pipeline.errors import QfError, UsageError
from ...pipeline.images import IMAGE_FORMATS, UnreadableImage, load_image, thumbnail
from ...pipeline.workspace import Workspace
from ..compose import Name, Term, parse
from ..searcher import Hit, Searcher, open_searcher

if TYPE_CHECKING:
    from ...pipeline.encoders.identity import FrozenEncoder

log = logging.getLogger(__name__)
LIBRARY = __name__.rpartition(".serve")[0]  # whose warnings about a query its asker sees
UPLOAD = "upload:"  # begins the name of an uploaded picture
KEPT_UPLOADS = 256
KEPT_PICTURES = 128
LARGE = 1280  # pixels of the longer side
SAME_PICTURE = 6.0  # of 255: mean difference between a thumbnail and one made anew by another version of Pillow
RERANKED = 48  # candidates, at least


class Listener(logging.Handler):
    """Collects the warnings of the thread that made it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.heard.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger(LIBRARY).addHandler(self)
        return self.heard

    def __exit__(self, *error: object) -> None:
        logging.getLogger(LIBRARY).removeHandler(self)


class Gone(QfError):
    """An uploaded picture that the server does not keep any more."""


@dataclass(frozen=True)
class Upload:
    """An uploaded picture, as the encoder sees it."""

    picture: Picture
    thumbnail: bytes


@dataclass(frozen=True)
class Asked:
    """A question. Pictures among the terms are keys of the index or uploads, never files."""

    q: str = ""
    plus: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    k: int = 48
    rerank: bool = False
    split: str = ""
    scorer: str = "mix"

    @property
    def is_empty(self) -> bool:
        return not (self.q.strip() or self.plus or self.minus)


class Cache:
    """The values that were used last, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit, self._kept, self._lock = limit, OrderedDict[Any, Any](), threading.Lock()

    def get(self, key: Any) -> Any | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)


@dataclass
class Opened:
    """One build of an index."""

    searcher: Searcher
    version: str  # differs for another build
    max_pixels: int
    large: Cache = field(default_factory=lambda: Cache(KEPT_PICTURES))

    def __len__(self) -> int:
        return len(self.searcher.index)

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """Which images (N,) are in each split."""
        column = np.array(self.searcher.index.rows.column("split"))
        return {str(name): column == name for name in sorted(set(column.tolist()))}

    @cached_property
    def matches(self) -> bool:
        """Whether the run can re-rank and explain."""
        return self.searcher.run is not None and self.searcher.run.matches

    @cached_property
    def encoder(self) -> "FrozenEncoder":
        """EncoderError if the encoder has changed."""
        return same_encoder(self.searcher.features.encoder, self.searcher.device)

    def warm_up(self) -> None:
        """Load what a search for a text needs."""
        _ = self.splits, self.matches, self.searcher.row("")
        rows = self.searcher.index.rows
        try:
            self.searcher.text(rows.texts(np.zeros(1, int))[0] if rows.captions else "a", 1)
        except QfError as error:
            log.warning("a search for a text will fail: %s", error)

    # ---- search ----

    def find(self, asked: Asked, uploads: "Uploads") -> list[Hit]:
        """The hits of a question. UsageError if it is none; Gone if it names an upload that is not kept."""
        if asked.is_empty:
            raise UsageError("the query is empty; say what to look for")
        if asked.split and asked.split not in self.splits:
            raise UsageError(f"there is no split {asked.split!r}; there are {', '.join(self.splits)}")
        terms = [self.resolved(term, uploads) for term in parse(asked.q, asked.plus, asked.minus)]
        keep = self.splits[asked.split] if asked.split else None
        rerank = max(asked.k, RERANKED) if asked.rerank else 0
        return self.searcher.composed(terms, asked.k, rerank, asked.scorer, keep)

    def resolved(self, term: Term, uploads: "Uploads") -> Term:
        """The term with the picture that it names, if it names one."""
        if not isinstance(term.value, Name):
            return term
        if term.value.startswith(UPLOAD):
            return Term(uploads.get(term.value).picture, term.weight)
        row = self.searcher.row(term.value)
        return Term(str(term.value) if row is None else row, term.weight)

    def row(self, row: int) -> dict[str, Any]:
        """The row of an image. IndexError if there is none."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.searcher.index.rows_of(np.array([row]))[0]

    def first_rows(self, count: int) -> list[int]:
        """Some rows, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)).tolist()

    # ---- pictures ----

    def picture(self, row: int) -> bytes:
        """An image of the index as a JPEG of at most LARGE pixels a side. The thumbnail if its file is not there any more, or
        shows something else."""
        if (kept := self.large.get(row)) is None:
            known = self.row(row)
            kept = self._original(known["image"], known["thumbnail"]) or known["thumbnail"]
            self.large.put(row, kept)
        return kept

    def _original(self, name: str | None, known: bytes) -> bytes | None:
        """The picture of that name in the dataset's folder, if it is the one of which we know the thumbnail."""
        source = Path(self.searcher.features.manifest["source"]["path"])
        try:
            root = (source if source.is_dir() else source.parent).resolve(strict=True)
            file = (root / (name or "")).resolve(strict=True)
            if not file.is_relative_to(root) or not file.is_file():
                return None
            check_pixels(file, self.max_pixels)
            image = load_image(file)
        except (OSError, ValueError, UnreadableImage):
            return None
        if not _is_same(thumbnail(image), known):
            return None
        image.thumbnail((LARGE, LARGE))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=88)
        return data.getvalue()

    def seen(self, data: bytes) -> Upload:
        """An uploaded picture through the encoder. UnreadableImage if it is none, or too large; EncoderError."""
        check_pixels(io.BytesIO(data), self.max_pixels)
        image = load_image(data)
        return Upload(seen_by(image, self.encoder, "upload"), thumbnail(image))

    def explanation(self, row: int, text: str) -> bytes:
        """The drawing of `qf explain` for an image of the index and a text, a PNG. QfError if the run cannot."""
        from ..explain import cached_picture, explain
        from ..heatmaps import draw_explanation

        if not self.matches or self.searcher.run is None:
            raise QfError("there is no run that can explain; train one with itm")
        picture = cached_picture(self.searcher.features, self.row(row)["key"])
        with tempfile.TemporaryDirectory() as folder:
            draw_explanation(explain(self.searcher.run, picture, text), Path(folder) / "map.png")
            return (Path(folder) / "map.png").read_bytes()


def check_pixels(source: Path | io.BytesIO, limit: int) -> None:
    """UnreadableImage if the header says more pixels than the limit. Other faults are left to `load_image`."""
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"the picture has too many pixels, the limit is {limit:,}") from error
    except Exception:  # damaged bytes raise errors of any type; load_image names them
        return
    if width * height > limit:
        raise UnreadableImage(f"the picture has {width:,} x {height:,} pixels, the limit is {limit:,}")


def _is_same(one: bytes, other: bytes) -> bool:
    """Whether two thumbnails show the same."""
    a, b = (np.asarray(load_image(data), np.float32) for data in (one, other))
    return a.shape == b.shape and float(np.abs(a - b).mean()) < SAME_PICTURE


class Uploads:
    """The pictures that were uploaded last, under names that cannot be guessed."""

    def __init__(self) -> None:
        self._kept = Cache(KEPT_UPLOADS)

    def add(self, upload: Upload) -> str:
        """Keep an upload; returns its name."""
        name = UPLOAD + secrets.token_urlsafe(12)
        self._kept.put(name, upload)
        return name

    def get(self, name: str) -> Upload:
        """Gone if it is not kept any more."""
        upload: Upload | None = self._kept.get(str(name))
        if upload is None:
            raise Gone("the uploaded picture is not kept any more; upload it again")
        return upload


class Collection:
    """The index of a workspace, opened anew when it was rebuilt."""

    def __init__(self, workspace: Workspace, on: ComputeOptions, max_pixels: int) -> None:
        """Errors as of `open_searcher`."""
        self.workspace, self.on, self.max_pixels = workspace, on, max_pixels
        self.uploads = Uploads()
        self._problem = ""
        self._signature = self._stat()
        self.opened = self._open()

    def _stat(self) -> tuple[int, ...] | None:
        """What changes when the index is rebuilt. None without an index."""
        try:
            stat = os.stat(self.workspace.index / MANIFEST)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _open(self) -> Opened:
        searcher = open_searcher(self.workspace, self.on)
        opened = Opened(searcher, secrets.token_hex(6), self.max_pixels)
        opened.warm_up()
        return opened

    def refresh(self) -> bool:
        """Take up an index that was rebuilt. The old one stays if the new one cannot be opened. Returns whether it did."""
        signature = self._stat()
        if signature is None or signature == self._signature:
            return False
        try:
            opened = self._open()
        except (QfError, OSError) as error:
            if str(error) != self._problem:
                log.warning("the rebuilt index is not taken up yet: %s", error)
            self._problem = str(error)
            return False
        self.opened, self._signature, self._problem = opened, signature, ""
        return True
