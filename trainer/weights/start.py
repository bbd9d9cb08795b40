"""What training starts from: a random Q-Former, or the weights that --init names; and the tokenizer that belongs to it."""

from pathlib import Path
from typing import Any

from ...pipeline.encoders.identity import encoder_folder
from ...pipeline.errors import EncoderError, TrainingError
from ...pipeline.features.reader import Features
from ..config import PRESETS, QFormerConfig, Stage1Config
from ..qformer import QFormer
from ..tokens import Tokens, read_tokenizer
from .names import Weights, fill
from .read import read_weights

BLIP_2_TOKENIZER, BLIP_2_WORDS = "bert-base-uncased", 30522  # [DEC] comes on top


def make_model(config: Stage1Config, features: Features, captions: list[str]) -> tuple[QFormer, Tokens]:
    """The Q-Former for these features that training starts from, with its tokenizer.

    What `config.init` tells of sizes wins over the preset. TrainingError if it does not go with the features or the options,
    ArtifactError as of `read_weights` and `fill`."""
    weights = None if config.init is None else read_weights(config.init)
    tokens = make_tokens(config, weights, captions)
    sizes: dict[str, Any] = dict(PRESETS[config.preset]) | {"encoder_hidden_size": features.encoder["width"]}
    if config.num_query_tokens is not None:
        sizes["num_query_tokens"] = config.num_query_tokens
    if weights is not None:
        _check(config, sizes, weights)
        sizes |= weights.sizes
    model = QFormer(
        QFormerConfig(
            **sizes
            | {
                "vocab_size": max(len(tokens), (weights.words if weights else None) or 0),
                "pad_token_id": tokens.pad_token_id,
                "bos_token_id": tokens.bos_token_id,
                "hidden_dropout_prob": config.dropout,
                "attention_probs_dropout_prob": config.dropout,
            }
        )
    )
    if config.max_text_length > model.config.max_position_embeddings:
        raise TrainingError(
            f"--max-text-length {config.max_text_length}: texts of this model have "
            f"{model.config.max_position_embeddings} positions at most"
        )
    if weights is not None:
        fill(model, weights)
    return model, tokens


def _check(config: Stage1Config, asked: dict[str, Any], weights: Weights) -> None:
    """TrainingError if the weights are for other features, or have not the number of queries that was asked for."""
    width, own = asked["encoder_hidden_size"], weights.sizes.get("encoder_hidden_size")
    if own not in (None, width):
        raise TrainingError(
            f"--init {config.init} was trained on features {own} wide; these are {width} wide: extract with its encoder"
        )
    queries = weights.sizes.get("num_query_tokens")
    if queries is not None and config.num_query_tokens not in (None, queries):
        raise TrainingError(f"--num-query-tokens {config.num_query_tokens}: --init {config.init} has {queries}")


def make_tokens(config: Stage1Config, weights: Weights | None, captions: list[str]) -> Tokens:
    """The tokenizer that `config.tokenizer` names, or that the weights bring, or that BLIP-2's weights are known to have been
    trained with; without any text embeddings to respect, a WordPiece vocabulary of the captions."""
    words = weights.words if weights else None
    own = None
    if config.tokenizer is not None:
        tokens = Tokens.parse(_fetched(config.tokenizer), f"--tokenizer {config.tokenizer}", words)
    elif weights is not None and (own := weights.tokenizer) is not None:
        tokens = Tokens.parse(own, f"the tokenizer of --init {config.init}", words)
    elif words is None:
        tokens = Tokens.train(captions, config.vocab_size)
    elif words - BLIP_2_WORDS in (0, 1):
        tokens = Tokens.parse(_fetched(BLIP_2_TOKENIZER), BLIP_2_TOKENIZER, words)
    else:
        raise TrainingError(
            f"--init {config.init} brings no tokenizer, and with its {words:,} words it is not that of {BLIP_2_TOKENIZER}; "
            "name its tokenizer: --tokenizer FOLDER"
        )
    count = len(tokens)
    new_word = (count, tokens.bos_token_id) == ((words or 0) + 1, words)  # [DEC], to a BERT
    if words is not None and count != words and not new_word and (count > words or own is None):
        raise TrainingError(
            f"the tokenizer has {count:,} words and --init {config.init} has embeddings for {words:,}; name the one that it "
            "was trained with: --tokenizer FOLDER"
        )
    return tokens


def _fetched(name: str) -> str:
    """The text of the tokenizer that a file, a folder or a Hugging Face id names."""
    try:
        if Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
        text = read_tokenizer(encoder_folder(name, ("*.json", "*.txt")))
    except (EncoderError, ValueError) as error:
        raise TrainingError(
            f"the tokenizer {name} cannot be fetched or read; name a folder that has it: --tokenizer FOLDER"
        ) from error
    if text is None:
        raise TrainingError(f"--tokenizer {name} holds no tokenizer.json and no vocab.txt")
    return text
