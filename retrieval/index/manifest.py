"""The manifest of an index. Standard library only."""

from ...pipeline.artifacts import Kind

INDEX = Kind(
    "index",
    "qf index",
    {
        **dict.fromkeys(("run", "features"), dict),
        **dict.fromkeys(("images", "vectors", "texts", "per_image"), int),
        "files": list,
    },
)
