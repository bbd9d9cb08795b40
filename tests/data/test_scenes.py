"""The built-in sample: the same bytes every time, captions that are true, splits that do not meet."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from qf.data.scene_model import BACKGROUNDS, COLOURS, PICTURE, SHAPES, split_of
from qf.data.scenes import (
    Meaning,
    Part,
    Scene,
    Thing,
    captions,
    captions_with_meaning,
    fits,
    holds,
    make_scene,
    questions,
    render,
    unique_share,
    write_sample,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(0, split, index) for split in ("train", "val", "test") for index in range(120)]


@pytest.fixture(scope="module")
def scenes_of_the_test_split() -> list[Scene]:
    return [make_scene(0, "test", index) for index in range(500)]


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_sample(tmp_path / name, train=6, val=2, test=3, seed=5).parent for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) == 6 + 2 + 3 + 2  # no temporary file is left
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    small, large = (write_sample(tmp_path / str(n), train=n, val=1, test=1).parent for n in (2, 4))
    for path in (small / "images").iterdir():
        assert path.read_bytes() == (large / "images" / path.name).read_bytes()


def test_the_sample_has_a_picture_five_captions_and_questions_for_each_scene(tmp_path: Path) -> None:
    table = write_sample(tmp_path, train=4, val=2, test=3)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert table == tmp_path / "captions.csv"
    assert list(rows[0]) == ["image", "caption", "split"]
    assert len(rows) == 5 * 9
    assert len({row["image"] for row in rows}) == 9
    assert all((tmp_path / row["image"]).exists() for row in rows)
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {tuple(question) for question in asked} == {("image", "question", "answer", "type", "split")}
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        images = {row["image"] for row in rows if row["split"] == split}
        assert len(images) == count == len({question["image"] for question in asked if question["split"] == split})


def test_splits_never_share_a_scene() -> None:
    contents = {
        split: {
            (scene.background, tuple(sorted(thing.kind for thing in scene.things)))
            for seed in (0, 1)
            for scene in (make_scene(seed, split, index) for index in range(250))
        }
        for split in ("train", "val", "test")
    }
    assert not contents["train"] & contents["val"]
    assert not contents["train"] & contents["test"]
    assert not contents["val"] & contents["test"]


def test_scenes_are_well_formed(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert split_of(scene.background, scene.things) == scene.split
        assert 1 <= len(scene.things) <= 5
        assert not {thing.colour for thing in scene.things} & set(BACKGROUNDS[scene.background])
        for thing in scene.things:
            assert all(thing.r < centre < PICTURE - thing.r for centre in (thing.x, thing.y))
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_things_are_visible(scenes: list[Scene]) -> None:
    """Taking any thing out of a scene changes a good part of its box."""
    for scene in scenes[:60]:
        for thing in scene.things:
            rest = tuple(other for other in scene.things if other is not thing)
            without = Scene(scene.seed, scene.split, scene.index, scene.background, scene.variant, rest)
            box = (thing.x - thing.r, thing.y - thing.r, thing.x + thing.r, thing.y + thing.r)
            seen, gone = (np.asarray(render(one).crop(box), np.int16) for one in (scene, without))
            assert (np.abs(seen - gone).max(-1) > 40).mean() > 0.15, (scene, thing)


def test_each_scene_has_five_different_true_captions(scenes: list[Scene]) -> None:
    for scene in scenes:
        told = captions_with_meaning(scene)
        assert captions(scene) == [text for text, _ in told]
        assert len({text for text, _ in told}) == 5
        for text, meaning in told:
            assert fits(meaning, scene), (text, scene)
            assert 3 <= len(text.split()) <= 25, text
            assert not re.search(
                r"\ban? [a-z]+s\b(?! sign)|\ba [aeiou]|\ban [^aeiou]|  |\bNone\b", text.replace("cross", "x")
            ), text


def test_captions_name_the_colours_of_their_meaning_and_no_others(scenes: list[Scene]) -> None:
    """Every colour and shape of a meaning is in the words, and no other colour of a thing."""
    for scene in scenes:
        for text, meaning in captions_with_meaning(scene):
            words = text.lower().replace("violet", "purple")
            for part in meaning.parts:
                assert part.colour is None or part.colour in words, text
            named = {thing.colour for thing in scene.things} - {part.colour for part in meaning.parts}
            things = re.sub(
                r"(plain|all-|striped|brick|red bricks|pink (and white )?stripes|white snow|green (grass|meadow)).*",
                "",
                words,
            )
            for colour in named:
                assert not re.search(rf"\b{colour} (?!background|backdrop|picture|sky|water)\w+", things), (
                    text,
                    colour,
                )


def test_unique_share_equals_the_naive_count(scenes: list[Scene]) -> None:
    sample = scenes[:40]

    def naive(meaning: Meaning, scene: Scene) -> bool:
        """The same claim, by listing what is there."""
        found = []
        for part in meaning.parts:
            wanted = {"size": part.size, "colour": part.colour, "shape": part.shape}
            fit = [n for n, t in enumerate(scene.things) if all(getattr(t, k) == v for k, v in wanted.items() if v)]
            if len(fit) != part.count:
                return False
            found.append(fit)
        every = [n for fit in found for n in fit]
        if len(every) != len(set(every)):
            return False
        if meaning.background and meaning.background != scene.background:
            return False
        if meaning.total and meaning.total != len(scene.things):
            return False
        return not meaning.relation or holds(meaning.relation, *(scene.things[fit[0]] for fit in found))

    meanings = [meaning for scene in sample for _, meaning in captions_with_meaning(scene)]
    expected = [sum(naive(meaning, scene) for scene in sample) for meaning in meanings]
    assert unique_share(sample) == expected.count(1) / len(expected)


def test_captions_of_the_test_split_tell_scenes_apart(scenes_of_the_test_split: list[Scene]) -> None:
    assert unique_share(scenes_of_the_test_split) >= 0.8


def test_a_phrase_counts_exactly() -> None:
    stars = tuple(Thing("star", "red", "small", 20 + 30 * n, 64, 10) for n in range(3))
    scene = Scene(0, "train", 0, "grey", 0, (*stars, Thing("heart", "red", "large", 30, 100, 20)))
    assert fits(Meaning((Part(3, colour="red", shape="star"),)), scene)
    assert not fits(Meaning((Part(1, colour="red", shape="star"),)), scene)
    assert fits(Meaning((Part(4, colour="red"),), total=4, background="grey"), scene)
    assert not fits(Meaning((Part(1, shape="heart"), Part(1, size="large"))), scene)  # one thing for two phrases
    assert fits(Meaning((Part(3, shape="star"), Part(1, shape="heart")), background="grey"), scene)
    assert not fits(Meaning((Part(1, shape="heart"),), background="night"), scene)


@pytest.mark.parametrize(
    ("relation", "offset", "radius"),
    [
        ("left", (-40, 5), 10),
        ("above", (3, -50), 10),
        ("inside", (1, -2), 10),
        ("on", (4, -31), 10),
        ("beside", (34, 2), 10),
    ],
)
def test_each_relation_holds_in_one_direction_unless_it_is_beside(
    relation: str, offset: tuple[int, int], radius: int
) -> None:
    base = Thing("square", "blue", "large", 64, 64, 22)
    thing = Thing("star", "red", "small", 64 + offset[0], 64 + offset[1], radius)
    assert holds(relation, thing, base)
    assert not holds("inside", base, thing)
    assert not holds(relation, base, thing) or relation == "beside"


def test_an_unknown_relation_is_an_error_that_names_it() -> None:
    thing = Thing("star", "red", "small", 64, 64, 10)
    with pytest.raises(ValueError, match="unknown relation 'under'"):
        holds("under", thing, thing)


def test_answers_are_true_of_the_scene(scenes: list[Scene]) -> None:
    """Each question read again from its words, and answered by looking at the things."""
    singular = {"fish": "fish"} | {
        f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES if shape != "fish"
    }
    heard = set()
    for scene in scenes:
        asked = questions(scene)
        assert len({question for question, *_ in asked}) == len(asked) >= 3
        for question, answer, kind in asked:
            words = question.rstrip("?").split()
            match words:
                case ["How", "many", "things", *_]:
                    expected, named = str(len(scene.things)), "count"
                case ["How", "many", noun, "are", "there"]:
                    expected, named = str(sum(thing.shape == singular[noun] for thing in scene.things)), "count"
                case ["What", "colour", "is" | "are", "the", noun]:
                    shape = singular.get(noun, noun)
                    named = "colour"
                    (expected,) = {thing.colour for thing in scene.things if thing.shape == shape}
                case ["Is", "there", _, colour, shape]:
                    found = any((thing.colour, thing.shape) == (colour, shape) for thing in scene.things)
                    expected, named = "yes" if found else "no", "presence"
                case ["What", "is", "the", "background"]:
                    expected, named = scene.background, "background"
                case _:  # a relation: some thing of that shape stands so to another
                    name = next(n for n in ("left", "above", "inside", "on") if n in words)
                    things = scene.things
                    assert any(holds(name, a, b) for a in things if a.shape == answer for b in things if b is not a)
                    expected, named = answer, "relation"
            heard.add(words[1])
            assert (answer, kind) == (expected, named), (question, scene)
    assert heard == {"many", "colour", "there", "is"}
