"""Captions against references: BLEU, ROUGE-L and CIDEr-D, without Java.

The scores equal those of pycocoevalcap, which COCO's leaderboard uses. They are raw: BLEU and ROUGE-L lie in 0..1, CIDEr in
0..10, and tables in papers often print them times 100. METEOR and SPICE need Java; `java_scores` gives METEOR.

BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. CIDEr-D: Vedantam et al. 2015."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import import_module

from .ptb import caption_tokens

N = 4  # the longest n-grams, in tokens
BETA = 1.2  # ROUGE-L weighs recall this much more than precision
SIGMA = 6.0  # CIDEr-D's standard deviation of lengths, in tokens
SMALL, TINY = 1e-9, 1e-15  # keep BLEU's ratios finite where nothing matches

Words = list[str]
Ngrams = list[Counter[tuple[str, ...]]]  # one counter for each length, from 1 to N


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """One candidate and all references of each image -> BLEU-1 … BLEU-4, ROUGE-L and CIDEr of the corpus.

    CIDEr weighs n-grams by how few images have them among these references, so it is 0 for one image alone.
    Raises ValueError if there are no candidates, the lengths differ or an image has no reference."""
    checked(candidates, references)
    tokens = [caption_tokens(text) for text in candidates]
    reference_tokens = [[caption_tokens(text) for text in texts] for texts in references]
    words = [split(sentence) for sentence in tokens]
    reference_words = [[split(sentence) for sentence in sentences] for sentences in reference_tokens]
    ngrams = [count_ngrams(sentence) for sentence in words]
    reference_ngrams = [[count_ngrams(sentence) for sentence in sentences] for sentences in reference_words]
    return {
        **bleu(words, reference_words, ngrams, reference_ngrams),
        "ROUGE-L": mean([rouge_l(c, r) for c, r in zip(tokens, reference_tokens, strict=True)]),
        "CIDEr": mean(cider(ngrams, reference_ngrams)),
    }


def checked(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless every candidate has references."""
    if not candidates:
        raise ValueError("no captions to score")
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions, but references of {len(references)} images")
    for number, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"the references of caption {number} are one string, not a list of strings")
        if not texts:
            raise ValueError(f"caption {number} has no reference")


def split(tokens: Sequence[str]) -> Words:
    """Tokens cut at no-break spaces too, as pycocoevalcap's BLEU and CIDEr do; its ROUGE-L does not."""
    return " ".join(tokens).split()


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def count_ngrams(words: Words) -> Ngrams:
    """How often each n-gram occurs, for n from 1 to N."""
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, N + 1)]


def bleu(
    candidates: list[Words], references: list[list[Words]], ngrams: list[Ngrams], reference_ngrams: list[list[Ngrams]]
) -> dict[str, float]:
    """BLEU-1 … BLEU-N of a corpus: clipped precisions, and the closest reference's length for the brevity penalty."""
    length = sum(map(len, candidates))
    closest = sum(
        min((abs(len(r) - len(c)), len(r)) for r in sentences)[1]
        for c, sentences in zip(candidates, references, strict=True)
    )
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for n in range(N):
        found = sum(
            min(count, max(r[n][gram] for r in sentences))
            for candidate, sentences in zip(ngrams, reference_ngrams, strict=True)
            for gram, count in candidate[n].items()
        )
        possible = sum(max(0, len(words) - n) for words in candidates)
        product *= (found + TINY) / (possible + SMALL)
        scores[f"BLEU-{n + 1}"] = product ** (1 / (n + 1)) * brevity
    return scores


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by bit-parallel dynamic programming (Hyyrö 2004): bit i of `rows` is 0 where the length grows at a[i]."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    rows = full
    for word in b:
        matched = rows & places.get(word, 0)
        rows = ((rows + matched) | (rows - matched)) & full
    return len(a) - rows.bit_count()


def rouge_l(candidate: Words, references: list[Words]) -> float:
    """The F-score of the best precision and the best recall of the longest common subsequences, each over all references."""
    candidate = candidate or [""]  # pycocoevalcap takes an empty sentence as one empty word
    common = [(longest_common_subsequence(r or [""], candidate), len(r) or 1) for r in references]
    precision = max(lcs for lcs, _ in common) / len(candidate)
    recall = max(lcs / length for lcs, length in common)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0


def cider(ngrams: list[Ngrams], reference_ngrams: list[list[Ngrams]]) -> list[float]:
    """CIDEr-D of each candidate: cosines of clipped tf-idf vectors, less where lengths differ, times 10."""
    images = Counter(gram for sentences in reference_ngrams for gram in set().union(*(c for r in sentences for c in r)))
    everywhere = math.log(len(ngrams))
    idf = {gram: everywhere - math.log(count) for gram, count in images.items()}

    def weighed(sentence: Ngrams) -> tuple[list[dict], list[float], int]:
        vectors = [{g: count * idf.get(g, everywhere) for g, count in counter.items()} for counter in sentence]
        norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]
        return vectors, norms, sum(sentence[1].values())  # CIDEr-D takes the number of bigrams as the length

    scores = []
    for candidate, sentences in zip(ngrams, reference_ngrams, strict=True):
        vectors, norms, length = weighed(candidate)
        total = 0.0
        for sentence in sentences:
            others, other_norms, other_length = weighed(sentence)
            cosines = 0.0
            for vector, other, norm, other_norm in zip(vectors, others, norms, other_norms, strict=True):
                dot = sum(min(w, other[g]) * other[g] for g, w in vector.items() if g in other)
                cosines += dot / (norm * other_norm) if norm and other_norm else dot
            total += cosines / N * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        scores.append(10 * total / len(sentences))
    return scores


def java_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR (0..1) of the corpus, by pycocoevalcap's Java program (Denkowski and Lavie 2014).

    SPICE is left out: pycocoevalcap downloads a model of 0.4 GB for it. Raises ValueError as `caption_scores`, and
    RuntimeError if Java or pycocoevalcap is missing."""
    checked(candidates, references)
    try:
        meteor = import_module("pycocoevalcap.meteor.meteor")
    except ModuleNotFoundError:
        meteor = None
    if meteor is None or shutil.which("java") is None:
        raise RuntimeError("METEOR and SPICE need Java and pycocoevalcap: pip install pycocoevalcap")
    results = {n: [" ".join(caption_tokens(text))] for n, text in enumerate(candidates)}
    truths = {n: [" ".join(caption_tokens(text)) for text in texts] for n, texts in enumerate(references)}
    program = meteor.Meteor()
    try:
        score, _ = program.compute_score(truths, results)
    finally:
        program.meteor_p.stdout.close()  # which it leaves open
        program.meteor_p.stderr.close()
    return {"METEOR": float(score)}
