"""The tokenizer of a text model: texts to ids, checked against the vocabulary of the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import EncoderError
from .identity import origin

# transformers makes a tokenizer without words, and says nothing, where a folder has none of these
FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


def load_tokenizer(name: str, folder: Path, vocab_size: int) -> Any:
    """transformers' tokenizer in the `folder` of the encoder `name`, whose text model embeds `vocab_size` ids.

    EncoderError if the folder has no tokenizer, or one that cannot be loaded or has another vocabulary."""
    from transformers import AutoTokenizer

    if not any(file.is_file() for pattern in FILES for file in folder.glob(pattern)):
        raise EncoderError(
            f"the tokenizer of encoder {name} cannot be loaded: {folder} has no tokenizer.json (nor vocab.json, vocab.txt, or "
            f"spiece.model, which needs pip install sentencepiece); copy it from {origin(folder)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # broken files and missing packages each raise another type
        raise EncoderError(
            f"the tokenizer of encoder {name} cannot be loaded from {folder}; copy its tokenizer files again from "
            f"{origin(folder)} (SigLIP's needs: pip install sentencepiece)"
        ) from error
    count = len(tokenizer)
    if not vocab_size / 2 <= count <= vocab_size:  # text models may round their vocabulary up
        raise EncoderError(
            f"the tokenizer of encoder {name} has {count:,} words and its text model embeds {vocab_size:,}: it is incomplete, or "
            f"another model's; copy the tokenizer files again from {origin(folder)}"
        )
    return tokenizer


def unknown_words(ids: Callable[[str], Sequence[int]], unk_token_id: int | None, text: str) -> tuple[list[str], bool]:
    """The words of a text that a tokenizer turns into its unknown token; and whether it knows nothing of the text.

    `ids` gives the ids of a text without special tokens."""

    def unknown(part: str) -> list[bool]:
        return [number == unk_token_id for number in ids(part)]

    return [word for word in text.split() if any(unknown(word))], all(unknown(text))
