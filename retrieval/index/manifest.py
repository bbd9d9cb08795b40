"""The manifest of an index. Standard library and msgspec only."""

from typing import Annotated, Literal, TypedDict

from msgspec import Meta

from ...pipeline.artifacts import Count, FileEntry, Kind, Sha256

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


class SpaceForm(TypedDict):
    """How the vectors of a space are stored: see compact.py."""

    type: Literal["flat", "fp16", "sq8"]
    slots: Annotated[list[Count], Meta(min_length=1)]  # query slots of an image that are kept
    recall: Annotated[float, Meta(ge=0, le=1)] | None
    why: str


class IndexManifest(TypedDict):
    """A finished index."""

    type: Literal["flat", "fp16", "sq8"]  # of the run's space, or of the encoder's if there is no run
    images: Count
    vectors: Count  # of the images in the run's space, or in the encoder's if there is no run
    texts: Count
    spaces: Annotated[dict[Literal["itc", "clip"], SpaceForm], Meta(min_length=1)]
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
    overwrites=False,
)
