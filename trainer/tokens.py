"""Captions to input_ids and attention_mask: a pretrained WordPiece tokenizer, or one trained on the captions.

PyTorch is imported where tensors are made: a search needs the ids alone."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer

from ..pipeline.errors import ArtifactError
from ..pipeline.files import atomic_file

if TYPE_CHECKING:
    import torch

SPECIAL = PAD, UNK, CLS, SEP, MASK, DEC = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
MAX_LETTERS = 1000  # letters in a vocabulary that is trained


def wordpiece(vocabulary: dict[str, int], lowercase: bool = True) -> Tokenizer:
    """BERT's tokenizer with this vocabulary; it encodes a text as [CLS] … [SEP]."""
    normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.post_processor = BertProcessing((SEP, vocabulary[SEP]), (CLS, vocabulary[CLS]))
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return tokenizer


def read_tokenizer(folder: Path) -> str | None:
    """The tokenizer of a model folder, as the text of a tokenizer.json. A BERT's vocab.txt is converted to one.

    None if the folder has neither file; ArtifactError if they cannot be read."""
    try:
        if (folder / "tokenizer.json").is_file():
            return (folder / "tokenizer.json").read_text(encoding="utf-8")
        if not (folder / "vocab.txt").is_file():
            return None
        with open(folder / "vocab.txt", encoding="utf-8") as file:
            words = [line.rstrip("\n") for line in file]
        settings = folder / "tokenizer_config.json"
        lowercase = not settings.is_file() or json.loads(settings.read_bytes()).get("do_lower_case", True)
        if len(set(words)) < len(words):
            raise ArtifactError(f"the tokenizer in {folder} cannot be read: vocab.txt repeats a line; copy it again")
        text: str = wordpiece({word: number for number, word in enumerate(words)}, lowercase).to_str()
        return text
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be read: its vocab.txt, tokenizer.json or tokenizer_config.json is damaged; copy "
            "it again from the model's page"
        ) from error


class Tokens:
    """A BERT-style tokenizer with BLIP-2's extra token [DEC], which begins a caption to generate."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Adds [DEC] as the last id if it is missing. ArtifactError if the tokenizer is not BERT-style."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (PAD, UNK, CLS, SEP) if token not in vocabulary]
        if missing:
            raise ArtifactError(
                f"the tokenizer has no {', '.join(missing)}; --init takes BERT-style (WordPiece) tokenizers"
            )
        tokenizer.add_special_tokens([DEC])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.pad_token_id, self.unk_token_id, self.sep_token_id, self.bos_token_id = (
            vocabulary[token] for token in (PAD, UNK, SEP, DEC)
        )

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokens":
        """A lower-case WordPiece vocabulary of the captions (Wu et al. 2016), like BERT's uncased one. It is deterministic.

        The library would number letters in the order of a hash map and break ties by number, so letters are numbered here."""
        normalizer = BertNormalizer(lowercase=True)
        captions = list(captions)
        letters = Counter(
            letter for caption in captions for letter in normalizer.normalize_str(caption) if letter.strip()
        )
        alphabet = sorted(letter for letter, _ in letters.most_common(MAX_LETTERS))
        fixed = [*SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet)]
        learner = Tokenizer(WordPiece(unk_token=UNK))
        learner.normalizer = normalizer
        learner.pre_tokenizer = BertPreTokenizer()
        trainer = WordPieceTrainer(
            vocab_size=max(vocab_size, len(fixed)), min_frequency=2, special_tokens=fixed, show_progress=False
        )
        learner.train_from_iterator(captions, trainer)
        return cls(wordpiece(learner.get_vocab()))

    @classmethod
    def parse(cls, text: str, name: object, rows: int | None = None) -> "Tokens":
        """From the text of a tokenizer.json; messages call it `name`. ArtifactError if it is not one.

        `rows` is the number of ids that have an embedding. Special tokens beyond them are left out, such as the <image> of
        Hugging Face's BLIP-2 processors."""
        try:
            if rows is not None:
                settings = json.loads(text)
                settings["added_tokens"] = [token for token in settings["added_tokens"] if token["id"] < rows]
                text = json.dumps(settings)
            return cls(Tokenizer.from_str(text))
        except ArtifactError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ArtifactError(f"{name} cannot be read as a tokenizer; copy its tokenizer.json again") from error

    @classmethod
    def load(cls, file: Path) -> "Tokens":
        """From a tokenizer.json. ArtifactError if it cannot be read."""
        try:
            return cls.parse(file.read_text(encoding="utf-8"), file)
        except FileNotFoundError as error:
            raise ArtifactError(f"{file} cannot be read as a tokenizer: there is no such file") from error
        except ValueError as error:
            raise ArtifactError(f"{file} cannot be read as a tokenizer: it is not UTF-8; copy it again") from error

    def save(self, file: Path) -> None:
        """Write a tokenizer.json, atomically."""
        with atomic_file(file) as out:
            out.write(self.tokenizer.to_str(pretty=True).encode())

    def __len__(self) -> int:
        """The number of its ids, [DEC] included."""
        return self.tokenizer.get_vocab_size()

    def ids(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """The ids [CLS] … [SEP] of each text. Texts longer than `max_length` are truncated, and keep [SEP]."""
        encodings = self.tokenizer.encode_batch(list(texts))
        return [e.ids if len(e.ids) <= max_length else [*e.ids[: max_length - 1], self.sep_token_id] for e in encodings]

    def unknown(self, text: str) -> tuple[list[str], bool]:
        """The words of a text that are not in the vocabulary, and whether nothing of the text is."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        missing = [number == self.unk_token_id for number in encoding.ids]
        found = [text[start:end] for (start, end), unknown in zip(encoding.offsets, missing, strict=True) if unknown]
        return [word for word in found if any(map(str.isalnum, word))], all(missing)

    def pad(self, ids: Sequence[Sequence[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
        """M lists of ids -> input_ids, attention_mask (M, L); L is the longest."""
        import torch

        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        attention_mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
        input_ids = np.full(attention_mask.shape, self.pad_token_id)
        input_ids[attention_mask] = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
        return torch.from_numpy(input_ids), torch.from_numpy(attention_mask.astype(np.int64))

    def __call__(self, texts: Sequence[str], max_length: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """M texts -> input_ids, attention_mask (M, L)."""
        return self.pad(self.ids(texts, max_length))
