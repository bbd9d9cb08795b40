import pytest
import torch
from qf.pipeline.errors import ArtifactError
from qf.trainer.tokens import Tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel


@pytest.fixture(scope="module")
def tokens():
    return Tokens.train(["a red dog runs", "two dogs run on red sand"] * 3, 60)


def test_texts_to_ids_and_back(tokens, tmp_path):
    input_ids, mask = tokens(["A red DOG", "red"], max_length=8)
    assert input_ids.shape == mask.shape
    assert mask.sum(1).tolist() == [len(tokens.ids(["a red dog"], 8)[0]), 3]
    assert tokens.tokenizer.decode(input_ids[0].tolist()).split() == ["a", "red", "dog"]
    tokens.save(tmp_path / "tokenizer.json")
    again = Tokens.load(tmp_path / "tokenizer.json")
    assert again.ids(["two dogs"], 9) == tokens.ids(["two dogs"], 9)
    assert (len(again), again.bos_token_id) == (len(tokens), tokens.bos_token_id)


def test_the_vocabulary_is_the_same_every_time():
    captions = ["a red dog", "the dog is red", "un château à côté", "two dogs"] * 2
    first, second = (Tokens.train(captions, 80).tokenizer.get_vocab() for _ in range(2))
    assert first == second
    assert {"dog", "red", "chateau"} <= set(first)
    assert Tokens.train(captions, 80).ids(["dog?"], 9)[0][1:-1] == [first["dog"], first["[UNK]"]]


def test_a_truncated_text_keeps_sep(tokens):
    ids = tokens.ids(["red " * 50], max_length=6)[0]
    assert len(ids) == 6
    assert ids[-1] == tokens.sep_token_id


def test_a_tokenizer_that_is_not_berts_is_refused(tmp_path):
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(ArtifactError, match=r"has no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        Tokens.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as a tokenizer"):
        Tokens.load(tmp_path / "t.json")


def test_padding_makes_texts_of_one_length(tokens):
    ids = [[1, 7, 2], [], [1, 2], [1, 5, 6, 2]]
    input_ids, mask = tokens.pad(ids)
    pad = tokens.pad_token_id
    assert input_ids.tolist() == [[1, 7, 2, pad], [pad] * 4, [1, 2, pad, pad], [1, 5, 6, 2]]
    assert mask.tolist() == [[1, 1, 1, 0], [0] * 4, [1, 1, 0, 0], [1] * 4]
    assert input_ids.dtype == mask.dtype == torch.int64
    assert [t.shape for t in tokens.pad([])] == [(0, 1), (0, 1)]
