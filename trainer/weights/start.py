"""Where training starts: the sizes of the model, its tokenizer, and the weights of --init. The stage builds the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipeline.encoders.identity import encoder_folder
from ...pipeline.errors import EncoderError, TrainingError
from ...pipeline.features.reader import Features
from ...pipeline.lfs import CURE, is_lfs_pointer
from ..config import PRESETS, QFormerConfig, QFormerTraining, Stage1Config
from ..tokens import Tokens, read_tokenizer
from .names import Weights
from .read import read_weights

BLIP_2_TOKENIZER, BLIP_2_VOCAB_SIZE = "bert-base-uncased", 30522  # BLIP-2 adds [DEC] to it


@dataclass(frozen=True)
class Start:
    """All that training needs to build its model."""

    model: QFormerConfig
    tokens: Tokens
    weights: Weights | None  # None: random parameters


def has_shared_space(config: Stage1Config) -> bool:
    """Whether the weights of `config.init` bring a space that images and texts share. Errors as of `read_weights`."""
    return config.init is not None and "embed_dim" in read_weights(config.init).sizes


def find_start(
    config: Stage1Config, features: Features, captions: list[str], embed_dim: int = QFormerConfig.embed_dim
) -> Start:
    """The start of training on these features. The sizes of `config.init` win over the preset's and over `embed_dim`.

    Without any tokenizer, one is trained on the captions. TrainingError if the weights do not fit the features or the
    options; ArtifactError if they cannot be read."""
    weights = None if config.init is None else read_weights(config.init)
    tokens = find_tokens(config, weights, captions)
    sizes: dict[str, Any] = dict(PRESETS[config.preset]) | {"encoder_hidden_size": features.encoder["width"]}
    sizes["embed_dim"] = embed_dim
    if config.num_query_tokens is not None:
        sizes["num_query_tokens"] = config.num_query_tokens
    if weights is not None:
        check_fits(config, features.encoder["width"], weights)
        sizes |= weights.sizes
    sizes |= {
        "vocab_size": max(len(tokens), (weights.vocab_size if weights else None) or 0),
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }
    model = QFormerConfig(**sizes)
    if config.max_text_length > model.max_position_embeddings:
        raise TrainingError(
            f"--max-text-length {config.max_text_length}: texts of this model have at most "
            f"{model.max_position_embeddings} positions"
        )
    return Start(model, tokens, weights)


def check_fits(config: QFormerTraining, width: int, weights: Weights) -> None:
    """TrainingError if the weights read features of another width, or do not have the requested number of queries."""
    own = weights.sizes.get("encoder_hidden_size")
    if own not in (None, width):
        raise TrainingError(
            f"--init {config.init} was trained on features {own} wide; these are {width} wide: extract with its encoder"
        )
    queries = weights.sizes.get("num_query_tokens")
    if queries is not None and config.num_query_tokens not in (None, queries):
        raise TrainingError(f"--num-query-tokens {config.num_query_tokens}: --init {config.init} has {queries}")


def find_tokens(config: Stage1Config, weights: Weights | None, captions: list[str]) -> Tokens:
    """The tokenizer of `config.tokenizer`, or else of the weights. Weights of BLIP-2's size without one get BLIP-2's own.

    Without text embeddings it is a WordPiece vocabulary of the captions. TrainingError if the tokenizer cannot be fetched, or
    does not fit the text embeddings."""
    vocab_size = weights.vocab_size if weights else None  # of the text embeddings
    own = None
    if config.tokenizer is not None:
        tokens = Tokens.parse(_fetched(config.tokenizer), f"--tokenizer {config.tokenizer}", vocab_size)
    elif weights is not None and (own := weights.tokenizer) is not None:
        tokens = Tokens.parse(own, f"the tokenizer of --init {config.init}", vocab_size)
    elif vocab_size is None:
        tokens = Tokens.train(captions, config.vocab_size)
    elif vocab_size - BLIP_2_VOCAB_SIZE in (0, 1):
        tokens = Tokens.parse(_fetched(BLIP_2_TOKENIZER), BLIP_2_TOKENIZER, vocab_size)
    else:
        raise TrainingError(
            f"--init {config.init} brings no tokenizer, and its {vocab_size:,} words are not those of {BLIP_2_TOKENIZER}; "
            "give its tokenizer: --tokenizer FOLDER"
        )
    count = len(tokens)
    adds_dec = (count, tokens.bos_token_id) == ((vocab_size or 0) + 1, vocab_size)  # to a BERT
    if vocab_size is not None and count != vocab_size and not adds_dec and (count > vocab_size or own is None):
        raise TrainingError(
            f"the tokenizer has {count:,} words and --init {config.init} has embeddings for {vocab_size:,}; give the one that "
            "it was trained with: --tokenizer FOLDER"
        )
    return tokens


def _fetched(name: str) -> str:
    """The text of a tokenizer.json, from a file, a folder or a Hugging Face id. TrainingError if there is none."""
    try:
        if is_lfs_pointer(name):
            raise TrainingError(f"--tokenizer {name} {CURE}")
        if Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
        text = read_tokenizer(encoder_folder(name, ("*.json", "*.txt")))
    except (EncoderError, ValueError) as error:
        raise TrainingError(
            f"the tokenizer {name} cannot be fetched or read; give a folder that has it: --tokenizer FOLDER"
        ) from error
    if text is None:
        raise TrainingError(f"--tokenizer {name} holds no tokenizer.json and no vocab.txt")
    return text
