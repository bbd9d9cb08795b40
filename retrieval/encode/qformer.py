"""A trained run, opened for answering: its model on a device, and the features that belong to it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...pipeline.artifacts import MANIFEST, read_manifest
from ...pipeline.device import resolve_precision
from ...pipeline.errors import ArtifactError
from ...pipeline.features.reader import Features
from ...trainer.manifest import RUN
from ...trainer.qformer import QFormer
from ...trainer.stage1.embedder import Embedder
from ...trainer.tokens import Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run and its embedder."""

    folder: Path
    manifest: dict[str, Any]
    embedder: Embedder


def open_run(folder: Path, device: torch.device, precision: str) -> Run:
    """The model of a run on a device, to compute in `precision` (see `resolve_precision`). ArtifactError if the run is unfinished or
    damaged."""
    manifest = read_manifest(folder, RUN)
    model = QFormer.from_pretrained(folder).to(device)
    tokens = Tokens.load(folder / "tokenizer.json")
    dtype = resolve_precision(precision, device)
    return Run(folder, manifest, Embedder(model, tokens, device, dtype, manifest["train"]["max_text_length"]))


def latest_run(runs: Path) -> Path | None:
    """The run that was finished last, or None. Damaged ones are passed over, and named in the log, which goes to stderr."""
    finished = {}
    for path in runs.glob(f"*/{MANIFEST}"):
        try:
            finished[path.parent] = str(read_manifest(path.parent, RUN).get("finished", ""))
        except ArtifactError as error:
            log.warning("%s", error)
    return max(finished, key=lambda run: finished[run], default=None)


def check_features(run: Run, features: Features) -> None:
    """ArtifactError unless the features come from the encoder that the run was trained on."""
    trained, given = run.manifest["encoder"], features.encoder
    for name in ("sha256", "layer", "preprocessing", "tokens", "width"):
        if trained[name] != given[name]:
            raise ArtifactError(
                f"run {run.folder} was trained on features of encoder {trained['id']} ({name} {_short(trained[name])}); those in "
                f"{features.folder} are of {given['id']} ({name} {_short(given[name])}); train on them with `qf train --name NAME`"
            )


def _short(value: Any) -> str:
    """A value for a message; of a checksum the beginning."""
    return value[:12] if isinstance(value, str) else str(value)
