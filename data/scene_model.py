"""Scenes: a few coloured things on a background, drawn at random, and how they stand to each other.

A scene is decided by numbers alone: `make_scene` is a pure function of (seed, split, index). Lengths are pixels of the
128 x 128 picture; x grows to the right and y downwards; a thing of radius r is 2r tall and about as wide.
"""

import random
import zlib
from dataclasses import dataclass

PICTURE = 128  # width and height in pixels
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "house", "fish", "flower", "boat")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RADII = {"small": (10, 11), "large": (20, 23)}
RELATIONS = ("left", "above", "inside", "on", "beside")  # how the first thing stands to the second
CONTAINERS = ("circle", "square", "ring")

# Each background with the colours that would not stand out on it. Every colour stands out on grey.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "white": ("white",),
    "grey": (),
    "black": ("black",),
    "sky": ("white", "blue"),
    "meadow": ("green", "white"),
    "beach": ("yellow", "blue"),
    "sea": ("blue", "green"),
    "night": ("black", "blue", "purple"),
    "snow": ("white",),
    "sunset": ("orange", "red", "pink", "purple"),
    "bricks": ("red", "orange", "brown"),
    "stripes": ("pink", "white"),
}
VARIANTS = 6  # versions of each background, with different tones and horizons

_GAP = 5  # pixels kept free between things that do not touch on purpose
_VAL_BUCKET, _TEST_BUCKET, _BUCKETS = 14, 15, 16


