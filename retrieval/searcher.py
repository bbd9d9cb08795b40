"""Search: a text or a picture in, ranked hits out."""

import logging
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.artifacts import has_manifest
from ..pipeline.config import ComputeOptions
from ..pipeline.device import resolve_device
from ..pipeline.errors import QfError
from ..pipeline.features.reader import Features
from ..pipeline.formatting import PART, plain
from ..pipeline.results import Result
from ..pipeline.workspace import Workspace
from .config import SearchOptions
from .encode.joint_space import JointSpace
from .encode.qformer import check_features, open_run
from .encode.query_encoder import QueryEncoder
from .index.store import Index, check_origin, make_index, open_index, origin_folder
from .index.vectors import flat
from .search import Part, Ranking, best_distinct, nearest_images, reorder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit(Result):
    """One hit. `itc` and `itm` are set if it was re-ranked: the first score and the matching logit."""

    rank: int
    key: str
    score: float
    image: str
    captions: list[str]
    thumbnail: bytes
    itc: float | None = None
    itm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields but the thumbnail; `itc` and `itm` only if it was re-ranked."""
        left_out = {"thumbnail"} if self.itm is not None else {"thumbnail", "itc", "itm"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def __str__(self) -> str:
        parts = f"  (itc {self.itc:.3f}, itm {self.itm:.3f})" if self.itm is not None else ""
        caption = self.captions[0] if self.captions else ""
        return f"{self.rank:3d}  {self.score:7.3f}{parts}  {plain(self.image, PART)}  {plain(caption, PART)}"


class Searcher:
    """An index, the features that it was built from, and the encoder of its queries."""

    def __init__(self, index: Index, features: Features, encoder: QueryEncoder) -> None:
        self.index, self.features, self.encoder = index, features, encoder

    def search(self, query: str | None, options: SearchOptions) -> list[Hit]:
        """The hits for a text, or for the picture `options.image`. UsageError if the options do not go together."""
        options.check(query)
        if options.image is None:
            return self.text(query or "", options.k, options.rerank)
        return (
            self.captions(options.image, options.k) if options.find == "text" else self.image(options.image, options.k)
        )

    def text(self, query: str, k: int, rerank: int = 0) -> list[Hit]:
        """The k images that fit the text best. With `rerank`, ITM re-ranks that many of them, at least k.

        QfError if the text is empty, or if the encoder cannot match."""
        if not query.strip():
            raise QfError('the query is empty; say what to look for: qf search "a dog on a beach"')
        count = max(k, rerank) if rerank else k
        ranking = best_distinct([Part(self.index.images, self.encoder.query(query), self.index.per_image)], count)
        if not rerank:
            return self._hits(ranking, k)
        pairs = np.stack([np.arange(len(ranking.items)), np.zeros(len(ranking.items), np.int64)], 1)
        itm = self.encoder.matching(self.features, ranking.items, [query], pairs)
        reranked, order = reorder(ranking, itm)
        return self._hits(reranked, k, ranking.scores[order], itm[order])

    def image(self, file: Path, k: int) -> list[Hit]:
        """The k images most like the picture in `file`."""
        query = self.encoder.picture(file)
        return self._hits(nearest_images(self.index.images, query, k, self.index.per_image), k)

    def captions(self, file: Path, k: int) -> list[Hit]:
        """The k captions that fit the picture in `file` best, each as a hit of its image with that caption alone."""
        ranking = best_distinct([Part(self._caption_vectors, self.encoder.picture(file), 1)], k)
        hits = self._hits(Ranking(self.index.text_rows[ranking.items], ranking.scores), k)
        texts = [self.index.captions[item] for item in ranking.items]
        return [replace(hit, captions=[text]) for hit, text in zip(hits, texts, strict=True)]

    @cached_property
    def _caption_vectors(self) -> Any:
        """The index of the captions. One that was not built before, without training, is made now."""
        return flat(self.encoder.texts(self.index.captions)) if self.index.texts is None else self.index.texts

    def _hits(
        self, ranking: Ranking, k: int, itc: np.ndarray | None = None, itm: np.ndarray | None = None
    ) -> list[Hit]:
        return [
            Hit(
                rank=n + 1,
                key=row["key"],
                score=round(float(ranking.scores[n]), 6),
                image=row["image"],
                captions=row["captions"],
                thumbnail=row["thumbnail"],
                itc=None if itc is None else round(float(itc[n]), 6),
                itm=None if itm is None else round(float(itm[n]), 6),
            )
            for n, row in enumerate(self.index.rows_of(ranking.items[:k]))
        ]


def open_searcher(workspace: Workspace, on: ComputeOptions) -> Searcher:
    """The index of a workspace with its run. Before any training: the encoder's own joint space, with a warning.

    ArtifactError if index, run and features do not belong together; QfError if there is a run without an index."""
    if has_manifest(workspace.index):
        return _open_trained(workspace.index, on)
    if workspace.index.is_dir() or workspace.latest_run() is not None:
        raise QfError(f"{workspace.folder} has a trained run but no finished index; build it with `qf index`")
    searcher = untrained_searcher(Features(workspace.features), on)
    log.warning("no trained model yet: searching by the encoder's own embeddings (train one with `qf train`)")
    return searcher


def untrained_searcher(features: Features, on: ComputeOptions) -> Searcher:
    """Search in the encoder's own joint space, without any index on disk. EncoderError if it has none."""
    encoder = JointSpace(features.encoder, resolve_device(on.device))
    assert features.pooled is not None
    return Searcher(make_index(features, features.pooled, None, {}), features, encoder)


def _open_trained(folder: Path, on: ComputeOptions) -> Searcher:
    index = open_index(folder)
    run = open_run(origin_folder(folder, index.manifest, "run"), resolve_device(on.device), on.precision)
    features = Features(origin_folder(folder, index.manifest, "features"))
    check_features(run, features)
    check_origin(folder, index.manifest, run.manifest["sha256"], features)
    return Searcher(index, features, run)
