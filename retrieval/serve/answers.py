"""What a search answers: as JSON, and as the cards and chips of the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

from PIL import Image
from pydantic import BaseModel, Field, StringConstraints

from ...pipeline.errors import UsageError
from ..compose import OPERATOR, parse
from ..searcher import Hit
from .collection import UPLOAD, Asked, Opened

MOST_HITS, A_PAGE, MOST_LETTERS, MOST_TERMS = 240, 48, 1000, 16
LIKELY = 0.5  # hits that match with a lower probability are folded
Words = Annotated[str, StringConstraints(max_length=MOST_LETTERS)]


class Question(BaseModel):
    """The parameters of a search."""

    q: Words = Field("", description='A text, or several: "2:golden retriever + images/1.jpg - snow".')
    plus: list[Words] = Field([], max_length=MOST_TERMS, description="More texts, keys of the index or uploads.")
    minus: list[Words] = Field([], max_length=MOST_TERMS, description="Texts, keys or uploads to avoid.")
    k: int = Field(A_PAGE, ge=1, le=MOST_HITS, description="The number of hits.")
    rerank: bool = Field(False, description="Re-rank by image-text matching; for one text alone.")
    split: Words = Field("", description="Only images of this split.")
    scorer: Literal["mix", "itc", "encoder"] = Field("mix", description="Whose scores rank.")

    def asked(self) -> Asked:
        return Asked(self.q, tuple(self.plus), tuple(self.minus), self.k, self.rerank, self.split, self.scorer)


class Found(BaseModel):
    """A hit."""

    rank: int
    row: int
    key: str
    score: float
    image: str | None
    captions: list[str]
    thumbnail: str = Field(description="Its address on this server.")
    picture: str = Field(description="Its address on this server.")
    itc: float | None = None
    itm: float | None = None
    probability: float | None = Field(None, description="That text and picture match, if it was re-ranked.")
    likely: bool | None = Field(None, description="Whether the probability is at least one half.")


class Answer(BaseModel):
    """The hits of a search."""

    hits: list[Found]
    warnings: list[str] = Field(description="What to know about the hits, such as words that the model does not know.")
    seconds: float


class Uploaded(BaseModel):
    """An uploaded picture, which stands for itself in `plus` and `minus` for a while."""

    name: str
    thumbnail: str


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class Health(BaseModel):
    """That the server is up."""

    status: Literal["ok"]


def image_address(opened: Opened, row: int, size: str) -> str:
    """Where an image of the index is served. The version keeps a browser from showing one of another index."""
    return f"/images/{row}?{urlencode({'size': size, 'v': opened.version})}"


def found(opened: Opened, hit: Hit) -> Found:
    """A hit with its addresses."""
    row = opened.searcher.row(hit.key)
    assert row is not None
    return Found(
        rank=hit.rank,
        row=row,
        key=hit.key,
        score=hit.score,
        image=hit.image,
        captions=hit.captions,
        thumbnail=image_address(opened, row, "thumbnail"),
        picture=image_address(opened, row, "large"),
        itc=hit.itc,
        itm=hit.itm,
        probability=hit.probability,
        likely=None if hit.probability is None else hit.probability >= LIKELY,
    )


# ---- the page ----


@dataclass(frozen=True)
class Card:
    """A picture on the page."""

    row: int
    title: str
    captions: list[str]
    width: int
    height: int
    thumbnail: str
    picture: str
    more: str
    less: str  # empty if nothing would be looked for
    heat: str  # the address of its heat map; empty if there is none
    score: str
    share: int  # of the bar, 0 to 100
    likely: bool


@dataclass(frozen=True)
class Chip:
    """A term of the query besides the text in the field."""

    sign: str
    label: str
    thumbnail: str  # empty for a text
    remove: str  # the address of the search without it


def address(asked: Asked) -> str:
    """The page's address of a question."""
    pairs = [("q", asked.q)] if asked.q else []
    pairs += [("plus", value) for value in asked.plus] + [("minus", value) for value in asked.minus]
    pairs += [("split", asked.split)] if asked.split else []
    pairs += [("rerank", "1")] if asked.rerank else []
    pairs += [("k", str(asked.k))] if asked.k != A_PAGE else []
    return "/?" + urlencode(pairs) if pairs else "/"


