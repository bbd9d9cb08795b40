"""The columns of a record, declared once: shards of both formats, the reader, the catalogue and the index derive theirs.

A new column takes a line here, and the reader of the dataset that fills it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture. `answers` are those that the data gives, equal ones of several people included; `type` is
    the kind of the question in the words of the data, such as count or yes/no."""

    question: str
    answers: tuple[str, ...]
    type: str | None = None

    def to_row(self) -> dict[str, Any]:
        """The value in a column of questions."""
        return {"question": self.question, "answers": list(self.answers), "type": self.type}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Question":
        """The question of a value in a column."""
        return cls(row["question"], tuple(row["answers"]), row["type"])


Conversation = tuple[str, ...]  # turns: the person's first, then the assistant's, and so on


@dataclass(frozen=True)
class Column:
    """A column of a shard, besides the encoder's features."""

    name: str
    type: pa.DataType
    nullable: bool = True
    in_json: bool = True  # whether a tar shard has it in the record's JSON; otherwise it is a member of its own
    in_index: bool = False  # whether the rows of an index have it

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable)


# in a shard, the encoder's features stand between the two
LEADING = (
    Column("key", pa.string(), nullable=False, in_index=True),
    Column("split", pa.string(), nullable=False, in_index=True),
    Column("image", pa.string(), in_index=True),  # where the picture came from
    Column("captions", pa.list_(pa.string()), in_index=True),
)
TRAILING = (
    Column("thumbnail", pa.binary(), in_json=False, in_index=True),  # a small JPEG
    Column("width", pa.int32()),  # of the original
    Column("height", pa.int32()),
)
RECORD = (*LEADING, *TRAILING)
OPTIONAL = (  # a shard has such a column only if the dataset has any of these texts
    Column(
        "questions",
        pa.list_(pa.struct([("question", pa.string()), ("answers", pa.list_(pa.string())), ("type", pa.string())])),
    ),
    Column("conversations", pa.list_(pa.list_(pa.string()))),
)
RECORD_COLUMNS = tuple(column.name for column in RECORD)
JSON_COLUMNS = tuple(column.name for column in RECORD if column.in_json)
INDEX_COLUMNS = tuple(column.name for column in RECORD if column.in_index)
OPTIONAL_COLUMNS = tuple(column.name for column in OPTIONAL)
TYPES = {column.name: column.type for column in (*RECORD, *OPTIONAL)}

VIEW = "view_"  # begins the name of a codec's column for augmented views
VIEWS = Column(  # how each view of a record was cut out, in pixels of the upright original
    "views",
    pa.list_(pa.struct([*((name, pa.int32()) for name in ("left", "top", "right", "bottom")), ("flip", pa.bool_())])),
)


def optional_columns(names: Collection[str]) -> tuple[Column, ...]:
    """The optional columns among some names."""
    return tuple(column for column in OPTIONAL if column.name in names)
