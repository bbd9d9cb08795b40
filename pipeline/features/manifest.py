"""The manifest of a features folder. Standard library and msgspec only."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from ..artifacts import PLAN, Count, FileEntry, Kind, Sha256, Size, read_manifest, without
from ..files import sha256_json

REJECTS = "rejects.jsonl"
TEXTS = "texts-"  # begins the names of the files with embeddings of captions


class EncoderIdentity(TypedDict):
    """The properties of the frozen encoder that decide the features (`encoders/identity.py`)."""

    id: str
    sha256: Sha256
    layer: Annotated[int, Meta(ge=-10_000, le=10_000)]
    precision: Literal["float32", "bfloat16", "float16"]
    tokens: Size  # T
    width: Size  # W
    joint: Size | None  # P
    preprocessing: dict[str, Any]


class Source(TypedDict):
    """The dataset that the features were made of."""

    path: str
    kind: str
    records: Count
    sha256: Sha256


class Augmentation(TypedDict):
    """How augmented views were drawn."""

    flip: bool
    seed: int


class Planned(TypedDict):
    """The plan of an extraction. Shards of different plans are never mixed."""

    encoder: EncoderIdentity
    codec: Literal["float32", "float16", "int8", "int4"]
    format: Literal["arrow", "webdataset"]
    views: Annotated[int, Meta(ge=0, le=10_000)]
    augmentation: Augmentation | None
    source: Source
    shard_size: Size


class ShardEntry(FileEntry):
    """A shard, as the manifest lists it."""

    file: Annotated[str, Meta(pattern=r"^shard-\d{5,}\.(arrow|tar)$")]
    records: Count


class Splits(TypedDict):
    """Records of each split."""

    train: Count
    val: Count
    test: Count


class FeaturesManifest(Planned):
    """A finished features folder."""

    records: Count
    captions: Count
    questions: NotRequired[Count]  # where the shards have a column of them
    conversations: NotRequired[Count]
    splits: Splits
    rejected: Count
    shards: list[ShardEntry]
    files: list[FileEntry]


FEATURES = Kind(
    "features", "qf extract SOURCE", FeaturesManifest, ("shard-*.*", f"{TEXTS}*.safetensors", REJECTS, PLAN)
)


class FeaturesFolder:
    """A finished features folder as far as its manifest describes it; `reader.Features` opens the shards as well."""

    def __init__(self, folder: Path) -> None:
        """ArtifactError if the folder is unfinished, or if its manifest is damaged."""
        self.folder, self.manifest = folder, read_manifest(folder, FEATURES)

    @property
    def encoder(self) -> dict[str, Any]:
        """The identity of the encoder that made the features."""
        encoder: dict[str, Any] = self.manifest["encoder"]
        return encoder

    @property
    def identity(self) -> str:
        """As that of `Features`."""
        return identity_of(self.manifest)


def identity_of(manifest: dict[str, Any]) -> str:
    """A hash that differs for other features. The place of their encoder does not change it."""
    encoder = without(manifest["encoder"], "id")
    return sha256_json({"encoder": encoder, "codec": manifest["codec"], "shards": manifest["shards"]})
