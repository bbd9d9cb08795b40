"""Composed queries: texts and pictures with weights, such as "2:golden retriever + photo.jpg - snow".

A search for it is one search for the weighted sum of the query vectors. NumPy only."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np

from ..pipeline.errors import UsageError
from .search import Ranking

if TYPE_CHECKING:
    from ..pipeline.encoders.picture import Picture

OPERATOR = re.compile(r"(?:^|(?<=\s))([+-])(?=\s|$)")  # spaces around it, so that a hyphenated word has none
WEIGHT = re.compile(r"(\d+(?:\.\d*)?|\.\d+):(.*)", re.DOTALL)
MAX_WEIGHT = 1000.0
MAX_TERMS = 32
NOTHING = 1e-6  # a sum of unit vectors that is shorter than this has no direction


class Name(str):
    """The file or key of a picture, or else a text: whoever knows the files and keys decides."""


Value = Union[str, int, "Picture"]  # a text; the position of an image in the index; a picture that the encoder has seen


@dataclass(frozen=True)
class Term:
    """One text or picture of a query. What has a negative weight is to be avoided."""

    value: Value
    weight: float = 1.0


def parse(query: str | None, plus: Sequence[str] = (), minus: Sequence[str] = ()) -> list[Term]:
    """The terms of a query in words, and of further texts or pictures.

    A query without operators is a text as it stands, and so is "16:9" in it. Every other value is a `Name`, and may begin with
    a weight. UsageError if a term or its weight is missing, or if all terms are negative."""
    parts = list(_parts(query)) if query and query.strip() else []
    if len(parts) == 1 and not plus and not minus and query and not OPERATOR.search(query):
        return [Term(query)]
    parts += [(1, value) for value in plus] + [(-1, value) for value in minus]
    if len(parts) > MAX_TERMS:
        raise UsageError(f"the query has {len(parts)} terms, the limit is {MAX_TERMS}")
    terms = [_term(sign, value) for sign, value in parts]
    if not any(term.weight > 0 for term in terms):
        raise UsageError("the query only says what to avoid; say what to look for as well, as in: a beach - people")
    return terms


def _parts(query: str) -> Iterator[tuple[int, str]]:
    """The sign of each term of a query, and the term."""
    first, *rest = OPERATOR.split(query)  # text, operator, text, operator, text …
    if first.strip() or not rest:
        yield 1, first
    for operator, value in zip(rest[::2], rest[1::2], strict=True):
        if not value.strip():
            raise UsageError(
                f"nothing follows {operator} in the query {query.strip()!r}; write a term after each + and -"
            )
        yield (1 if operator == "+" else -1), value


def _term(sign: int, value: str) -> Term:
    """A term from its sign and its text, which may begin with a weight."""
    weight = 1.0
    if given := WEIGHT.fullmatch(value.strip()):
        weight, value = float(given[1]), given[2]
        if not 0 < weight <= MAX_WEIGHT:
            raise UsageError(f"the weight {given[1]} of {value.strip()!r} is not above 0 and at most {MAX_WEIGHT:g}")
    if not value.strip():
        raise UsageError("a term of the query is empty; give a text, or the file or key of a picture")
    return Term(Name(value.strip()), sign * weight)


def combined(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of query vectors, each (1, E) or (Q, E), divided by the sum of the absolute weights -> (1, E) or (Q, E).

    A text has one vector, which is added to each vector of a picture. The score of an image with a single vector is then the
    weighted mean of its scores. UsageError if the terms cancel each other out."""
    total = sum((weight * vector for vector, weight in zip(vectors, weights, strict=True)), np.float32(0))
    mean = np.asarray(total / math.fsum(map(abs, weights)), np.float32)
    if np.linalg.norm(mean, axis=-1).max() < NOTHING:
        raise UsageError("the terms of the query cancel each other out; leave one of them out, or change its weight")
    return mean


def best_kept(rank: Callable[[int], Ranking], k: int, keep: np.ndarray | None) -> Ranking:
    """The k best items of those that `keep` (N,) is true for; of all if it is None.

    `rank` gives the exact ranking of the best items, as many as it is asked for. It is asked for more until k are kept."""
    if keep is None:
        return rank(k)
    k, depth = min(k, int(np.count_nonzero(keep))), k
    while True:
        ranking = rank(depth)
        kept = np.flatnonzero(keep[ranking.items])[:k]
        if len(kept) == k:
            return Ranking(ranking.items[kept], ranking.scores[kept])
        depth *= 4
