"""Search: a text or a picture in, ranked hits out.

A text opens the index and the text towers that score, in NumPy. Pictures and re-ranking open the features, and import PyTorch."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.artifacts import has_manifest
from ..pipeline.config import PRECISIONS, ComputeOptions
from ..pipeline.errors import ArtifactError, EncoderError, QfError, UsageError
from ..pipeline.features.manifest import FeaturesFolder
from ..pipeline.formatting import PART, encodable, plain
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from .compose import Name, Term, best_kept, combined, parse
from .config import SearchOptions
from .encode.joint_space import JointSpace
from .encode.qformer import Run, check_features
from .encode.query_encoder import QueryEncoder
from .index.space import Space
from .index.store import Index, check_origin, make_index, open_index, origin_folder
from .index.vectors import make_vectors
from .mix_file import (
    ENCODER,
    RUN_ALONE,
    TEXT_TO_IMAGE,
    Mix,
    Scorer,
    Weights,
    below_encoder,
    harmed_by_matching,
    read_mix,
)
from .search import Part, Ranking, best_distinct, nearest_images, reorder

if TYPE_CHECKING:
    import torch

    from ..pipeline.encoders.picture import Picture
    from ..pipeline.features.reader import Features

log = logging.getLogger(__name__)
MATCHED = ("itc", "itm", "probability")  # the fields of a hit that was re-ranked
LACKING = {  # what a search without these embeddings says
    "itc": "a run; train one first: qf train",
    "clip": "the encoder; `qf index` adds them if its text model is there",
}


@dataclass(frozen=True)
class Hit(Result):
    """One hit. The last three are set if it was re-ranked: the run's first score, the matching logit, and the probability that
    text and picture match."""

    rank: int
    key: str
    score: float
    image: str
    captions: list[str]
    thumbnail: bytes
    itc: float | None = None
    itm: float | None = None
    probability: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields but the thumbnail and the probability; `itc` and `itm` only if it was re-ranked."""
        left_out = {"thumbnail", "probability"} | (set() if self.itm is not None else {"itc", "itm"})
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def __str__(self) -> str:
        parts = f"  (itc {self.itc:.3f}, itm {self.itm:.3f})" if self.itm is not None else ""
        caption = self.captions[0] if self.captions else ""
        return f"{self.rank:3d}  {self.score:7.3f}{parts}  {plain(self.image, PART)}  {plain(caption, PART)}".rstrip()


