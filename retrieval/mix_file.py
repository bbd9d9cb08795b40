"""The weights of scorers, and the mix that was fitted for a run: `mix.json` in its folder. Standard library and msgspec only.

A score is a weighted sum of three: clip, the cosine in the encoder's own space; itc, the run's contrastive score; and itm, the
run's matching logit, which counts only for candidates that are re-ranked."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from ..pipeline.artifacts import Count, Sha256, read_sealed, write_sealed
from ..pipeline.errors import ArtifactError
from ..trainer.manifest import MIX

REFIT = "`qf eval --fit-mix` refits it"
TEXT_TO_IMAGE, IMAGE_TO_TEXT = WAYS = ("text_to_image", "image_to_text")
Row = dict[str, float]  # R@K in percent, both ways


@dataclass(frozen=True)
class Weights:
    """The weights of the scores in one direction."""

    clip: float
    itc: float
    itm: float

    def __str__(self) -> str:
        return " + ".join(f"{weight:.3g} {name}" for name, weight in asdict(self).items() if weight)


@dataclass(frozen=True)
class Scorer:
    """The weights of both directions."""

    text_to_image: Weights
    image_to_text: Weights

    @property
    def matches(self) -> bool:
        """Whether matching counts in either direction."""
        return bool(self.text_to_image.itm or self.image_to_text.itm)


ENCODER = Scorer(Weights(1, 0, 1), Weights(1, 0, 1))
RUN_ALONE = Scorer(Weights(0, 1, 1), Weights(0, 1, 1))  # re-ranks as BLIP-2 does


@dataclass(frozen=True)
class Mix:
    """A fitted scorer, and what every scorer reached on the validation images that it was fitted on."""

    scorer: Scorer
    rows: dict[str, Row]  # clip, itc, itc+itm@K, mix, mix+itm@K: as in an evaluation

    def __str__(self) -> str:
        weights = f"text to image {self.scorer.text_to_image}, image to text {self.scorer.image_to_text}"
        reached = ", ".join(f"{name} {row_at_1(row)}" for name, row in self.rows.items())
        return f"{weights}; validation R@1 both ways: {reached}"


def row_at_1(row: Row) -> str:
    """R@1 of both ways, for people."""
    return " and ".join(f"{row[f'{way}_R@1']:.1f}" for way in WAYS)


def below_encoder(rows: dict[str, Row]) -> str | None:
    """A line if the run alone ranks worse than the encoder itself, by the mean R@1 of both ways; else None."""
    if "clip" not in rows or _mean_at_1(rows["itc"]) >= _mean_at_1(rows["clip"]):
        return None
    return (
        f"the run alone ranks below the encoder itself (R@1 {row_at_1(rows['itc'])} against {row_at_1(rows['clip'])}): "
        "search counts the run only as far as it helps; more training images, more --epochs, --teach or --init help it"
    )


def harmed_by_matching(rows: dict[str, Row], way: str | None = None) -> str | None:
    """A line if matching lowers R@1 of the run alone: of one way, or the mean of both; else None."""
    for name, row in rows.items():
        if name.startswith("itc+itm@"):
            before, after = (r[f"{way}_R@1"] if way else _mean_at_1(r) for r in (rows["itc"], row))
            if after < before:
                return f"re-ranking lowers R@1 of the run alone, from {before:.1f} to {after:.1f} ({name})"
    return None


def _mean_at_1(row: Row) -> float:
    return sum(row[f"{way}_R@1"] for way in WAYS) / len(WAYS)


# ---- mix.json --------------------------------------------------------------------------------------------------------

_Weight = Annotated[float, Meta(ge=0, le=1e9)]
_Percent = Annotated[float, Meta(ge=0, le=100)]
_Row = TypedDict("_Row", {f"{way}_R@{k}": _Percent for way in WAYS for k in (1, 5, 10)})  # type: ignore[misc]


class _Weights(TypedDict):
    clip: _Weight
    itc: _Weight
    itm: _Weight


class _Rows(TypedDict):
    """The rows that are always there; those of matching stand beside them."""

    clip: NotRequired[_Row]
    itc: _Row
    mix: _Row


class MixFile(TypedDict):
    """The content of mix.json."""

    run: Sha256  # of the weights
    features: Sha256  # their identity
    images: Count
    texts: Count
    text_to_image: _Weights
    image_to_text: _Weights
    rows: _Rows


def save_mix(folder: Path, mix: Mix, run: str, features: str, images: int, texts: int) -> None:
    """Write the mix of the run in `folder`, which was fitted on so many images and texts of the features of that identity."""
    fitted_on = {"run": run, "features": features, "images": images, "texts": texts}
    write_sealed(folder / MIX, {**fitted_on, **asdict(mix.scorer), "rows": mix.rows})


def load_mix(folder: Path, run: str) -> tuple[Mix, dict[str, Any]] | None:
    """The mix in the folder of a run, and the content of its file; None if there is none.

    ArtifactError if it is damaged, or was fitted for other weights than those with the SHA-256 `run`."""
    path = folder / MIX
    if not path.is_file():
        return None
    content = read_sealed(path, MixFile, REFIT)
    if content["run"] != run:
        raise ArtifactError(f"{path} was fitted for other weights than the run's; {REFIT}")
    scorer = Scorer(*(Weights(**{name: content[way][name] for name in _Weights.__annotations__}) for way in WAYS))
    return Mix(scorer, content["rows"]), content


def read_mix(folder: Path, run: str, features: str, encoder: bool) -> Mix | None:
    """The mix of a run for the features of that identity; None if none was fitted. `encoder` tells whether the encoder's own
    scores are there.

    ArtifactError if it is damaged, or if it was fitted for another run, other features or other scores."""
    loaded = load_mix(folder, run)
    if loaded is None:
        return None
    mix, content = loaded
    if content["features"] != features:
        raise ArtifactError(f"{folder / MIX} was fitted on other features; {REFIT}")
    if encoder and "clip" not in mix.rows:
        raise ArtifactError(f"{folder / MIX} was fitted without the encoder's own scores; {REFIT}")
    if not encoder and "clip" in mix.rows:
        raise ArtifactError(
            f"{folder / MIX} was fitted with the encoder's own scores, which are missing; `qf index` brings them back if its "
            "text model is there, and `qf eval --fit-mix` does without them"
        )
    return mix
