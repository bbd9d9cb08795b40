"""Queries of several texts and pictures."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.pipeline.config import ComputeOptions
from qf.pipeline.errors import QfError, UsageError
from qf.pipeline.workspace import Workspace
from qf.retrieval.compose import MAX_TERMS, Name, Term, parse
from qf.retrieval.config import SearchOptions
from qf.retrieval.index.space import Space
from qf.retrieval.mix_file import Mix, Scorer, Weights
from qf.retrieval.searcher import Searcher, open_searcher

from conftest import draw  # isort: skip

ON = ComputeOptions("cpu", "float32")


def names(*terms):
    return [Term(Name(value), weight) for value, weight in terms]


@pytest.mark.parametrize(
    "text", ["a well-known dog", "-5 degrees", "C++", "a+b", "16:9", "3: the sequel", "x -y", " a "]
)
def test_a_text_without_operators_stays_as_it_is(text):
    (term,) = parse(text)
    assert term == Term(text)
    assert not isinstance(term.value, Name)


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("2:golden retriever + photo.jpg - snow", names(("golden retriever", 2), ("photo.jpg", 1), ("snow", -1))),
        ("+ dog", names(("dog", 1))),
        ("dog  -  .5: well-known cat", names(("dog", 1), ("well-known cat", -0.5))),
        ("- cat + dog", names(("cat", -1), ("dog", 1))),
        ("dog\n+\ncat", names(("dog", 1), ("cat", 1))),
    ],
)
def test_operators_between_spaces_make_terms(query, terms):
    assert parse(query) == terms


def test_further_terms_may_be_given_besides_the_query():
    assert parse("3:dog", ["a.jpg"], ["2:snow"]) == names(("dog", 3), ("a.jpg", 1), ("snow", -2))
    assert parse(None, ["a.jpg"]) == names(("a.jpg", 1))


@pytest.mark.parametrize(
    ("query", "minus", "message"),
    [
        ("dog +", (), r"nothing follows \+"),
        ("dog + - cat", (), r"nothing follows \+"),
        ("-", (), "nothing follows -"),
        ("0:dog + cat", (), "the weight 0 of 'dog' is not above 0"),
        ("9999:dog + cat", (), "the weight 9999 of 'dog' is not above 0 and at most 1000"),
        ("dog + 2:", (), "a term of the query is empty"),
        ("- cat", (), "only says what to avoid"),
        (None, ("cat",), "only says what to avoid"),
        ("dog", (" ",), "a term of the query is empty"),
        ("a" + " + a" * MAX_TERMS, (), "the query has 33 terms, the limit is 32"),
    ],
)
def test_a_query_that_is_no_query_is_refused(query, minus, message):
    with pytest.raises(UsageError, match=message):
        parse(query, (), minus)


@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=3))
def test_any_text_is_a_query_or_an_error_in_our_own_words(text, plus):
    try:
        terms = parse(text, plus)
    except UsageError:
        return
    assert all(np.isfinite(term.weight) and str(term.value).strip() for term in terms)


# ---- search ----


class FixedEncoder:
    """Embeds the text "n" as row n of a table of unit vectors."""

    def __init__(self, table):
        self.table = table

    def query(self, text):
        return self.table[int(text)][None]


class ManySearcher(Searcher):
    """A searcher of bare vectors. A hit is its position and its score."""

    def __init__(self, spaces, tables, weights):
        self.index, self.run = SimpleNamespace(spaces=spaces), object()
        self.encoders = {name: FixedEncoder(table) for name, table in tables.items()}
        self._warned, self._mix = set(), (Mix(Scorer(weights, weights), {}), "")

    def _hits(self, ranking, k, *matched):
        return list(zip(ranking.items[:k].tolist(), ranking.scores[:k].tolist(), strict=True))


def units(rng, *shape):
    """Unit vectors of few different values, so that there are ties and duplicates."""
    vectors = rng.integers(-1, 2, shape).astype(np.float32)
    vectors[..., 0] += ~vectors.any(-1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


signed = st.sampled_from([2.0, 1.0, 0.5, -0.5, -1.0])
values = st.one_of(st.integers(0, 5), st.integers(0, 5).map(str))


@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(6, 40),
    st.integers(1, 3),
    st.lists(st.tuples(values, signed), min_size=1, max_size=4),
    st.integers(1, 45),
    st.booleans(),
    st.sampled_from(["mix", "itc", "encoder"]),
)
def test_a_composed_search_equals_brute_force(seed, count, per_image, drawn, k, filtered, scorer):
    rng = np.random.default_rng(seed)
    images = {"clip": units(rng, count, 1, 4), "itc": units(rng, count, per_image, 5)}
    tables = {"clip": units(rng, 6, 4), "itc": units(rng, 6, 5)}
    keep = rng.random(count) < 0.4 if filtered else None
    searcher = ManySearcher(
        {name: Space.of(vectors, None) for name, vectors in images.items()}, tables, Weights(0.75, 0.25, 0)
    )
    terms = [Term(value, weight) for value, weight in drawn]
    seen = [term for term in terms if isinstance(term.value, int)]
    weights = {"mix": (0.75, 0.25), "itc": (0, 1), "encoder": (1, 0)}[scorer]
    if seen and scorer == "mix":
        weights = (1, 0)
    scores = np.zeros(count)
    for name, weight in zip(("clip", "itc"), weights, strict=True):
        total = sum(
            term.weight
            * (tables[name][int(term.value)][None] if isinstance(term.value, str) else images[name][term.value])
            for term in terms
        ) / sum(abs(term.weight) for term in terms)
        if weight and np.abs(total).max() < 1e-6:
            with pytest.raises(UsageError, match="cancel each other out"):
                searcher.composed(terms, k, scorer=scorer, keep=keep)
            return
        products = np.einsum("ne,iqe->inq", total, images[name])
        alone = len(terms) == 1 and seen
        scores += weight * (np.einsum("iqq->iq", products).mean(1) if alone else products.max((1, 2)))
    found = searcher.composed(terms, k, scorer=scorer, keep=keep)
    there = np.flatnonzero(keep) if filtered else np.arange(count)
    assert len(found) == len({item for item, _ in found}) == min(k, len(there))
    assert {item for item, _ in found} <= set(there.tolist())
    assert [score for _, score in found] == pytest.approx(sorted(scores[there], reverse=True)[:k], abs=1e-5)
    assert [score for _, score in found] == pytest.approx(scores[[item for item, _ in found]], abs=1e-5)


@pytest.fixture(scope="module")
def searcher(trained):
    return open_searcher(Workspace(trained), ON)


def test_a_file_and_a_key_are_pictures_and_all_else_is_text(searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "query.png")
    by_file = searcher.search(None, SearchOptions(plus=[str(tmp_path / "query.png")], k=3))
    by_key = searcher.search(None, SearchOptions(plus=["green-pole-0.png"], k=3))
    assert by_file == searcher.image(tmp_path / "query.png", 3)
    assert [hit.key for hit in by_key] == [hit.key for hit in by_file]
    assert [hit.score for hit in by_key] == pytest.approx([hit.score for hit in by_file], abs=1e-3)
    text = searcher.search(None, SearchOptions(plus=["a red bar"], k=3))
    assert text == searcher.text("a red bar", 3)
    assert searcher.search("green-pole-0.png", SearchOptions(k=3)) == searcher.text("green-pole-0.png", 3)
    assert len(searcher.search("a red bar", SearchOptions(plus=["\0", "x" * 5000], k=3))) == 3


def test_one_string_and_options_say_the_same(searcher):
    one = searcher.search("2:a red bar + green-pole-0.png - a blue square", SearchOptions(k=5))
    options = SearchOptions(plus=["green-pole-0.png"], minus=["a blue square"], k=5)
    assert searcher.search("2:a red bar", options) == one


def test_only_a_text_alone_is_reranked(searcher):
    with pytest.raises(UsageError, match="does not go with other terms or pictures"):
        searcher.search("a red bar - blue", SearchOptions(rerank=3))
    with pytest.raises(UsageError, match="does not go with --plus and --minus"):
        searcher.search("a red bar", SearchOptions(rerank=3, plus=["blue"]))
    with pytest.raises(UsageError, match="use --plus FILE to combine it"):
        searcher.search(None, SearchOptions(image=Path("x.png"), plus=["blue"]))
    with pytest.raises(QfError, match="the query is empty"):
        searcher.composed([Term(" ")], 3)


def test_a_reranked_hit_has_the_probability_of_a_match(searcher):
    hits = searcher.text("a red bar", 5, rerank=5, scorer="itc")
    pairs = np.array([[0, 0]])
    for hit in hits:
        rows = np.array([searcher.row(hit.key)])
        logits = searcher.run.embedder.match_logits(searcher.features, rows, ["a red bar"], pairs)
        assert hit.probability == pytest.approx(torch.softmax(logits, 1)[0, 1].item(), abs=1e-4)
        assert "probability" not in hit.to_json()
    assert searcher.text("a red bar", 1)[0].probability is None
