"""The columns of a table: which of them are used. The used columns of any table become the same few, `ROWS`."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config import ReadOptions
from ..errors import DatasetError
from ..formatting import encodable
from ..schema import OPTIONAL_COLUMNS, TYPES
from .captions import CAPTION_NAMES, cell_captions, spells_lists
from .embedded import picture_in
from .names import plain
from .questions import (
    ANSWER_NAMES,
    CONVERSATION_NAMES,
    QUESTION_NAMES,
    TYPE_NAMES,
    answers_in,
    conversations_in,
    questions_in,
)
from .spool import PictureSpool

IMAGE_COLUMNS = (
    "image", "image_path", "file_name", "filename", "filepath", "file_path", "path", "file", "img", "image_name",
    "image_file", "image_filename", "img_path", "photo", "picture", "jpg", "jpeg", "png", "webp", "url", "image_url",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
KEY_COLUMNS = ("key", "__key__")
IMAGE_IDS = ("image_id", "imageid", "img_id")  # where rows are joined to images by an id
TEXT_NAMES = (*CAPTION_NAMES, *QUESTION_NAMES, *ANSWER_NAMES, *CONVERSATION_NAMES)
USUAL = frozenset((*IMAGE_COLUMNS, *TEXT_NAMES, *SPLIT_COLUMNS, *KEY_COLUMNS))
ROWS = pa.schema(
    [
        *((name, TYPES[name]) for name in ("image", "captions", "split", "key")),  # no image: null
        ("file", pa.int32()),  # which of the table's files holds the picture; null: none
        ("group", pa.int32()),  # where it is there: row group and row, or size and byte
        ("at", pa.int64()),
        ("problem", pa.string()),  # why the row has no captions, or fewer
        *((name, TYPES[name]) for name in OPTIONAL_COLUMNS),
    ]
)

URLS = ("http://", "https://")


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that are used, by their names."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    key: str | None
    header: bool = True  # whether the table has a line of names; otherwise they are numbers from 1 on
    lists: frozenset[str] = frozenset()  # columns of captions or answers whose cells spell lists, as text
    question: str | None = None
    answer: str | None = None  # None with a question: its cells hold the answers, too
    type: str | None = None  # of the question
    conversation: str | None = None

    @classmethod
    def choose(
        cls, names: Sequence[str], options: ReadOptions, path: Path, first: Sequence[Any] = ()
    ) -> "TableColumns":
        """The columns that the options name, or else the first usual name that is there, in upper or lower case.

        The captions may stand in numbered columns (`caption_0`, `caption_1` …), or in none where there are questions or
        conversations, or where images without a caption are kept. DatasetError if a column is missing; the `first` rows help
        to say why."""
        if options.joined:
            return cls._choose_asked(names, options, path)
        image = _pick(names, options.image_column, IMAGE_COLUMNS, "--image-column", path)
        caption = _pick(names, options.caption_column, CAPTION_NAMES, "--caption-column", path)
        captions = (caption,) if caption is not None else tuple(filter(_NUMBERED, names))
        texts, unanswered = _other_texts(names, options, path)
        other_text = bool(texts or options.questions) and not options.captioned
        has_text = bool(captions) or other_text or options.allow_uncaptioned
        for what, found in (("image", image is not None), ("caption", has_text)):
            if not found:
                if any(is_url(cell) for row in first[:100] if isinstance(row, dict) for cell in row.values()):
                    raise urls_inside(path)
                more = ", or keep its images without captions: --allow-uncaptioned" if what == "caption" else ""
                more += unanswered if what == "caption" else ""
                raise DatasetError(
                    f"{path} has no {what} column (it has {_list(names)}); name it with --{what}-column{more}"
                )
        assert image is not None
        split = _pick(names, options.split_column, SPLIT_COLUMNS, "--split-column", path)
        key = _pick(names, options.key_column, KEY_COLUMNS, "--key-column", path)
        return cls(image, captions, split, key, **texts)

    @classmethod
    def _choose_asked(cls, names: Sequence[str], options: ReadOptions, path: Path) -> "TableColumns":
        """The columns of a table of questions or conversations about the images of another source, which names or ids tell.
        DatasetError if a column is missing."""
        wanted = options.image_column if options.image_column in names else None
        image = _pick(names, wanted, (*IMAGE_COLUMNS, *IMAGE_IDS), "--image-column", path)
        texts, unanswered = _other_texts(names, options, path)
        for what, found in (("image", image is not None), ("question", bool(texts))):
            if not found:
                more = unanswered if what == "question" else ""
                raise DatasetError(
                    f"{path} has no {what} column (it has {_list(names)}); name it with --{what}-column{more}"
                )
        assert image is not None
        return cls(image, (), None, None, **texts)

    def looking_at(self, rows: Iterable[Any]) -> "TableColumns":
        """The same columns, with `lists` as the first rows of the table show them."""
        some = [row for row in rows if isinstance(row, dict)]
        lists = {name for name in self.captions if spells_lists([row.get(name) for row in some])}
        if self.answer is not None and spells_lists([row.get(self.answer) for row in some], answers_in):
            lists.add(self.answer)
        return replace(self, lists=frozenset(lists))

    @property
    def used(self) -> list[str]:
        """The names of all used columns, each once."""
        texts = (*self.captions, self.question, self.answer, self.type, self.conversation)
        every = (self.image, *texts, self.split, self.key)
        return list(dict.fromkeys(name for name in every if name is not None))

    def __str__(self) -> str:
        captions = ", ".join(map(repr, self.captions))
        noun = {0: "no caption column", 1: "caption column "}.get(len(self.captions), "caption columns ")
        split = f"split column {self.split!r}" if self.split is not None else "no split column"
        key = f", key column {self.key!r}" if self.key is not None else ""
        lists = " (lists)" if self.lists.intersection(self.captions) else ""
        for noun_, name in (("question", self.question), ("answer", self.answer), ("conversation", self.conversation)):
            lists += f", {noun_} column {name!r}" if name is not None else ""
        header = "" if self.header else "no line of column names, "
        return f"{header}image column {self.image!r}, {noun}{captions}{lists}, {split}{key}"

    def batch(
        self,
        rows: Sequence[dict[str, Any]],
        path: Path,
        pictures: PictureSpool | None = None,
        **more: Sequence[Any],
    ) -> pa.RecordBatch:
        """Rows as objects -> a batch with the columns ROWS. Pictures in cells of text go to `pictures`. `more` gives
        columns that the rows do not hold."""
        values: dict[str, Sequence[Any]] = {name: [None] * len(rows) for name in ROWS.names}
        try:
            images = [picture_in(row.get(self.image)) if pictures else (None, row.get(self.image)) for row in rows]
            values["image"] = [image_name(name) or (data and f"{path.name}#{_sha(data)}") for data, name in images]
            if pictures and any(data for data, _ in images):
                values["file"] = [data and 0 for data, _ in images]
                values["group"] = [data and len(data) for data, _ in images]
                values["at"] = [data and pictures.add(data) for data, _ in images]
            found = [[cell_captions(row.get(name), name in self.lists) for name in self.captions] for row in rows]
            values["captions"] = [[text for captions, _ in cells for text in captions] for cells in found]
            values["problem"] = [next((problem for _, problem in cells if problem), None) for cells in found]
            if self.question is not None:
                values["questions"] = [self._questions(row) for row in rows]
            if self.conversation is not None:
                values["conversations"] = [conversations_in(row.get(self.conversation)) for row in rows]
            if self.split is not None:
                values["split"] = [_text(row.get(self.split)) for row in rows]
            if self.key is not None:
                values["key"] = [_text(row.get(self.key)) for row in rows]
        except RecursionError as error:
            raise DatasetError(f"{path}: a text is nested too deep") from error
        except AttributeError as error:
            wrong = next(row for row in rows if not isinstance(row, dict))
            raise DatasetError(f"{path}: expected rows with named values, found {str(wrong)[:40]!r}") from error
        return pa.RecordBatch.from_pydict({**values, **more}, schema=ROWS)

    def _questions(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        question, answer, type = (
            row.get(name) if name is not None else None for name in (self.question, self.answer, self.type)
        )
        return [one.to_row() for one in questions_in(question, answer, type, self.answer in self.lists)]


def _other_texts(names: Sequence[str], options: ReadOptions, path: Path) -> tuple[dict[str, Any], str]:
    """The columns of questions, answers, types and conversations, by the names of their fields; and a hint, where questions
    are there and no answers are."""
    question = _pick(names, options.question_column, QUESTION_NAMES, "--question-column", path)
    answer = _pick(names, options.answer_column, ANSWER_NAMES, "--answer-column", path)
    type = _pick(names, options.type_column, TYPE_NAMES, "--type-column", path)
    conversation = _pick(names, options.conversation_column, CONVERSATION_NAMES, "--conversation-column", path)
    if options.answer_column is not None and question is None:
        raise DatasetError(f"{path} has no question column (it has {_list(names)}); name it with --question-column")
    hint = ""
    if question is not None and answer is None and question.strip().lower() not in QUESTION_NAMES[1:]:
        hint = f"; its column {question!r} has no answers beside it: name theirs with --answer-column"
        if options.question_column is not None:
            raise DatasetError(f"{path} has no answer column (it has {_list(names)}); name it with --answer-column")
        question = None
    texts: dict[str, Any] = {"question": question, "answer": answer, "type": type} if question is not None else {}
    texts |= {"conversation": conversation} if conversation is not None else {}
    return texts, hint


_NUMBERED = re.compile(r"(caption|sentence|text|comment)[ _-]?\d+", re.IGNORECASE).fullmatch


def _pick(names: Sequence[str], wanted: str | None, usual: Iterable[str], option: str, path: Path) -> str | None:
    if wanted is None:
        by_name = {name.strip().lower(): name for name in reversed(names)}
        wanted = next((by_name[name] for name in usual if name in by_name), None)
    elif wanted not in names:
        raise DatasetError(f"{path} has no column {wanted!r} (it has {_list(names)}); check {option}")
    if wanted is not None and list(names).count(wanted) > 1:
        raise DatasetError(f"{path} has two columns named {wanted!r}; rename one of them")
    return wanted


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def image_name(value: Any) -> str | None:
    """The name in a path, or in a Hugging Face struct with a path, without `./` and doubled slashes; None if it is blank."""
    name = (_text(value.get("path") if isinstance(value, dict) else value) or "").strip()
    return plain(name) or None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_url(value: Any) -> bool:
    """Whether a value is a URL, in any case of its letters."""
    return isinstance(value, str) and value.lstrip()[:8].lower().startswith(URLS)


def urls_inside(path: Path) -> DatasetError:
    return DatasetError(f"{path} holds image URLs, which qf does not download; fetch them with img2dataset first")


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, bytes) else encodable(str(value))
