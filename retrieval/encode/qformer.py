"""A trained run as a query encoder: Q query embeddings an image, one embedding a text, and matching."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipeline.artifacts import read_manifest
from ...pipeline.errors import ArtifactError, QfError
from ...trainer.manifest import RUN
from .query_encoder import warn_of_unknown_words

if TYPE_CHECKING:
    import torch

    from ...pipeline.encoders.picture import Picture
    from ...pipeline.features.reader import Features
    from ...trainer.stage1.embedder import Embedder

log = logging.getLogger(__name__)


class Run:
    """A finished run; see `QueryEncoder` for its methods. Its model is loaded when it is needed first."""

    name = "itc"

    def __init__(self, folder: Path, device: "torch.device", precision: str, stage: int = 1) -> None:
        """On a device, to compute in `precision` (see `resolve_precision`). ArtifactError if the run is unfinished or damaged;
        QfError if it is of another stage."""
        self.folder, self.device, self.precision = folder, device, precision
        self.manifest = read_manifest(folder, RUN)
        if self.manifest["stage"] != stage:
            raise QfError(
                f"run {folder} is of stage {self.manifest['stage']}, made for captions and answers; search needs one of stage 1"
            )

    @cached_property
    def embedder(self) -> "Embedder":
        """The model. ArtifactError if its weights are damaged."""
        from ...pipeline.device import resolve_precision
        from ...trainer.qformer import QFormer
        from ...trainer.stage1.embedder import Embedder
        from ...trainer.tokens import Tokens

        model = QFormer.from_pretrained(self.folder).to(self.device)
        tokens = Tokens.load(self.folder / "tokenizer.json")
        dtype = resolve_precision(self.precision, self.device)
        return Embedder(model, tokens, self.device, dtype, self.manifest["train"]["max_text_length"])

    @property
    def matches(self) -> bool:
        return bool(self.embedder.model.itm_head.bias.any())  # it is zero until the first step that trains the head

    @property
    def per_image(self) -> int:
        return int(self.manifest["model"]["num_query_tokens"])

    @property
    def width(self) -> int:
        return int(self.manifest["model"]["embed_dim"])

    def query(self, text: str) -> np.ndarray:
        self.warn_of_truncation(text)
        warn_of_unknown_words("model", *self.embedder.tokens.unknown(text))
        return self.texts([text])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.texts(texts).cpu().numpy()

    def captions(self, features: "Features") -> np.ndarray:
        return self.texts([caption for captions in features.captions for caption in captions])

    def picture(self, picture: "Picture") -> np.ndarray:
        return self.embedder.image(picture.tokens)[0].cpu().numpy()

    def images(self, features: "Features") -> Iterator[np.ndarray]:
        for batch in self.embedder.image_batches(features, features.rows()):  # a device may not have room for all
            yield batch.cpu().numpy()

    def scores(self, features: "Features", rows: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        from ...trainer.stage1.embedder import similarity_matrix

        return similarity_matrix(self.embedder.images(features, rows), self.embedder.texts(texts)).numpy()

    def matching(self, features: "Features", rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        self.check_matches()
        return self.embedder.matching(features, rows, texts, pairs).numpy()

    def match(
        self, features: "Features", rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `matching`, with the probabilities (n,) that the pairs match."""
        self.check_matches()
        logits = self.embedder.match_logits(features, rows, texts, pairs)
        return logits[:, 1].numpy(), logits.softmax(1)[:, 1].numpy()

    def check_matches(self) -> None:
        """QfError if the matching head of the run was never trained."""
        if not self.matches:
            raise QfError(
                f"run {self.folder} cannot re-rank or explain: its matching head was never trained (--losses "
                f"{self.manifest['train']['losses']}); search without --rerank, or train a run with itm under another --name"
            )

    def warn_of_truncation(self, text: str) -> None:
        """Warn if the text has more tokens than the model reads."""
        limit = self.embedder.max_text_length
        count = len(self.embedder.tokens.tokenizer.encode(text).ids)
        if count > limit:
            log.warning(
                "the text has %d tokens and is truncated: the model reads the first %d (--max-text-length of its training)",
                count,
                limit,
            )


def check_features(run: Run, features: "Features") -> None:
    """ArtifactError unless the features come from the encoder that the run was trained on."""
    from ...pipeline.encoders.identity import SAME_FEATURES, first_difference

    trained, given = run.manifest["encoder"], features.encoder
    if name := first_difference(trained, given, SAME_FEATURES):
        raise ArtifactError(
            f"run {run.folder} was trained on features of encoder {trained['id']} ({name} {_short(trained[name])}); the "
            f"features in {features.folder} are of encoder {given['id']} ({name} {_short(given[name])}); train on these with "
            "`qf train --name NAME`"
        )


def _short(value: Any) -> str:
    """A value for a message: the beginning of a checksum, any other value whole."""
    return value[:12] if isinstance(value, str) else str(value)
