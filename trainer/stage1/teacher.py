"""The teacher of the shared space: the encoder's own joint space, or a sentence encoder and a linear map to it.

An encoder without text gets a joint space in closed form: ridge regression from the mean of an image's tokens to the mean of its
captions' embeddings. The strength of the ridge is chosen by retrieval among images that it was not fitted on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...pipeline.encoders.sentences import SentenceModel
from ...pipeline.encoders.text import has_text_model
from ...pipeline.errors import EncoderError, TrainingError
from ...pipeline.extract.captions import caption_embeds, encoder_captions
from ...pipeline.features.caption_embeds import CaptionEmbeds, embeds_path
from ...pipeline.features.codecs import decode
from ...pipeline.features.reader import Features
from ...pipeline.results import OnStatus
from ..config import Stage1Config
from ..metrics.retrieval import mean_recall_at_1, retrieval
from ..objectives import LOSSES
from ..weights.start import has_shared_space
from .plan import chosen_losses

log = logging.getLogger(__name__)
Say = Callable[[str], None]
STRENGTHS = [
    10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0)
]  # of the ridge, as a share of the mean variance
HELD_OUT, MOST_JUDGED = 0.1, 1000  # share of the images that choose the strength; at most so many
ROWS = 256  # images read at a time


@dataclass(frozen=True)
class SpaceTeacher:
    """A `loader.batches.Teacher`: a space that holds the training images and the captions."""

    embeds: np.ndarray  # (n, E) float32, of the training images
    captions: CaptionEmbeds
    numbers: np.ndarray  # of the training captions, among all captions of the features

    @property
    def width(self) -> int:
        """E."""
        return self.captions.width

    def images(self, chosen: np.ndarray) -> np.ndarray:
        """See `Teacher`."""
        return self.embeds[chosen]

    def texts(self, chosen: np.ndarray) -> np.ndarray:
        """See `Teacher`."""
        return self.captions.read(self.numbers[chosen])


def resolve_teacher(config: Stage1Config, features: Features) -> str:
    """The teacher of `config.teach`: "encoder", "none", or the name of a sentence encoder. "auto" is the encoder where it has text
    and the shared space starts afresh. TrainingError if a named one has nothing to teach; others as of `read_weights`."""
    if (
        not config.epochs or len(features.rows("train", captioned=True)) < 2
    ):  # nothing to train, or too little: refused later
        return "none"
    if config.teach != "auto":
        if config.teach != "none" and LOSSES[0] not in chosen_losses(config):
            raise TrainingError(
                f"--teach {config.teach} teaches ITC: add itc to --losses {config.losses}, or --teach none"
            )
        return config.teach
    if LOSSES[0] not in chosen_losses(config):
        return "none"
    return "encoder" if _encoder_has_text(features) and not has_shared_space(config) else "none"


def _encoder_has_text(features: Features) -> bool:
    """Whether the encoder has a text model that is here, or its embeddings of the captions are."""
    if features.encoder["joint"] is None:
        return False
    shards = range(len(features.manifest["shards"]))
    if all(embeds_path(features, n, features.encoder["sha256"]).is_file() for n in shards):
        return True
    try:
        return has_text_model(features.encoder)
    except EncoderError as error:
        log.warning("no teacher: %s", error)
        return False


def find_teacher(
    name: str, features: Features, rows: np.ndarray, device: torch.device, say: Say, progress: OnStatus
) -> SpaceTeacher | None:
    """The teacher that `resolve_teacher` named, for the training images `rows`; None for "none".

    TrainingError or EncoderError if it cannot teach these features."""
    if name == "none":
        return None
    if name == "encoder":
        if features.pooled is None:
            raise TrainingError(
                f"--teach encoder: {features.encoder['id']} has no joint space with text; name a sentence encoder instead, such "
                "as --teach sentence-transformers/all-MiniLM-L6-v2"
            )
        captions = encoder_captions(features, device, say, progress)
        return SpaceTeacher(features.pooled[rows], captions, numbers_of(features, captions, rows))
    sentences = SentenceModel(name, device)
    say(f"--teach: embedding the captions with {name}, where that is not done yet")
    captions = caption_embeds(features, sentences.sha256, lambda: sentences, progress)
    embeds, strength, recall = fit_ridge(features, rows, captions)
    say(
        f"--teach: a linear map from {features.encoder['id']} to {name} (ridge {strength:.3g}) finds {recall:.1f} % at rank 1 among "
        "held-out images"
    )
    return SpaceTeacher(embeds, captions, numbers_of(features, captions, rows))


def numbers_of(features: Features, captions: CaptionEmbeds, rows: np.ndarray) -> np.ndarray:
    """The numbers of the captions of these rows, image by image."""
    return np.concatenate([np.arange(captions.firsts[row], captions.firsts[row + 1]) for row in rows])


def fit_ridge(features: Features, rows: np.ndarray, captions: CaptionEmbeds) -> tuple[np.ndarray, float, float]:
    """Ridge regression from the images `rows` (n,) to the mean embedding of their captions.

    Returns the predictions (n, E) float32 of unit length, the strength that was chosen, and its mean R@1 both ways among the
    images that chose it."""
    inputs = _mean_tokens(features, rows)
    inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6)
    embeds = [captions.read(np.arange(captions.firsts[row], captions.firsts[row + 1])) for row in rows]
    outputs = np.stack([some.mean(0) for some in embeds]).astype(np.float64)
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    judged = np.arange(0, len(rows), max(2, round(1 / HELD_OUT)))[:MOST_JUDGED]
    fitted = np.setdiff1d(np.arange(len(rows)), judged)
    texts = torch.from_numpy(np.concatenate([embeds[n] for n in judged]))
    owners = torch.from_numpy(np.repeat(np.arange(len(judged)), [len(embeds[n]) for n in judged]))
    found = {}
    for strength in STRENGTHS:
        solution = _solve(inputs[fitted], outputs[fitted], strength)
        scores = torch.from_numpy(_predict(inputs[judged], *solution)) @ texts.T
        found[strength] = mean_recall_at_1(retrieval(scores, owners))
    best = max(STRENGTHS, key=lambda strength: found[strength])
    return _predict(inputs, *_solve(inputs, outputs, best)), best, found[best]


def _mean_tokens(features: Features, rows: np.ndarray) -> np.ndarray:
    """(n, W) float64: the mean over the tokens of each image."""
    parts = [decode(features.read(rows[i : i + ROWS])).double().mean(1).numpy() for i in range(0, len(rows), ROWS)]
    return np.concatenate(parts)


def _solve(inputs: np.ndarray, outputs: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (W, E) and bias (E,). `strength` is a share of n, the variance of each standardised input summed over the images."""
    bias = outputs.mean(0)
    gram = inputs.T @ inputs + strength * len(inputs) * np.eye(inputs.shape[1])
    return np.linalg.solve(gram, inputs.T @ (outputs - bias)), bias


def _predict(inputs: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = inputs @ weights + bias
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out.astype(np.float32)
