"""The manifest of an index. Standard library and msgspec only."""

from typing import Literal, TypedDict

from ...pipeline.artifacts import Count, FileEntry, Kind, Sha256, Size

IMAGES, TEXTS, ROWS = "images.faiss", "texts.faiss", "rows.arrow"


class BuiltFromRun(TypedDict):
    """The run whose model embedded images and texts; `path` is relative to the index."""

    path: str
    sha256: Sha256


class BuiltFromFeatures(TypedDict):
    """The features that were indexed; `path` is relative to the index."""

    path: str
    identity: Sha256


class IndexManifest(TypedDict):
    """A finished index."""

    type: Literal["flat"]
    images: Count
    vectors: Count
    texts: Count
    per_image: Size
    bytes: Count
    files: list[FileEntry]
    run: BuiltFromRun
    features: BuiltFromFeatures


INDEX = Kind("index", "qf index", IndexManifest, (IMAGES, TEXTS, ROWS))
