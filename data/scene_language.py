"""Sentences about a scene: captions with a meaning that can be checked, questions with answers.

Every caption puts a `Meaning` into words, and `fits(meaning, scene)` tells whether that meaning is true of any scene. Words
mean what people mean by them: "a red star" is exactly one, "three hearts" are exactly three, and two phrases name different things.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .scene_model import COLOURS, RELATIONS, SHAPES, Scene, Thing, holds

NUMBERS = ("no", "one", "two", "three", "four", "five")
CAPTIONS = 5  # captions of each scene

_SHAPE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {  # singular and plural; the first one is the usual word
    "circle": (("circle", "circles"), ("disc", "discs"), ("dot", "dots")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
    "house": (("house", "houses"),),
    "fish": (("fish", "fish"),),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
    "boat": (("boat", "boats"), ("sailing boat", "sailing boats")),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_COLOUR_WORDS = {"purple": ("purple", "violet")}

# Each background: where something is, and what the place is.
_WHERE: dict[str, tuple[str, ...]] = {
    "white": ("on a white background", "on plain white", "against a white backdrop"),
    "grey": ("on a grey background", "on plain grey", "against a grey backdrop"),
    "black": ("on a black background", "on plain black", "against a black backdrop"),
    "sky": ("in a cloudy blue sky", "up in the clouds", "against a blue sky with clouds"),
    "meadow": ("in a meadow", "on green grass", "on the lawn"),
    "beach": ("on the beach", "on a sandy shore", "at the seaside"),
    "sea": ("on the sea", "in the waves", "in deep blue water"),
    "night": ("at night", "under a dark night sky", "in the dark of the night"),
    "snow": ("in the snow", "on white snow", "in a snowy field"),
    "sunset": ("at sunset", "in the evening glow", "against an orange and purple sky"),
    "bricks": ("in front of a brick wall", "on a wall of bricks", "against red bricks"),
    "stripes": ("on pink stripes", "on a striped background", "against striped wallpaper"),
}
_PLACE: dict[str, tuple[str, ...]] = {
    "white": ("a white background", "an all-white picture"),
    "grey": ("a grey background", "an all-grey picture"),
    "black": ("a black background", "a black picture"),
    "sky": ("a cloudy sky", "a blue sky"),
    "meadow": ("a green meadow", "a grassy field"),
    "beach": ("a sandy beach", "a beach"),
    "sea": ("the sea", "blue water with waves"),
    "night": ("a dark night", "a night scene"),
    "snow": ("a snowy field", "a winter scene"),
    "sunset": ("a sunset", "an evening sky"),
    "bricks": ("a brick wall", "a wall"),
    "stripes": ("striped wallpaper", "pink and white stripes"),
}
_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} left of {b}",
        "{b} with {a} on its left",
        "{b} right of {a}",
    ),
    "above": ("{a} above {b}", "{b} below {a}", "{b} under {a}", "{a} over {b}", "{b} with {a} above it"),
    "inside": (
        "{a} inside {b}",
        "{b} around {a}",
        "{a} surrounded by {b}",
        "{b} with {a} in it",
        "{a} enclosed in {b}",
    ),
    "on": (
        "{a} on top of {b}",
        "{b} with {a} on top",
        "{a} sitting on {b}",
        "{a} carried by {b}",
        "{a} balanced on {b}",
    ),
    "beside": ("{a} next to {b}", "{b} next to {a}", "{a} beside {b}", "{a} and {b} side by side", "{a} close to {b}"),
}


@dataclass(frozen=True)
class Part:
    """A phrase: exactly `count` things that agree with every word given; None leaves a word open."""

    count: int
    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def matches(self, thing: Thing) -> bool:
        given = zip((self.size, self.colour, self.shape), thing.kind, strict=True)
        return all(word is None or word == truth for word, truth in given)


@dataclass(frozen=True)
class Meaning:
    """The claim of a caption: its parts, how parts[0] stands to parts[1], the background, how many things in all."""

    parts: tuple[Part, ...]
    relation: str | None = None
    background: str | None = None
    total: int | None = None


def fits(meaning: Meaning, scene: Scene) -> bool:
    """Whether a caption of this meaning is true of the scene."""
    if meaning.background not in (None, scene.background) or meaning.total not in (None, len(scene.things)):
        return False
    matched = [[thing for thing in scene.things if part.matches(thing)] for part in meaning.parts]
    if any(len(things) != part.count for things, part in zip(matched, meaning.parts, strict=True)):
        return False
    if len({id(thing) for things in matched for thing in things}) != sum(map(len, matched)):
        return False  # two phrases share a thing
    return meaning.relation is None or any(holds(meaning.relation, a, b) for a in matched[0] for b in matched[1])


def captions(scene: Scene) -> list[str]:
    """Five captions of a scene. Each names a different selection of its facts."""
    return [text for text, _ in captions_with_meaning(scene)]


def captions_with_meaning(scene: Scene) -> list[tuple[str, Meaning]]:
    """The captions of `captions`, each with its meaning."""
    rng = random.Random(f"words {scene.seed} {scene.split} {scene.index}")
    said: dict[str, Meaning] = {}
    ways = (_say_all, _say_relation, _say_place, _say_total, _say_parts)
    while len(said) < CAPTIONS:
        text, meaning = ways[len(said)](scene, rng)
        said[_sentence(text) if rng.random() < 0.5 else text] = meaning
    told = list(said.items())
    rng.shuffle(told)
    return told


def unique_share(scenes: Sequence[Scene]) -> float:
    """The share of the scenes' captions that are true of exactly one of the scenes, 0 to 1."""
    meanings = [meaning for scene in scenes for _, meaning in captions_with_meaning(scene)]
    return sum(sum(fits(meaning, scene) for scene in scenes) == 1 for meaning in meanings) / len(meanings)


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Four or five questions, each with a short answer and its type: count, colour, presence (yes or no), background and, if
    one is clear, relation. Where a colour is not clear, a second count takes its place."""
    rng = random.Random(f"questions {scene.seed} {scene.split} {scene.index}")
    group = rng.choice(_groups(scene))
    _, colour, shape = group[0].kind
    alike = sum(thing.shape == shape for thing in scene.things)
    asked = [(f"How many {_SHAPE_WORDS[shape][0][1]} are there?", str(alike), "count")]
    if all(thing.colour == colour for thing in scene.things if thing.shape == shape):
        verb, noun = ("is", _SHAPE_WORDS[shape][0][0]) if alike == 1 else ("are", _SHAPE_WORDS[shape][0][1])
        asked.append((f"What colour {verb} the {noun}?", colour, "colour"))
    else:
        asked.append(("How many things are in the picture?", str(len(scene.things)), "count"))
    if rng.random() < 0.5:
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    there = any(thing.colour == colour and thing.shape == shape for thing in scene.things)
    noun = f"{_article(colour)} {colour} {_SHAPE_WORDS[shape][0][0]}"
    asked.append((f"Is there {noun}?", "yes" if there else "no", "presence"))
    asked.append(("What is the background?", scene.background, "background"))
    related = [(name, a, b) for name, a, b in _related(scene) if name in ("left", "above", "inside", "on")]
    if related:
        name, a, b = rng.choice(related)
        words = {"left": "to the left of", "above": "above", "inside": "inside", "on": "on top of"}[name]
        if sum(holds(name, other, b) for other in scene.things) == 1:
            noun = _phrase(Part(1, *b.kind), rng).split(" ", 1)[1]
            asked.append((f"What is {words} the {noun}?", a.shape, "relation"))
    return asked


def _say_all(scene: Scene, rng: random.Random) -> tuple[str, Meaning]:
    """Up to three groups of things, and where they are."""
    parts = _some_parts(scene, rng, most=3)
    listing, where = _listing(parts, rng), rng.choice(_WHERE[scene.background])
    be = "are" if parts[0].count > 1 else "is"
    form = rng.choice(
        (
            "{all} {where}",
            "there {be} {all} {where}",
            "{all} can be seen {where}",
            "{where}, {all}",
            "a picture of {all} {where}",
        )
    )
    return form.format(all=listing, where=where, be=be), Meaning(parts, background=scene.background)


def _say_relation(scene: Scene, rng: random.Random) -> tuple[str, Meaning]:
    """The relation of two things. A scene without a clear relation is described by `_say_all`."""
    related = _related(scene)
    if not related:
        return _say_all(scene, rng)
    close = [case for case in related if case[0] in ("inside", "on", "beside")]
    name, a, b = rng.choice(close if close and rng.random() < 0.7 else related)
    parts = _part(scene, [a], rng), _part(scene, [b], rng)
    text = rng.choice(_RELATION_WORDS[name]).format(a=_phrase(parts[0], rng), b=_phrase(parts[1], rng))
    if rng.random() < 0.5:
        return f"{text}, {rng.choice(_WHERE[scene.background])}", Meaning(parts, name, scene.background)
    return text, Meaning(parts, name)


def _say_place(scene: Scene, rng: random.Random) -> tuple[str, Meaning]:
    """The background first, then one or two groups."""
    parts = _some_parts(scene, rng, most=2)
    form = rng.choice(
        (
            "{place} with {all}",
            "{place} and {all}",
            "{place}: {all}",
            "{place} behind {all}",
            "we see {place} with {all}",
        )
    )
    text = form.format(place=rng.choice(_PLACE[scene.background]), all=_listing(parts, rng))
    return text, Meaning(parts, background=scene.background)


def _say_total(scene: Scene, rng: random.Random) -> tuple[str, Meaning]:
    """The number of things, one group of them and, in more than half of the cases, the place."""
    total = len(scene.things)
    groups = _groups(scene)
    part = _part(scene, rng.choice(groups), rng, plain=0.0)
    if len(groups) == 1:
        form = rng.choice(("just {part}", "nothing but {part}", "{part} and nothing else", "only {part}"))
    else:
        among = "one of them {part}" if part.count == 1 else "{part} among them"
        noun, tail = (
            rng.choice(("things", "objects", "shapes")),
            rng.choice((among, "among them {part}", "including {part}")),
        )
        form = f"{NUMBERS[total]} {noun}, {tail}"
    text = form.format(part=_phrase(part, rng))
    if len(groups) == 1 or rng.random() < 0.6:
        return f"{text}, {rng.choice(_WHERE[scene.background])}", Meaning((part,), None, scene.background, total)
    return text, Meaning((part,), total=total)


def _say_parts(scene: Scene, rng: random.Random) -> tuple[str, Meaning]:
    """A fragment: the things alone, or one thing and the place."""
    parts = _some_parts(scene, rng, most=3, plain=0.0)
    listing = _listing(parts, rng)
    if len(parts) == 1:
        return f"{listing} {rng.choice(_WHERE[scene.background])}", Meaning(parts, background=scene.background)
    return rng.choice(("{}", "an image of {}", "there you can see {}", "{} together")).format(listing), Meaning(parts)


def _groups(scene: Scene) -> list[list[Thing]]:
    """The things of the scene, grouped by kind."""
    kinds: dict[tuple[str, str, str], list[Thing]] = {}
    for thing in scene.things:
        kinds.setdefault(thing.kind, []).append(thing)
    return list(kinds.values())


def _related(scene: Scene) -> list[tuple[str, Thing, Thing]]:
    """Every clear relation between two things, each the only one of its kind."""
    single = [group[0] for group in _groups(scene) if len(group) == 1]
    pairs = [(a, b) for a in single for b in single if a is not b]
    return [(name, a, b) for name in RELATIONS for a, b in pairs if holds(name, a, b, margin=1.4)]


def _some_parts(scene: Scene, rng: random.Random, most: int, plain: float = 0.1) -> tuple[Part, ...]:
    groups = _groups(scene)
    chosen = rng.sample(groups, min(most, len(groups)))
    return tuple(_part(scene, group, rng, plain) for group in chosen)


def _part(scene: Scene, group: list[Thing], rng: random.Random, plain: float = 0.1) -> Part:
    """A phrase for a group that fits nothing else in the scene. `plain` is the probability that it leaves the shape out."""
    size, colour, shape = group[0].kind
    part = Part(
        len(group),
        size if rng.random() < 0.45 else None,
        colour if rng.random() < 0.9 else None,
        None if rng.random() < plain else shape,
    )
    alone = sum(part.matches(thing) for thing in scene.things) == len(group)
    return part if alone and (part.colour or part.shape) else Part(len(group), size, colour, shape)


def _listing(parts: Sequence[Part], rng: random.Random) -> str:
    phrases = [_phrase(part, rng) for part in parts]
    return " and ".join(phrases) if len(phrases) < 3 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _phrase(part: Part, rng: random.Random) -> str:
    """`a little red heart`, `three moons`, `a large blue shape`."""
    words = [] if part.size is None else [rng.choice(_SIZE_WORDS[part.size])]
    if part.colour is not None:
        words.append(rng.choice(_COLOUR_WORDS.get(part.colour, (part.colour,))))
    forms = (("shape", "shapes"), ("thing", "things")) if part.shape is None else _SHAPE_WORDS[part.shape]
    singular, plural = forms[0] if rng.random() < 0.7 else rng.choice(forms)
    words.append(singular if part.count == 1 else plural)
    return " ".join([_article(words[0]) if part.count == 1 else NUMBERS[part.count], *words])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
