"""How few bytes hold an index: which query slots ever win, and how short a number may be. Pure functions of arrays.

Letters: n images, Q slots (queries) of an image, E width, m texts. Recall is measured with texts that did not choose the slots, against
the exact ranking by all slots in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from .vectors import BYTES, make_vectors

COVERED = 0.999  # share of the winning texts that the kept slots must explain
TOP = 10  # hits that recall counts
MOST_TEXTS = 1000  # that recall is measured with
IMAGES_AT_ONCE = 1024


@dataclass(frozen=True)
class Form:
    """How the vectors of a space are stored."""

    type: str  # of the numbers, see vectors.BYTES
    slots: tuple[int, ...]  # which query slots are kept
    recall: float | None  # recall@10 of it; None where nothing was measured
    why: str  # for people

    @property
    def bytes(self) -> int:
        """Of an image, a dimension."""
        return len(self.slots) * BYTES[self.type]


def exact(slots: int, why: str) -> Form:
    """All slots in float32."""
    return Form("flat", tuple(range(slots)), None, why)


def winning_slots(images: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> tuple[int, ...]:
    """The slots that win: images (n, Q, E), texts (m, E) and the image (m,) of each text -> the fewest slots, in order, that have the
    greatest dot product with their text in COVERED of the texts."""
    wins = np.zeros(images.shape[1], np.int64)
    for start in range(0, len(texts), IMAGES_AT_ONCE):
        some = slice(start, start + IMAGES_AT_ONCE)
        scores = np.einsum("mqe,me->mq", images[owners[some]], texts[some])
        wins += np.bincount(scores.argmax(1), minlength=len(wins))
    order = np.argsort(-wins, kind="stable")
    enough = np.searchsorted(wins[order].cumsum(), COVERED * len(texts)) + 1
    return tuple(sorted(order[:enough].tolist()))


def best_images(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """images (n, Q, E), texts (m, E) -> (m, k) the TOP images, or all, with the greatest score, best first; ties to the first image."""
    scores = np.empty((len(texts), len(images)), np.float32)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = images[start : start + IMAGES_AT_ONCE]
        products = texts @ some.reshape(-1, some.shape[-1]).T
        scores[:, start : start + len(some)] = products.reshape(len(texts), len(some), -1).max(2)
    return np.argsort(-scores, axis=1, kind="stable")[:, :TOP]


def recall_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """The mean share of the rows of `wanted` (m, k) that the same rows of `found` (m, k) hold."""
    return float(np.mean([np.isin(row, there).mean() for row, there in zip(wanted, found, strict=True)]))


def choose_form(images: np.ndarray, texts: np.ndarray, owners: np.ndarray, types: Sequence[str], recall: float) -> Form:
    """The smallest form of these types whose recall is at least `recall`, or else the one with the best recall.

    images (n, Q, E) and texts (m, E), owners (m,) the image of each text. Texts of every second image choose the slots, those of the
    others measure."""
    slots = images.shape[1]
    chooses = owners % 2 == 0
    if chooses.all() or not chooses.any():
        return Form(types[-1], tuple(range(slots)), None, "no captions to measure recall with")
    kept = winning_slots(images, texts[chooses], owners[chooses])
    held_out = texts[~chooses][:MOST_TEXTS]
    wanted = best_images(images, held_out)
    best, most = Form(types[-1], tuple(range(slots)), None, ""), -1.0
    sets = dict.fromkeys((kept, tuple(range(slots))))
    for form in sorted(
        (Form(type, some, None, "") for type, some in product(types, sets)), key=lambda form: form.bytes
    ):
        reached = recall_of(best_images(_as_stored(images, form), held_out), wanted)
        if reached > most:
            best, most = form, reached
        if reached >= recall:
            break
    what = f"recall@{TOP} {most:.4f} of {len(held_out):,} held-out captions among {len(images):,} images"
    return Form(best.type, best.slots, round(most, 4), what + (f", below --recall {recall:g}" if most < recall else ""))


def _as_stored(images: np.ndarray, form: Form) -> np.ndarray:
    """images (n, Q, E) as that form gives them back: (n, kept slots, E)."""
    stored = images[:, list(form.slots)]
    if form.type == "flat":
        return stored
    vectors = stored.reshape(-1, stored.shape[-1])
    decoded: np.ndarray = make_vectors(vectors, form.type).reconstruct_n(0, len(vectors))
    return decoded.reshape(stored.shape)
