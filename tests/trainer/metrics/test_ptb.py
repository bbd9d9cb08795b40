"""Captions are cut into the tokens that COCO's Java tokenizer makes of them."""

import csv
import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.metrics.ptb import PUNCTUATION, caption_tokens

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden" / "captions.json").read_text())
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def checksum(captions):
    return hashlib.sha256("\n".join(" ".join(caption_tokens(c)) for c in captions).encode()).hexdigest()


@pytest.mark.parametrize(("text", "tokens"), GOLDEN["tokens"])
def test_a_sentence_has_javas_tokens(text, tokens):
    assert " ".join(caption_tokens(text)) == tokens


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captions")
def test_all_captions_of_flickr8k_have_javas_tokens():
    with (SHARED / "flickr8k" / "captions.csv").open(newline="") as file:
        assert checksum(row["caption"] for row in csv.DictReader(file)) == GOLDEN["sha256"]["flickr8k"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captions")
def test_all_captions_of_coco_mini_have_javas_tokens():
    annotations = json.loads((SHARED / "coco-mini" / "annotations.json").read_text())["annotations"]
    assert checksum(a["caption"] for a in annotations) == GOLDEN["sha256"]["coco-mini"]


@given(st.text())
def test_any_text_gives_words_without_spaces_and_punctuation(text):
    tokens = caption_tokens(text)
    assert all(token and token not in PUNCTUATION and token == token.lower() for token in tokens)
    assert not any(" " in token for token in tokens)


@given(st.lists(st.sampled_from(["dog", "Cat", "runs", "snow-covered", "4x4"])))
def test_plain_words_are_kept_in_lower_case(words):
    assert caption_tokens(" ".join(words)) == [word.lower() for word in words]


@pytest.mark.parametrize("repeated", ["a", "a-", "1,", "a/", "a@", "'", "<a", "http://a.", "a.", "a'"])
def test_a_very_long_text_is_cut_quickly(repeated):
    start = time.perf_counter()
    caption_tokens(repeated * 3000)
    assert time.perf_counter() - start < 5
