"""The queries of the demo: true words for their meanings, of different kinds, and answered by the sample."""

import re

import pytest
from qf.data.scene_language import _COLOUR_WORDS, _PLACE, _RELATION_WORDS, _SHAPE_WORDS, _SIZE_WORDS, _WHERE, NUMBERS
from qf.data.scenes import QUERIES, Scene, answerable, captions, fits, make_scene, scene_named

COUNTS = {"train": 4000, "val": 250, "test": 500}  # of the default sample


@pytest.fixture(scope="module")
def sample() -> list[Scene]:
    return [make_scene(0, split, index) for split, count in COUNTS.items() for index in range(count)]


def test_each_query_is_in_the_words_of_the_captions(sample: list[Scene]) -> None:
    vocabulary = {word for scene in sample for text in captions(scene) for word in re.findall(r"\w+", text.lower())}
    for text, _ in QUERIES:
        assert set(text.split()) <= vocabulary, text


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.text)
def test_the_words_of_a_query_say_its_meaning(query) -> None:
    """The text is built again from the meaning, with every choice of words that captions have."""

    def phrases(part):
        nouns = _SHAPE_WORDS[part.shape] if part.shape else (("shape", "shapes"), ("thing", "things"))
        for size in _SIZE_WORDS[part.size] if part.size else ("",):
            for colour in _COLOUR_WORDS.get(part.colour, (part.colour,)) if part.colour else ("",):
                for singular, plural in nouns:
                    number = "a" if part.count == 1 else NUMBERS[part.count]
                    noun = singular if part.count == 1 else plural
                    yield " ".join(word for word in (number, size, colour, noun) if word)

    meaning = query.meaning
    texts = list(phrases(meaning.parts[0]))
    if len(meaning.parts) == 2:
        forms = _RELATION_WORDS[meaning.relation] if meaning.relation else ("{a} and {b}",)
        texts = [form.format(a=a, b=b) for form in forms for a in texts for b in phrases(meaning.parts[1])]
    if meaning.background:
        texts = [f"{text} {where}" for text in texts for where in _WHERE[meaning.background]]
    else:
        assert not any(place in query.text for places in (*_WHERE.values(), *_PLACE.values()) for place in places)
    assert query.text in texts


def test_the_default_sample_has_six_pictures_for_each_of_six_queries_of_different_kinds(sample: list[Scene]) -> None:
    chosen = answerable(sample, 6)
    assert chosen == list(QUERIES[:6])
    for _, meaning in chosen:
        assert sum(fits(meaning, scene) for scene in sample) >= 6
    kinds = {
        (len(meaning.parts), part.count, bool(part.size), bool(part.colour), meaning.relation, meaning.background)
        for _, meaning in chosen
        for part in meaning.parts[:1]
    }
    assert len(kinds) == 6


def test_queries_that_no_scene_fits_give_way_to_others() -> None:
    small = [
        make_scene(0, split, index)
        for split, count in (("train", 48), ("val", 3), ("test", 6))
        for index in range(count)
    ]
    chosen = answerable(small, 6)
    assert len(chosen) == 6
    assert chosen != list(QUERIES[:6])
    assert all(any(fits(meaning, scene) for scene in small) for _, meaning in chosen)
    assert answerable([], 6) == []


def test_a_scene_is_found_by_its_name() -> None:
    for scene in (make_scene(0, "train", 42), make_scene(7, "test", 123456)):
        assert scene_named(scene.seed, scene.name) == scene
    for name in ("dog", "photo-1", "train-x"):
        with pytest.raises(ValueError, match=name):
            scene_named(0, name)
