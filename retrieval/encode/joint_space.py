"""The frozen encoder's own joint space as a query encoder: its vision model for pictures, its text model for texts.

It needs no training. One embedding an image, `pooled` in the features; no matching. A query is embedded in NumPy, if an index
describes the text model; pictures and many texts take PyTorch."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipeline.artifacts import remembered_sha256
from ...pipeline.errors import EncoderError, QfError
from .query_encoder import warn_of_unknown_words

if TYPE_CHECKING:
    import torch

    from ...pipeline.encoders.picture import Picture
    from ...pipeline.encoders.text import TextModel
    from ...pipeline.features.reader import Features
    from .encoder_text import DescribedText

log = logging.getLogger(__name__)
BATCH = 4096  # images at a time


class JointSpace:
    """The joint space of the encoder with this identity; see `QueryEncoder` for the methods."""

    name = "clip"
    matches = False
    per_image = 1

    def __init__(
        self, identity: dict[str, Any], device: "torch.device | str", described: tuple[bytes, Path] | None = None
    ) -> None:
        """On a device or one of that name. `described` is the description of the text model and the folder of the index that
        has it. EncoderError if the encoder has no joint space."""
        if identity["joint"] is None:
            raise EncoderError(f"encoder {identity['id']} has no joint space with text; train a model first: qf train")
        self.identity, self._device, self._described = identity, device, described
        self.width: int = identity["joint"]

    @cached_property
    def device(self) -> "torch.device":
        """QfError if this machine lacks it."""
        from ...pipeline.device import resolve_device

        return resolve_device(str(self._device))

    @cached_property
    def text_model(self) -> "TextModel":
        """EncoderError if the encoder has none, or is no longer the one that made the features."""
        from ...pipeline.encoders.text import TextModel

        return TextModel(self.identity, self.device)

    @cached_property
    def query_model(self) -> "DescribedText | TextModel":
        """The text model for queries: in NumPy if the index describes it, otherwise `text_model`. EncoderError as of that."""
        from ...pipeline.encoders.identity import check_weights, encoder_folder, safetensors_files

        if self._described is None:
            return self.text_model
        from .encoder_text import DescribedText

        description, index = self._described
        folder = encoder_folder(
            self.identity["id"], cached=True
        )  # its weights are checked, so it need not be the newest
        check_weights(self.identity, folder, partial(remembered_sha256, index))
        return DescribedText(description, safetensors_files(folder))

    def query(self, text: str) -> np.ndarray:
        model = self.query_model
        if model.truncates(text):
            log.warning("the text is truncated: the encoder's text model reads its first %d tokens", model.limit)
        warn_of_unknown_words("encoder", *model.unknown(text))
        return model.encode([text])

    def for_queries(self) -> bytes | None:
        from ...pipeline.encoders.identity import encoder_folder, safetensors_files
        from .encoder_text import describe

        return describe(self.text_model, safetensors_files(encoder_folder(self.identity["id"])))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.text_model.encode(texts)

    def captions(self, features: "Features") -> np.ndarray:
        from ...pipeline.extract.captions import encoder_captions

        embeds = encoder_captions(features, self.device, log.info)
        return embeds.read(np.arange(len(embeds)))

    def picture(self, picture: "Picture") -> np.ndarray:
        assert picture.pooled is not None
        return picture.pooled.cpu().numpy()

    def images(self, features: "Features") -> Iterator[np.ndarray]:
        assert features.pooled is not None
        for start in range(0, len(features), BATCH):
            yield features.pooled[start : start + BATCH, None]

    def matching(self, features: "Features", rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        raise QfError("--rerank needs a trained model; train one first: qf train")
