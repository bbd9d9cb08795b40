"""BLEU, ROUGE-L and CIDEr-D are those of pycocoevalcap."""

import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.metrics import captions
from qf.trainer.metrics.captions import caption_scores, java_scores, longest_common_subsequence

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden" / "captions.json").read_text())
GROUPS = GOLDEN["groups"]
BOTH = shutil.which("java") is not None and find_spec("pycocoevalcap") is not None

words = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "grass", "red", "5"]), max_size=9)
sentences = words.map(" ".join)
groups = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1, max_size=6)


@pytest.mark.parametrize("corpus", GOLDEN["corpora"], ids=lambda corpus: f"{len(corpus['groups'])} images")
def test_the_scores_of_a_corpus_equal_pycocoevalcaps(corpus):
    candidates, references = zip(*(GROUPS[n] for n in corpus["groups"]), strict=True)
    assert caption_scores(candidates, references) == pytest.approx(corpus["scores"], abs=1e-9)


@given(groups)
def test_scores_are_in_range_whatever_the_order_of_references(corpus):
    candidates, references = zip(*corpus, strict=True)
    scores = caption_scores(candidates, references)
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert all(0 <= value <= (10 if name == "CIDEr" else 1) + 1e-9 for name, value in scores.items())
    turned = caption_scores(candidates, [texts[::-1] for texts in references])
    assert turned == pytest.approx(scores, abs=1e-12)


@given(st.lists(words.filter(lambda w: len(w) >= 4).map(" ".join), min_size=1, max_size=5))
def test_a_caption_equal_to_its_reference_is_perfect(texts):
    scores = caption_scores(texts, [[text] for text in texts])
    assert scores["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(1)


def test_two_captions_without_a_common_word_have_the_highest_cider():
    texts = ["a dog runs on grass", "two red birds sit there"]
    assert caption_scores(texts, [[text] for text in texts])["CIDEr"] == pytest.approx(10)


@given(words, words)
def test_the_longest_common_subsequence_against_the_textbooks(a, b):
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if left == right else max(lengths[i][j + 1], lengths[i + 1][j])
    assert longest_common_subsequence(a, b) == lengths[-1][-1]


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no captions to score"),
        (["a", "b"], [["a"]], "2 captions, but references of 1 images"),
        (["a", "b"], [["a"], []], "caption 1 has no reference"),
        (["a"], ["a"], "the references of caption 0 are one string"),
    ],
)
def test_unusable_input_is_an_error_of_one_line(candidates, references, message):
    for scores in (caption_scores, java_scores):
        with pytest.raises(ValueError, match=message):
            scores(candidates, references)


def test_without_java_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda program: None)
    with pytest.raises(RuntimeError, match="need Java and pycocoevalcap: pip install pycocoevalcap"):
        java_scores(["a dog"], [["a dog"]])


@pytest.mark.skipif(not BOTH, reason="needs Java and pycocoevalcap")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # its open pipes
def test_scores_and_tokens_equal_a_live_pycocoevalcap():
    tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    texts = {"candidates": [[c] for c, _ in GROUPS], "references": [r for _, r in GROUPS]}
    tokens = {
        name: tokenizer.tokenize({n: [{"caption": text} for text in group] for n, group in enumerate(found)})
        for name, found in texts.items()
    }
    bleu, _ = (
        import_module("pycocoevalcap.bleu.bleu")
        .Bleu(4)
        .compute_score(tokens["references"], tokens["candidates"], verbose=0)
    )
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    for name, module in {"ROUGE-L": "rouge.Rouge", "CIDEr": "cider.Cider", "METEOR": "meteor.Meteor"}.items():
        package, scorer = module.split(".")
        scorer = getattr(import_module(f"pycocoevalcap.{package}.{package}"), scorer)()
        scores[name], _ = scorer.compute_score(tokens["references"], tokens["candidates"])
    candidates, references = zip(*GROUPS, strict=True)
    ours = caption_scores(candidates, references) | java_scores(candidates, references)
    assert ours == pytest.approx(scores, abs=1e-4)