@dataclass(frozen=True)
class Thing:
    """One thing: its shape, colour and size, its centre (x, y), its radius r (it is 2r tall) and its lean in degrees."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    r: int
    lean: int = 0

    @property
    def kind(self) -> tuple[str, str, str]:
        """(size, colour, shape): the words that describe it without its place."""
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Things on a background."""

    seed: int
    split: str
    index: int
    background: str
    variant: int
    things: tuple[Thing, ...]

    @property
    def name(self) -> str:
        """Split and index, such as "train-00042": unique among the scenes of a seed."""
        return f"{self.split}-{self.index:05d}"


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene with this number. The same arguments give the same scene on every machine.

    The content of a scene (kinds of things and background, not their places) decides its split. So train, val and test never
    share a scene, even between seeds, and val and test hold combinations that are new to training.
    """
    rng = random.Random(f"scene {seed} {split} {index}")
    while True:
        things = _draw_things(rng)
        colours = {thing.colour for thing in things}
        background = rng.choice([name for name, hidden in BACKGROUNDS.items() if colours.isdisjoint(hidden)])
        if split_of(background, things) == split:
            return Scene(seed, split, index, background, rng.randrange(VARIANTS), things)


def scene_named(seed: int, name: str) -> Scene:
    """The scene whose `Scene.name` this is. ValueError if it is no such name."""
    split, _, index = name.partition("-")
    if split not in ("train", "val", "test") or not index.isdecimal():
        raise ValueError(f"{name!r} is not the name of a scene; a name is such as 'train-00042'")
    return make_scene(seed, split, int(index))


def split_of(background: str, things: tuple[Thing, ...]) -> str:
    """The one split in which this combination of things and background may appear."""
    content = f"{background} {sorted(thing.kind for thing in things)}"
    bucket = zlib.crc32(content.encode()) % _BUCKETS
    return {_VAL_BUCKET: "val", _TEST_BUCKET: "test"}.get(bucket, "train")


def holds(relation: str, a: Thing, b: Thing, margin: float = 1.0) -> bool:
    """Whether `a` stands in `relation` to `b`. A margin above 1 accepts only clear cases of left and above.

    ValueError for an unknown relation."""
    dx, dy = b.x - a.x, b.y - a.y
    match relation:
        case "left":
            return dx >= 12 * margin and dx >= margin * abs(dy)
        case "above":
            return dy >= 12 * margin and dy >= margin * abs(dx)
        case "inside":
            return max(abs(dx), abs(dy)) < b.r - a.r
        case "on":
            return abs(dy - a.r - b.r) <= 2 and abs(dx) <= 8
        case "beside":
            return abs(dy) <= 8 and abs(abs(dx) - a.r - b.r) <= 8
    raise ValueError(f"unknown relation {relation!r}; known are {', '.join(RELATIONS)}")


def _draw_things(rng: random.Random) -> tuple[Thing, ...]:
    plan = rng.choices((_alone, _scattered, _touching, _crowd), weights=(8, 42, 25, 25))[0]
    while True:  # a crowded draw may find no room: draw again
        things = plan(rng)
        if things:
            return things


def _alone(rng: random.Random) -> tuple[Thing, ...]:
    return _place(rng, [], [_kind(rng)])


def _scattered(rng: random.Random) -> tuple[Thing, ...]:
    """Two to four different things. Some share a shape or a colour, so that a caption needs both words."""
    kinds = [_kind(rng) for _ in range(rng.choices((2, 3, 4), weights=(5, 4, 2))[0])]
    if rng.random() < 0.25:
        _, colour, shape = kinds[0]
        kinds[1] = (kinds[1][0], kinds[1][1], shape) if rng.random() < 0.5 else (kinds[1][0], colour, kinds[1][2])
    return _place(rng, [], kinds) if len(set(kinds)) == len(kinds) else ()


def _crowd(rng: random.Random) -> tuple[Thing, ...]:
    """Two to five alike, often with one other thing among them."""
    size, colour, shape = _kind(rng)
    number = rng.choice((2, 3, 4, 5))
    kinds = [(size if number < 4 else "small", colour, shape)] * number
    other = _kind(rng)
    if number < 5 and rng.random() < 0.6 and other[1] != colour and other[2] != shape:
        kinds.append(other)
    return _place(rng, [], kinds)


def _touching(rng: random.Random) -> tuple[Thing, ...]:
    """A thing inside, on or beside another, sometimes with a third one elsewhere."""
    (size, colour, shape), (base_size, base_colour, base_shape) = _kind(rng), _kind(rng)
    if colour == base_colour or shape == base_shape:
        return ()
    relation = rng.choice(("inside", "on", "beside"))
    if relation == "inside":
        size, base_size, base_shape = "small", "large", rng.choice(CONTAINERS)
        if shape == base_shape:
            return ()
    radius, base_radius = rng.randint(*RADII[size]), rng.randint(*RADII[base_size])
    x, y = (
        rng.randint(base_radius + 3, PICTURE - base_radius - 3),
        rng.randint(base_radius + 3, PICTURE - base_radius - 3),
    )
    reach = radius + base_radius
    dx, dy = {
        "inside": (rng.randint(-2, 2), rng.randint(-2, 2)),
        "on": (rng.randint(-5, 5), -reach + 1),
        "beside": (rng.choice((-1, 1)) * (reach + rng.randint(3, 6)), rng.randint(-4, 4)),
    }[relation]
    base = Thing(base_shape, base_colour, base_size, x, y, base_radius)
    thing = Thing(shape, colour, size, x + dx, y + dy, radius)
    if not _in_picture(thing):
        return ()
    third = _kind(rng)
    free = rng.random() < 0.4 and third[1] not in (colour, base_colour) and third[2] not in (shape, base_shape)
    return _place(rng, [base, thing], [third] if free else [])


def _kind(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(("small", "large")), rng.choice(COLOURS), rng.choice(SHAPES)


def _place(rng: random.Random, placed: list[Thing], kinds: list[tuple[str, str, str]]) -> tuple[Thing, ...]:
    """`placed` and one thing of each of `kinds`, apart from each other. Empty if there is no room."""
    for size, colour, shape in kinds:
        r = rng.randint(*RADII[size])
        for _ in range(30):
            x, y = rng.randint(r + 3, PICTURE - r - 3), rng.randint(r + 3, PICTURE - r - 3)
            if all(max(abs(x - other.x), abs(y - other.y)) > r + other.r + _GAP for other in placed):
                placed = [*placed, Thing(shape, colour, size, x, y, r, rng.randint(-12, 12))]
                break
        else:
            return ()
    return tuple(placed)


def _in_picture(thing: Thing) -> bool:
    return all(thing.r + 2 <= centre <= PICTURE - thing.r - 2 for centre in (thing.x, thing.y))
