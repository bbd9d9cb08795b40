"""The manifest of a run. Standard library and msgspec only."""

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from ..pipeline.artifacts import CONFIG, Count, FileEntry, Kind, Sha256
from ..pipeline.features.manifest import EncoderIdentity

TOKENIZER, WEIGHTS, CURVES = "tokenizer.json", "model.safetensors", "loss.png"
METRICS, TENSORBOARD, CHECKPOINTS = "metrics.jsonl", "tensorboard", "checkpoints"
MIX = "mix.json"  # fitted after training, by retrieval
Amount = Annotated[float, Meta(ge=0, le=1e30)]
Side = Annotated[int, Meta(ge=1, le=2**24)]  # of a matrix of the model


class ModelSizes(TypedDict):
    """The fields of QFormerConfig that describe a run's model."""

    vocab_size: Side
    encoder_hidden_size: Side
    hidden_size: Side
    num_hidden_layers: Side
    num_attention_heads: Side
    intermediate_size: Side
    num_query_tokens: Side
    cross_attention_frequency: Side
    embed_dim: Side
    max_position_embeddings: Side
    head_dim: Side | None
    hidden_dropout_prob: Annotated[float, Meta(ge=0, lt=1)]
    attention_probs_dropout_prob: Annotated[float, Meta(ge=0, lt=1)]
    initializer_range: Amount
    layer_norm_eps: Amount
    ln_vision_eps: Amount
    pad_token_id: Count
    bos_token_id: Count


class TrainSettings(TypedDict):
    """The fields of the training options that later commands read; the others are kept beside them."""

    max_text_length: Annotated[int, Meta(ge=3, le=2**20)]
    losses: NotRequired[str]  # of stage 1
    init: str | None


class LanguageModelIdentity(TypedDict):
    """The frozen language model of a run of stage 2. It is not part of the run."""

    id: str
    sha256: Sha256
    precision: str
    width: Side


class TrainedOn(TypedDict):
    """The features of a run."""

    path: str
    identity: Sha256


class RunSettings(TypedDict):
    """config.json: the settings that a run began with, and resumes with."""

    train: TrainSettings
    features: Sha256
    precision: str


class RunManifest(TypedDict):
    """A finished run."""

    stage: Annotated[int, Meta(ge=1, le=2)]
    model: ModelSizes
    train: TrainSettings
    encoder: EncoderIdentity
    features: TrainedOn
    sha256: Sha256
    files: list[FileEntry]
    finished: str
    steps: Count
    planned_steps: Count
    stopped: str | None
    epochs: Amount
    pairs_per_second: Amount
    seconds: Amount
    wait_share: float
    loss: float | None
    best: dict[str, float]  # step and metrics of the weights that were kept; empty without a validation
    language_model: NotRequired[LanguageModelIdentity]  # of stage 2
    prompt: NotRequired[str]  # of stage 2


RUN = Kind(
    "run",
    "qf train",
    RunManifest,
    (CONFIG, TOKENIZER, WEIGHTS, CURVES, METRICS, TENSORBOARD, CHECKPOINTS, MIX),
)
