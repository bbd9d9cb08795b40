"""A trained run as a query encoder: Q query embeddings an image, one embedding a text, and matching.

The text of a query is embedded in NumPy; pictures, matching and many texts take PyTorch."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipeline.artifacts import check_files, read_manifest, remember
from ...pipeline.errors import ArtifactError, QfError
from ...trainer.manifest import RUN, TOKENIZER, WEIGHTS
from .query_encoder import warn_of_unknown_words

if TYPE_CHECKING:
    import torch

    from ...pipeline.encoders.picture import Picture
    from ...pipeline.features.manifest import FeaturesFolder
    from ...pipeline.features.reader import Features
    from ...trainer.stage1.embedder import Embedder
    from ...trainer.tokens import Tokens
    from .towers import QFormerText

log = logging.getLogger(__name__)


class Run:
    """A finished run; see `QueryEncoder` for its methods. Each part of its model is loaded when it is needed first."""

    name = "itc"

    def __init__(self, folder: Path, device: "torch.device | str", precision: str, stage: int = 1) -> None:
        """On a device or one of that name, to compute in `precision` (see `resolve_precision`). ArtifactError if the run is
        unfinished or damaged; QfError if it is of another stage."""
        self.folder, self._device, self.precision = folder, device, precision
        self.manifest = read_manifest(folder, RUN)
        if self.manifest["stage"] != stage:
            raise QfError(
                f"run {folder} is of stage {self.manifest['stage']}, made for captions and answers; search needs one of stage 1"
            )

    @cached_property
    def device(self) -> "torch.device":
        """QfError if this machine lacks it."""
        from ...pipeline.device import resolve_device

        return resolve_device(str(self._device))

    @cached_property
    def tokens(self) -> "Tokens":
        """ArtifactError if the tokenizer cannot be read."""
        from ...trainer.tokens import Tokens

        return Tokens.load(self.folder / TOKENIZER)

    @cached_property
    def tower(self) -> "QFormerText":
        """The text side of the model. ArtifactError if weights or tokenizer are damaged."""
        from ...pipeline.mapped_tensors import MappedTensors
        from .towers import QFormerText

        entries = [entry for entry in self.manifest["files"] if entry["file"] in (WEIGHTS, TOKENIZER)]
        unknown = check_files(self.folder, entries, "train again with --overwrite")
        try:
            tower = QFormerText(MappedTensors([self.folder / WEIGHTS]), self.manifest["model"])
        except KeyError as error:
            raise ArtifactError(f"run {self.folder} does not fit its manifest: {error.args[0]}") from error
        if unknown:
            remember(self.folder, entries)
        return tower

    @cached_property
    def embedder(self) -> "Embedder":
        """The whole model. ArtifactError if its weights are damaged."""
        from ...pipeline.device import resolve_precision
        from ...trainer.qformer import QFormer
        from ...trainer.stage1.embedder import Embedder

        model = QFormer.from_pretrained(self.folder).to(self.device)
        dtype = resolve_precision(self.precision, self.device)
        return Embedder(model, self.tokens, self.device, dtype, self.max_text_length)

    @property
    def matches(self) -> bool:
        return bool(self.embedder.model.itm_head.bias.any())  # it is zero until the first step that trains the head

    @property
    def per_image(self) -> int:
        return int(self.manifest["model"]["num_query_tokens"])

    @property
    def width(self) -> int:
        return int(self.manifest["model"]["embed_dim"])

    @property
    def max_text_length(self) -> int:
        """The number of tokens that the model reads of a text."""
        return int(self.manifest["train"]["max_text_length"])

    def query(self, text: str) -> np.ndarray:
        self.warn_of_truncation(text)
        warn_of_unknown_words("model", *self.tokens.unknown(text))
        return self.embed(text)

    def embed(self, text: str) -> np.ndarray:
        """A text -> (1, E), without PyTorch and without a warning."""
        (ids,) = self.tokens.ids([text], self.max_text_length)
        return self.tower.embed(np.array(ids))[None]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.texts(texts).cpu().numpy()

    def for_queries(self) -> bytes | None:
        return None  # the run itself has all that a query needs

    def captions(self, features: "Features") -> np.ndarray:
        return self.texts([caption for captions in features.captions for caption in captions])

    def picture(self, picture: "Picture") -> np.ndarray:
        return self.embedder.image(picture.tokens)[0].cpu().numpy()

    def images(self, features: "Features") -> Iterator[np.ndarray]:
        for batch in self.embedder.image_batches(features, features.rows()):  # a device may not have room for all
            yield batch.cpu().numpy()

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
        limit = self.max_text_length
        count = len(self.tokens.tokenizer.encode(text).ids)
        if count > limit:
            log.warning(
                "the text has %d tokens and is truncated: the model reads the first %d (--max-text-length of its training)",
                count,
                limit,
            )


def check_features(run: Run, features: "Features | FeaturesFolder") -> None:
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
