"""The mix of a run: fitted on validation images, and stored in the run's folder."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from ..pipeline.errors import ArtifactError, QfError
from ..pipeline.features.reader import Features
from ..trainer.metrics.retrieval import RetrievalSet
from .config import RERANK
from .encode.qformer import Run
from .encode.query_encoder import QueryEncoder
from .measure import SplitScores, rows_of
from .mix import fit_first, fit_matching, mixed
from .mix_file import ENCODER, IMAGE_TO_TEXT, RUN_ALONE, TEXT_TO_IMAGE, WAYS, Mix, Scorer, read_mix, save_mix

MAX_IMAGES = 1000  # of the validation split, which bounds memory and time


def stored_mix(features: Features, run: Run, encoders: Sequence[QueryEncoder]) -> Mix | None:
    """The mix that the run has for these features; None if it has none. `encoders`: of `query_encoders`.

    ArtifactError if it cannot be used."""
    own = any(encoder.name == "clip" for encoder in encoders)
    return read_mix(run.folder, run.manifest["sha256"], features.identity, own)


def ensured_mix(
    features: Features, run: Run, encoders: Sequence[QueryEncoder], say: Callable[[str], None]
) -> Mix | None:
    """The mix that the run has, or one that is fitted now. `say` gets a line if there is nothing to fit on: then None."""
    with suppress(ArtifactError):  # one that cannot be used is fitted anew
        if mix := stored_mix(features, run, encoders):
            return mix
    try:
        return fit_mix(features, run, encoders, say)
    except QfError as error:
        say(f"{error}; until then search ranks by the {'encoder' if len(encoders) > 1 else 'run'} alone")
        return None


def fit_mix(features: Features, run: Run, encoders: Sequence[QueryEncoder], say: Callable[[str], None]) -> Mix:
    """Fit the weights of the run's mix, with matching at `RERANK` candidates, and store it. `encoders`: of `query_encoders`.

    QfError if no validation image has a caption."""
    data = RetrievalSet.of(features, "val", MAX_IMAGES)
    if not data.texts:
        raise QfError(
            f"no mix is fitted: {features.folder} has no images with captions in the split val; extract with --val-fraction "
            "0.05, or with a split column that has val"
        )
    say(f"fitting the mix on {len(data.rows):,} validation images")
    scores = SplitScores(features, data, encoders)
    relevant = data.image_rows[None] == torch.arange(len(data.rows))[:, None]  # (N, M)
    wanted = {TEXT_TO_IMAGE: relevant.T, IMAGE_TO_TEXT: relevant}
    first = {way: scores.first(way) for way in WAYS}
    scorer = Scorer(*(fit_first(first[way], wanted[way]) for way in WAYS))
    ks = [RERANK] if scores.matcher else []
    if ks:
        ranked = scores.rank({"itc": RUN_ALONE, "mix": scorer}, RERANK)
        scores.match(ranked.values(), RERANK)
        itm = {}
        for way in WAYS:
            found = ranked["mix"][way]
            logits = scores.matching(found, way, RERANK)
            itm[way] = fit_matching(mixed(first[way], getattr(scorer, way)), found.chosen, logits, wanted[way])
        scorer = Scorer(*(replace(getattr(scorer, way), itm=itm[way]) for way in WAYS))
    alone = {"clip": ENCODER, "itc": RUN_ALONE}
    rows = rows_of(scores.rankings({**{name: alone[name] for name in scores.embedded}, "mix": scorer}, ks))
    mix = Mix(scorer, rows)
    save_mix(run.folder, mix, run.manifest["sha256"], features.identity, len(data.rows), len(data.texts))
    say(f"mix: {mix}")
    return mix