def is_one_text(asked: Asked) -> bool:
    """Whether a question is one text, which can be re-ranked and explained."""
    return bool(asked.q.strip()) and not asked.plus and not asked.minus and not OPERATOR.search(asked.q)


def _text(asked: Asked) -> str:
    """The text that a heat map explains: the first one that is looked for. Empty if there is none."""
    try:
        terms = parse(asked.q) if asked.q.strip() else []
    except UsageError:
        return ""
    texts = [str(term.value) for term in terms if term.weight > 0 and isinstance(term.value, str)]
    return next((text for text in texts if not text.startswith(UPLOAD)), "")


def cards(opened: Opened, asked: Asked, hits: Sequence[Hit]) -> list[Card]:
    """The hits as cards. The bar is the probability, or else the score as a share of the first one's."""
    top = max((hit.score for hit in hits), default=0.0)
    heat = f"&{urlencode({'q': _text(asked)})}" if opened.matches and _text(asked) else ""
    made = []
    for hit in hits:
        known = found(opened, hit)
        share = hit.probability if hit.probability is not None else (hit.score / top if top > 0 else 0.0)
        score = f"{hit.score:.3f}" if hit.probability is None else f"{hit.probability:.0%} match"
        made.append(
            replace(
                _card(opened, asked, known.row, hit.key, hit.captions, hit.thumbnail),
                heat=f"/explain/{known.row}?v={opened.version}{heat}" if heat else "",
                score=score,
                share=round(100 * min(max(share, 0.0), 1.0)),
                likely=known.likely is not False,
            )
        )
    return made


def first_cards(opened: Opened, count: int) -> list[Card]:
    """Some pictures of the index, for a page without a query."""
    rows = [(row, opened.row(row)) for row in opened.first_rows(count)]
    return [_card(opened, Asked(), row, known["key"], known["captions"], known["thumbnail"]) for row, known in rows]


def _card(opened: Opened, asked: Asked, row: int, key: str, captions: list[str], thumbnail: bytes) -> Card:
    with Image.open(io.BytesIO(thumbnail)) as image:
        width, height = image.size
    asked = replace(asked, rerank=False, k=A_PAGE)
    plus = tuple(value for value in asked.plus if value != key)
    minus = tuple(value for value in asked.minus if value != key)
    return Card(
        row=row,
        title=captions[0] if captions else key,
        captions=captions,
        width=width,
        height=height,
        thumbnail=image_address(opened, row, "thumbnail"),
        picture=image_address(opened, row, "large"),
        more=address(replace(asked, plus=(*plus, key), minus=minus)),
        less=address(replace(asked, plus=plus, minus=(*minus, key))) if asked.q.strip() or plus else "",
        heat="",
        score="",
        share=0,
        likely=True,
    )


def chips(opened: Opened, asked: Asked) -> list[Chip]:
    """The terms besides the text in the field."""
    made = []
    for sign, name in (("+", "plus"), ("−", "minus")):
        values: tuple[str, ...] = getattr(asked, name)
        for n, value in enumerate(values):
            row = opened.searcher.row(value)
            if value.startswith(UPLOAD):
                label, thumbnail = "your picture", f"/uploads/{quote(value, safe='')}"
            elif row is not None:
                label, thumbnail = value, image_address(opened, row, "thumbnail")
            else:
                label, thumbnail = value, ""
            rest: dict[str, Any] = {name: values[:n] + values[n + 1 :]}
            made.append(Chip(sign, label, thumbnail, address(replace(asked, **rest))))
    return made
