"""The manifest of a features folder. Standard library only."""

from ..artifacts import Kind

FEATURES = Kind(
    "features",
    "qf extract SOURCE",
    {
        **dict.fromkeys(("encoder", "source", "splits"), dict),
        **dict.fromkeys(("codec", "format"), str),
        **dict.fromkeys(("views", "records", "captions", "rejected"), int),
        "shards": list,
    },
)
