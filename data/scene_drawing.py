"""Draws a scene: polygons on a background, at four times the final size, then averaged down (antialiasing)."""

import math
import random
from functools import cache

from PIL import Image, ImageDraw

from .scene_model import PICTURE, Scene, Thing

Point = tuple[float, float]
Colour = tuple[int, int, int]

_SCALE = 4
_SIDE = PICTURE * _SCALE
_PAINT: dict[str, Colour] = {
    "red": (216, 36, 40),
    "orange": (245, 138, 28),
    "yellow": (250, 216, 48),
    "green": (44, 158, 66),
    "blue": (42, 92, 216),
    "purple": (128, 52, 172),
    "pink": (250, 140, 188),
    "brown": (128, 78, 42),
    "black": (22, 22, 26),
    "white": (250, 250, 250),
}


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128 x 128. The same scene gives the same pixels."""
    canvas = _background(scene.background, scene.variant).copy()
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing)
    return canvas.reduce(_SCALE)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    cosine, sine = math.cos(math.radians(thing.lean)), math.sin(math.radians(thing.lean))
    body = _PAINT[thing.colour]
    detail = _mix(body, (0, 0, 0), 0.35) if sum(body) > 120 else _mix(body, (255, 255, 255), 0.35)
    for number, outline in enumerate(_outlines(thing.shape)):
        points = [
            (
                (thing.x + thing.r * (u * cosine - v * sine)) * _SCALE,
                (thing.y + thing.r * (u * sine + v * cosine)) * _SCALE,
            )
            for u, v in outline
        ]
        draw.polygon(points, fill=detail if number else body)


@cache
def _outlines(shape: str) -> list[list[Point]]:
    """The polygons of a shape: the body first, then details in a second tone. Points (u right, v down) are in units of its radius.

    ValueError for an unknown shape."""
    match shape:
        case "circle":
            return [_arc(1, 0, 360)]
        case "square":
            return [[(-1, -1), (1, -1), (1, 1), (-1, 1)]]
        case "triangle":
            return [[(0, -1), (1.1, 1), (-1.1, 1)]]
        case "star":
            corners = [(1.1 if n % 2 == 0 else 0.46, math.radians(36 * n - 90)) for n in range(10)]
            return [[(d * math.cos(angle), d * math.sin(angle) + 0.1) for d, angle in corners]]
        case "heart":
            turns = [math.radians(6 * n) for n in range(60)]
            return [[(math.sin(t) ** 3 * 1.1, -_heart_height(t) / 14.5 - 0.17) for t in turns]]
        case "cross":
            w = 0.34
            quarter = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
            return [[*quarter, *[(-u, -v) for u, v in quarter]]]
        case "ring":  # the inner edge runs backwards, so that the hole stays empty
            return [_arc(1, 0, 360) + _arc(0.7, 360, 0)]
        case "moon":
            return [_arc(1, 60, 300) + _arc(0.87, 263, 97, shift=0.61)]
        case "house":
            body: list[Point] = [(-0.8, 1), (-0.8, -0.1), (-1.1, -0.1), (0, -1), (1.1, -0.1), (0.8, -0.1), (0.8, 1)]
            return [body, [(-0.22, 1), (-0.22, 0.35), (0.22, 0.35), (0.22, 1)]]
        case "fish":
            sides = [
                (0.9 * math.cos(t) - 0.25, math.sin(t) * 0.62) for t in (math.radians(6 * n) for n in range(5, 56))
            ]
            tail: list[Point] = [(1.1, -1), (0.92, 0), (1.1, 1)]
            return [sides + tail, [(-0.6 + u, -0.15 + v) for u, v in _arc(0.12, 0, 360)]]
        case "flower":
            petals = [(0.72 + 0.28 * math.cos(5 * t), t) for t in (math.radians(5 * n) for n in range(72))]
            return [[(d * math.sin(t), -d * math.cos(t)) for d, t in petals], _arc(0.28, 0, 360)]
        case "boat":
            hull: list[Point] = [
                (-1.1, 0.4),
                (-0.08, 0.4),
                (-0.08, 0.25),
                (-0.9, 0.25),
                (0, -1),
                (0.85, 0.25),
                (0.08, 0.25),
            ]
            return [[*hull, (0.08, 0.4), (1.1, 0.4), (0.7, 1), (-0.7, 1)]]
    raise ValueError(f"no drawing of a {shape!r}")


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def _arc(radius: float, start: int, stop: int, shift: float = 0.0) -> list[Point]:
    """Points of an arc around (shift, 0), from angle `start` to `stop` in degrees, about every 6 degrees."""
    steps = max(1, abs(stop - start) // 6)
    angles = (math.radians(start + (stop - start) * n / steps) for n in range(steps + 1))
    return [(shift + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


@cache
def _background(name: str, variant: int) -> Image.Image:
    """Version `variant` of a background, at drawing size (four times the picture's). ValueError for an unknown name."""
    rng = random.Random(f"{name} {variant}")
    light = rng.uniform(-8, 8)
    horizon = int(_SIDE * rng.uniform(0.3, 0.45))
    match name:
        case "white":
            return Image.new("RGB", (_SIDE, _SIDE), _shift((246, 246, 246), light))
        case "grey":
            return Image.new("RGB", (_SIDE, _SIDE), _shift((148, 150, 154), light))
        case "black":
            return Image.new("RGB", (_SIDE, _SIDE), _shift((10, 10, 10), light))
        case "sky":
            image = _gradient(_shift((92, 166, 240), light), _shift((176, 216, 250), light), _SIDE)
            for _ in range(4):
                _cloud(ImageDraw.Draw(image), rng.uniform(0, _SIDE), rng.uniform(0, _SIDE), rng.uniform(26, 44))
            return image
        case "meadow":
            return _land(
                _shift((196, 226, 246), light), _shift((226, 240, 250), light), (96, 186, 72), (66, 150, 52), horizon
            )
        case "beach":
            return _land(
                _shift((70, 150, 222), light), _shift((96, 190, 226), light), (244, 222, 160), (226, 196, 124), horizon
            )
        case "snow":
            return _land(
                _shift((150, 168, 190), light),
                _shift((188, 202, 218), light),
                (250, 252, 255),
                (232, 240, 250),
                horizon,
            )
        case "sea":
            image = _gradient(_shift((30, 108, 160), light), _shift((16, 66, 122), light), _SIDE)
            _waves(ImageDraw.Draw(image), rng)
            return image
        case "night":
            image = _gradient((14, 16, 52), _shift((40, 44, 96), light), _SIDE)
            _hills(ImageDraw.Draw(image), rng, (8, 12, 24))
            return image
        case "sunset":
            return _gradient(_shift((104, 62, 140), light), _shift((252, 160, 84), light), _SIDE)
        case "bricks":
            return _bricks(_shift((158, 84, 66), light), rng.randrange(64))
        case "stripes":
            return _stripes(_shift((250, 236, 240), light), _shift((244, 190, 208), light), rng.randrange(64))
    raise ValueError(f"no drawing of the background {name!r}")


def _gradient(top: Colour, bottom: Colour, height: int) -> Image.Image:
    """A picture that goes from colour `top` to colour `bottom`, as wide as the drawing and `height` pixels high."""
    column = Image.new("RGB", (1, height))
    column.putdata([_mix(top, bottom, row / height) for row in range(height)])
    return column.resize((_SIDE, height))


def _land(sky_top: Colour, sky_bottom: Colour, near: Colour, far: Colour, horizon: int) -> Image.Image:
    """Two gradients that meet at the horizon (pixels from the top)."""
    image = _gradient(near, far, _SIDE)
    image.paste(_gradient(sky_top, sky_bottom, horizon), (0, 0))
    return image


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    for dx, dy, grow in ((-1.1, 0.2, 0.8), (0, 0, 1.1), (1.1, 0.25, 0.75)):
        r = size * grow
        draw.ellipse(
            (x + dx * size - r, y + dy * size - 0.7 * r, x + dx * size + r, y + dy * size + 0.7 * r), (236, 244, 252)
        )


def _waves(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for y in range(30, _SIDE, 56):
        start = rng.randrange(-60, 0)
        for x in range(start, _SIDE, 60):
            draw.arc((x, y, x + 60, y + 26), 20, 160, (112, 176, 214), 5)


def _hills(draw: ImageDraw.ImageDraw, rng: random.Random, colour: Colour) -> None:
    for x in (0.1, 0.5, 0.95):
        width, height = rng.uniform(0.35, 0.5) * _SIDE, rng.uniform(0.1, 0.22) * _SIDE
        draw.ellipse((x * _SIDE - width, _SIDE - height, x * _SIDE + width, _SIDE + height), colour)


def _bricks(colour: Colour, offset: int) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), _mix(colour, (220, 200, 190), 0.6))
    draw = ImageDraw.Draw(image)
    for row, y in enumerate(range(0, _SIDE, 40)):
        for x in range(-offset - 48 * (row % 2), _SIDE, 96):
            draw.rectangle((x + 4, y + 4, x + 92, y + 36), colour)
    return image


def _stripes(light: Colour, dark: Colour, offset: int) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), light)
    draw = ImageDraw.Draw(image)
    for x in range(-offset, _SIDE, 96):
        draw.rectangle((x, 0, x + 48, _SIDE), dark)
    return image


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """The mix of two colours: 0 gives `a`, 1 gives `b`."""
    red, green, blue = (round(u + (v - u) * share) for u, v in zip(a, b, strict=True))
    return red, green, blue


def _shift(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(255, max(0, round(part + light))) for part in colour)
    return red, green, blue
