"""The columns of a record, declared once: shards of both formats, the reader, the catalogue and the index derive theirs.

A new column takes a line here, and the reader of the dataset that fills it."""

from dataclasses import dataclass

import pyarrow as pa

SPLITS = ("train", "val", "test")


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
RECORD_COLUMNS = tuple(column.name for column in RECORD)
JSON_COLUMNS = tuple(column.name for column in RECORD if column.in_json)
INDEX_COLUMNS = tuple(column.name for column in RECORD if column.in_index)
TYPES = {column.name: column.type for column in RECORD}

VIEW = "view_"  # begins the name of a codec's column for augmented views
VIEWS = Column(  # how each view of a record was cut out, in pixels of the upright original
    "views",
    pa.list_(pa.struct([*((name, pa.int32()) for name in ("left", "top", "right", "bottom")), ("flip", pa.bool_())])),
)
