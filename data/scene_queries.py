"""What a person may look for in the sample: queries with a meaning, so that `fits` tells which scenes answer them."""

from collections.abc import Sequence
from typing import NamedTuple

from .scene_language import Meaning, Part, fits
from .scene_model import Scene


class Query(NamedTuple):
    """A text to search with, in the words of the captions, and its meaning."""

    text: str
    meaning: Meaning


# Each of the first six is of another kind, and six or more of the default sample's scenes fit it. The others take the place
# of those that no scene of a smaller sample fits.
QUERIES = (
    Query("a white boat on the sea", Meaning((Part(1, colour="white", shape="boat"),), background="sea")),
    Query("three hearts", Meaning((Part(3, shape="heart"),))),
    Query("a star inside a ring", Meaning((Part(1, shape="star"), Part(1, shape="ring")), "inside")),
    Query("two large things on a black background", Meaning((Part(2, "large"),), background="black")),
    Query("a tiny pink house", Meaning((Part(1, "small", "pink", "house"),))),
    Query("a fish and a flower", Meaning((Part(1, shape="fish"), Part(1, shape="flower")))),
    Query("a house in the snow", Meaning((Part(1, shape="house"),), background="snow")),
    Query("a boat on the sea", Meaning((Part(1, shape="boat"),), background="sea")),
    Query("a large black cross", Meaning((Part(1, "large", "black", "cross"),))),
    Query("a heart inside a square", Meaning((Part(1, shape="heart"), Part(1, shape="square")), "inside")),
    Query("a big fish and a tiny star", Meaning((Part(1, "large", shape="fish"), Part(1, "small", shape="star")))),
    Query("two boats on a white background", Meaning((Part(2, shape="boat"),), background="white")),
)


def answerable(scenes: Sequence[Scene], count: int) -> list[Query]:
    """The first `count` of QUERIES that at least one of the scenes fits; fewer if no more of them have such a scene."""
    return [query for query in QUERIES if any(fits(query.meaning, scene) for scene in scenes)][:count]
