"""The manifest of an index. Standard library and msgspec only."""

from typing import Annotated, Literal, TypedDict

from msgspec import Meta

from ...pipeline.artifacts import Count, FileEntry, Kind, Sha256, Size

ROWS, STARTS = "rows.bin", "rows.starts"  # see rows.py
ENCODER_TEXT = "encoder_text.json"  # describes the encoder's text model for queries, where NumPy computes the same
SPACES = {  # scorer -> the files of its vectors, of images and of texts
    "itc": ("images.faiss", "texts.faiss"),  # a run's space
    "clip": ("encoder_images.faiss", "encoder_texts.faiss"),  # the encoder's own joint space
}


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
    vectors: Count  # of the images in the run's space, or in the encoder's if there is no run
    texts: Count
    spaces: Annotated[dict[Literal["itc", "clip"], Size], Meta(min_length=1)]  # vectors an image in each space
    bytes: Count
    files: list[FileEntry]
    run: BuiltFromRun | None
    features: BuiltFromFeatures


INDEX = Kind(
    "index",
    "qf index",
    IndexManifest,
    (
        "rows.*",
        ENCODER_TEXT,
        *(name for names in SPACES.values() for name in names),
    ),  # rows.arrow is of earlier versions
)
