"""The manifest of a run. Standard library only."""

from ..pipeline.artifacts import Kind

RUN = Kind(
    "run",
    "qf train",
    {**dict.fromkeys(("model", "train", "encoder", "features", "best"), dict), "sha256": str, "files": list},
)