class Searcher:
    """An index, the features that it was built from, and the encoders of its queries."""

    def __init__(
        self,
        index: Index,
        features: "Features | FeaturesFolder",
        device: "torch.device | str",
        run: Run | None = None,
        folder: Path | None = None,
    ) -> None:
        """`device` is one or the name of one; `folder` is that of the index, if it is on disk."""
        self.index, self.described, self._device, self.run = index, features, device, run
        self.encoders: dict[str, QueryEncoder] = {}  # by scorer, one for each space of the index
        if "clip" in index.spaces:
            text = (index.encoder_text, folder) if index.encoder_text and folder else None
            self.encoders["clip"] = JointSpace(features.encoder, device, text)
        if run is not None:
            self.encoders["itc"] = run
        self._warned: set[str] = set()

    @cached_property
    def features(self) -> "Features":
        """The features that the index was built from. ArtifactError if they are damaged."""
        if not isinstance(self.described, FeaturesFolder):
            return self.described
        from ..pipeline.features.reader import Features

        return Features(self.described.folder)

    @cached_property
    def device(self) -> "torch.device":
        """QfError if this machine lacks it."""
        from ..pipeline.device import resolve_device

        return resolve_device(str(self._device))

    def _warn(self, text: str) -> None:
        """Log a warning, the first time."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    def search(self, query: str | None, options: SearchOptions) -> list[Hit]:
        """The hits for a query, or for the picture `options.image`. UsageError if the options do not go together."""
        options.check(query)
        if options.image is None:
            terms = parse(query, options.plus or (), options.minus or ()) or [Term(query or "")]
            return self.composed([self._found(term) for term in terms], options.k, options.rerank, options.scorer)
        find = self.captions if options.find == "text" else self.image
        return find(options.image, options.k, options.scorer)

    def text(self, query: str, k: int, rerank: int = 0, scorer: str = "mix") -> list[Hit]:
        """The k images that fit the text best. With `rerank`, ITM re-ranks that many of them, at least k.

        QfError if the text is empty, if there is no such scorer, or if the run cannot match."""
        return self.composed([Term(query)], k, rerank, scorer)

    def composed(
        self, terms: Sequence[Term], k: int, rerank: int = 0, scorer: str = "mix", keep: np.ndarray | None = None
    ) -> list[Hit]:
        """The k images that fit a query of several texts and pictures best, of those that `keep` (N,) is true for.

        In each space the weighted sum of the terms' vectors is searched, as for a text. If there is a picture among them, the
        space is chosen as in `image`, and a picture alone is compared as there. Only a text alone is re-ranked. Errors as of
        `text`; UsageError if the terms cancel each other out."""
        if any(isinstance(term.value, str) and not term.value.strip() for term in terms):
            raise QfError('the query is empty; say what to look for: qf search "a dog on a beach"')
        if rerank:
            if len(terms) > 1 or not isinstance(terms[0].value, str):
                raise UsageError("--rerank matches pictures with one text: it does not go with other terms or pictures")
            self._check_matches()
        seen = [term for term in terms if not isinstance(term.value, str)]
        weights = self._of_pictures(scorer) if seen else self._scorer(scorer).text_to_image
        try:
            queries = {name: self._sum(terms, name) for name in _used(weights)}
        except EncoderError as error:
            if scorer != "mix" or self.run is None:
                raise
            self._warn(f"searching by the run alone: {error}")
            weights = RUN_ALONE.text_to_image
            queries = {"itc": self._sum(terms, "itc")}
        spaces = self.index.spaces
        parts = [Part(spaces[n].images, queries[n], spaces[n].per_image, getattr(weights, n)) for n in queries]
        if seen == list(terms) and len(terms) == 1:
            ranking = best_kept(
                lambda k: nearest_images(parts[0].index, parts[0].queries, k, parts[0].per_item), k, keep
            )
        else:
            ranking = best_kept(lambda k: best_distinct(parts, k), max(k, rerank), keep)
        if not rerank:
            return self._hits(ranking, k)
        self._warn_of_matching(scorer, weights)
        return self._reranked(str(terms[0].value), ranking, k, weights.itm)

    def _sum(self, terms: Sequence[Term], name: str) -> np.ndarray:
        """The weighted sum of the terms in the space of that name: (1, E), or (Q, E) with a picture among them."""
        space, encoder = self.index.spaces[name], self.encoders[name]
        vectors = []
        for term in terms:
            if isinstance(term.value, str):
                vectors.append(encoder.query(term.value))
            elif isinstance(term.value, int):
                vectors.append(space.images.reconstruct_n(term.value * space.per_image, space.per_image))
            else:
                vectors.append(encoder.picture(term.value)[list(space.form.slots)])
        return combined(vectors, [term.weight for term in terms])

    def _found(self, term: Term) -> Term:
        """A term whose name, if it has one, is taken for a file, a key of the index or a text."""
        if not isinstance(term.value, Name):
            return term
        if os.path.isfile(term.value):
            return replace(term, value=self._seen(Path(term.value)))
        row = self.row(term.value)
        return replace(term, value=encodable(term.value) if row is None else row)

    def row(self, key: str) -> int | None:
        """The position in the index of the image with that key. None if there is none."""
        return self._rows.get(key)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.index.rows.column("key"))}

    def _reranked(self, query: str, ranking: Ranking, k: int, weight: float) -> list[Hit]:
        """The k best of a ranking for a text, once matching counts with that weight."""
        assert self.run is not None
        space = self.index.spaces["itc"]
        itc = Part(space.images, self.run.embed(query), space.per_image).scores(ranking.items)
        pairs = np.stack([np.arange(len(ranking.items)), np.zeros(len(ranking.items), np.int64)], 1)
        itm, probability = self.run.match(self.features, ranking.items, [query], pairs)
        reranked, order = reorder(ranking, itm, weight)
        return self._hits(reranked, k, itc[order], itm[order], probability[order])

    def image(self, file: Path, k: int, scorer: str = "mix") -> list[Hit]:
        """The k images most like the picture in `file`.

        There is nothing to fit weights of pictures on. So the encoder's own space decides where the index has it, unless
        `scorer` is itc."""
        return self.composed([Term(self._seen(file))], k, scorer=scorer)

    def _of_pictures(self, scorer: str) -> Weights:
        """The weights of a query with a picture in it. QfError if there is no such scorer."""
        own = "clip" in self.index.spaces
        name = "itc" if scorer == "itc" or (scorer == "mix" and not own) else "clip"
        self._check_space(name)
        return (RUN_ALONE if name == "itc" else ENCODER).text_to_image

    def captions(self, file: Path, k: int, scorer: str = "mix") -> list[Hit]:
        """The k captions that fit the picture in `file` best, each as a hit of its image with that caption alone.

        QfError if there are no captions."""
        if not self.index.rows.captions:
            raise QfError(f"{self.described.folder} holds no captions to find; leave out --find text to find pictures")
        weights, picture = self._scorer(scorer).image_to_text, self._seen(file)
        parts = [
            Part(self._texts[name], self.encoders[name].picture(picture), 1, getattr(weights, name))
            for name in _used(weights)
        ]
        ranking = best_distinct(parts, k)
        hits = self._hits(Ranking(self.index.rows.owners(ranking.items), ranking.scores), k)
        texts = self.index.rows.texts(ranking.items)
        return [replace(hit, captions=[text]) for hit, text in zip(hits, texts, strict=True)]

    # ---- who scores ----

    def _scorer(self, name: str) -> Scorer:
        """The weights of a scorer: mix, itc or encoder. Warns of one that is not what was asked for, or not the best.

        QfError if there is no such scorer."""
        mix, problem = self._mix
        if name == "itc":
            self._check_space("itc")
            if mix and (line := below_encoder(mix.rows)):
                self._warn(f"on validation images {line}")
            return RUN_ALONE
        if name == "encoder" or self.run is None:
            self._check_space("clip")
            return ENCODER
        if mix:
            return mix.scorer
        own = "clip" in self.index.spaces
        if problem:
            self._warn(f"searching by the {'encoder' if own else 'run'} alone: {problem}")
        return ENCODER if own else RUN_ALONE

    def _check_space(self, name: str) -> None:
        """QfError unless the index has that space."""
        if name not in self.index.spaces:
            raise QfError(f"the index has no embeddings of {LACKING[name]}")

    def _check_matches(self) -> None:
        """QfError if there is no run, or if it cannot match."""
        if self.run is None:
            raise QfError("--rerank needs a trained model; train one first: qf train")
        self.run.check_matches()

    @cached_property
    def _mix(self) -> tuple[Mix | None, str]:
        """The fitted mix of the run, or the reason why there is none. No reason: a run alone does without."""
        if self.run is None:
            return None, ""
        own = "clip" in self.index.spaces
        try:
            mix = read_mix(self.run.folder, self.run.manifest["sha256"], self.described.identity, own)
        except ArtifactError as error:
            return None, str(error)
        if mix or not own:
            return mix, ""
        return None, f"run {self.run.folder} has no fitted mix; `qf eval --fit-mix` fits one on validation images"

    def _warn_of_matching(self, scorer: str, weights: Weights) -> None:
        """Warn if validation images say that re-ranking does not help."""
        mix, _ = self._mix
        if scorer == "itc" and mix and (line := harmed_by_matching(mix.rows, TEXT_TO_IMAGE)):
            self._warn(f"on validation images {line}")
        if not weights.itm:
            self._warn(
                "matching did not help on validation images: its fitted weight is 0, and --rerank changes nothing"
            )

    # ---- queries and hits ----

    def _seen(self, file: Path) -> "Picture":
        """The picture in `file` through the encoder. QfError if it cannot be read, EncoderError if the encoder has changed."""
        from ..pipeline.encoders.picture import encode_picture

        return encode_picture(file, self.described.encoder, self.device)

    @cached_property
    def _texts(self) -> dict[str, Any]:
        """The FAISS index of the captions in each space. They are embedded now where no index was built."""
        return {
            name: make_vectors(self.encoders[name].captions(self.features)) if space.texts is None else space.texts
            for name, space in self.index.spaces.items()
        }

    def _hits(self, ranking: Ranking, k: int, *matched: np.ndarray) -> list[Hit]:
        """The first k items of a ranking as hits. `matched`: itc, itm and probability of each, if they were re-ranked."""
        return [
            Hit(
                rank=n + 1,
                key=row["key"],
                score=round(float(ranking.scores[n]), 6),
                image=row["image"],
                captions=row["captions"],
                thumbnail=row["thumbnail"],
                **{name: round(float(some[n]), 6) for name, some in zip(MATCHED, matched, strict=False)},
            )
            for n, row in enumerate(self.index.rows_of(ranking.items[:k]))
        ]


def _used(weights: Weights) -> list[str]:
    """The spaces that count, besides matching."""
    return [name for name in ("clip", "itc") if getattr(weights, name)]


def open_searcher(workspace: Workspace, on: ComputeOptions) -> Searcher:
    """The index of a workspace with its run. Before there is either: the encoder's own joint space, with a warning.

    ArtifactError if index, run and features do not belong together; QfError if there is a run without an index."""
    if has_manifest(workspace.index):
        searcher = _open_indexed(workspace.index, on)
        if searcher.run is None and (run := workspace.latest_run()):
            log.warning(
                "the index does not know run %s: searching by the encoder alone; `qf index` rebuilds it", run.name
            )
        return searcher
    if workspace.index.is_dir() or workspace.latest_run() is not None:
        raise QfError(f"{workspace.folder} has a trained run but no finished index; build it with `qf index`")
    from ..pipeline.features.reader import Features

    searcher = untrained_searcher(features := Features(workspace.features), on)
    cure = "`qf index` makes it faster"
    if features.manifest["captions"]:
        cure = f"{cure}, `qf train` better"
    log.warning("no trained model yet: searching by the encoder's own embeddings (%s)", cure)
    return searcher


def untrained_searcher(features: "Features", on: ComputeOptions) -> Searcher:
    """Search in the encoder's own joint space, without any index on disk. EncoderError if it has none."""
    device = _device(on)
    images = np.concatenate(list(JointSpace(features.encoder, device).images(features)))
    return Searcher(make_index(features, {"clip": Space.of(images, None)}, {}), features, device)


def _open_indexed(folder: Path, on: ComputeOptions) -> Searcher:
    index, device = open_index(folder), _device(on)
    run, sha256 = None, None
    if index.manifest["run"] is not None:
        run = Run(origin_folder(folder, index.manifest, "run"), device, on.precision)
        sha256 = run.manifest["sha256"]
    features = FeaturesFolder(origin_folder(folder, index.manifest, "features"))
    if run is not None:
        check_features(run, features)
    check_origin(folder, index.manifest, sha256, features)
    return Searcher(index, features, device, run, folder)


def _device(on: ComputeOptions) -> "torch.device | str":
    """A device, or the name of one that is always there. QfError if this machine lacks it, or if there is no such precision."""
    if on.device in ("auto", "cpu") and on.precision in PRECISIONS:
        return on.device
    from ..pipeline.device import resolve_device, resolve_precision

    device = resolve_device(on.device)
    resolve_precision(on.precision, device)
    return device
