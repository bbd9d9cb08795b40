"""Captions through a text model, once: their embeddings are cached beside the shards (`features/caption_embeds.py`)."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from ..encoders.text import TextModel
from ..features.caption_embeds import CaptionEmbeds, has_embeds, save_embeds
from ..features.reader import Features
from ..results import OnStatus, Status, no_status

AT_ONCE = 2048  # captions between two reports


class TextEncoder(Protocol):
    """A text model: see `encoders/text.py` and `encoders/sentences.py`."""

    width: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(M,) texts -> (M, P) float32 of unit length."""


def caption_embeds(
    features: Features, model: str, load: Callable[[], TextEncoder], progress: OnStatus = no_status
) -> CaptionEmbeds:
    """The embeddings of all captions under the text model whose SHA-256 is `model`. Those that are missing are made first.

    `load` gives the text model; it is called only if something is missing. A shard that was finished is never made again."""
    missing = [n for n in range(len(features.manifest["shards"])) if not has_embeds(features, n, model)]
    if missing:
        encoder, began, done = load(), time.perf_counter(), 0
        texts = {n: [c for row in features.rows_of_shard(n) for c in features.captions[row]] for n in missing}
        total = sum(map(len, texts.values()))
        for shard, captions in texts.items():
            embeds = np.empty((len(captions), encoder.width), np.float32)
            order = np.argsort([len(caption) for caption in captions], kind="stable")  # equal lengths need no padding
            for start in range(0, len(order), AT_ONCE):
                some = order[start : start + AT_ONCE]
                embeds[some] = encoder.encode([captions[n] for n in some])
                done += len(some)
                progress(Status("captions", done, total, f"{done / (time.perf_counter() - began):.0f} captions/s"))
            save_embeds(features, shard, model, embeds)
    return CaptionEmbeds(features, model)


def encoder_captions(
    features: Features, device: torch.device, say: Callable[[str], None], progress: OnStatus = no_status
) -> CaptionEmbeds:
    """The embeddings of all captions under the text model of the features' own encoder; beside `pooled` they are its joint
    space. EncoderError if the encoder is needed and has no text model, or is no longer the one that made the features."""

    def load() -> TextModel:
        say(f"embedding the captions with the text model of {features.encoder['id']}")
        return TextModel(features.encoder, device)

    return caption_embeds(features, features.encoder["sha256"], load, progress)
