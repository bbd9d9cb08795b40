"""Questions to an index: a text or a picture in, ranked hits out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipeline.encoders.picture import encode_picture
from ..pipeline.encoders.text import TextModel
from ..pipeline.errors import EncoderError, QfError
from ..pipeline.features.reader import Features
from .encode.qformer import Run, check_features, open_run
from .index.store import Index, check_origin, flat, make_index, open_index
from .search import Ranking, best_distinct, nearest_images, reorder


@dataclass(frozen=True)
class Hit:
    """One hit. `itc` and `itm` are set when it was re-ranked: the first score and the matching logit."""

    rank: int
    key: str
    score: float
    image: str
    captions: list[str]
    thumbnail: bytes
    itc: float | None = None
    itm: float | None = None

    def line(self) -> dict[str, Any]:
        """The JSON fields of contract 2."""
        fields = {k: v for k, v in vars(self).items() if k != "thumbnail"}
        return fields if self.itm is not None else {k: v for k, v in fields.items() if k not in ("itc", "itm")}


class Searcher:
    """An index with the model that made it; or, without a run, the encoder's own joint space."""

    def __init__(self, index: Index, features: Features, device: torch.device, run: Run | None) -> None:
        self.index, self.features, self.device, self.run = index, features, device, run

    @classmethod
    def open(cls, folder: Path, device: torch.device, precision: str) -> "Searcher":
        """The index at `folder`, its run and its features. ArtifactError if they no longer belong together."""
        index = open_index(folder)
        run = open_run((folder / index.manifest["run"]["path"]).resolve(), device, precision)
        features = Features((folder / index.manifest["features"]["path"]).resolve())
        check_features(run, features)
        check_origin(folder, index.manifest, run.manifest["sha256"], features)
        return cls(index, features, device, run)

    @classmethod
    def untrained(cls, features: Features, device: torch.device) -> "Searcher":
        """Search by the encoder's own embeddings, before any training. EncoderError if it has none."""
        if features.pooled is None:
            raise EncoderError(
                f"encoder {features.encoder['id']} has no joint space with text; train a model first: qf train"
            )
        return cls(make_index(features, features.pooled, None, {}), features, device, None)

    def text(self, query: str, k: int, rerank: int = 0) -> list[Hit]:
        """The k images that fit the text best; with `rerank`, that many (at least k) are matched and ordered anew."""
        if not query.strip():
            raise QfError('the query is empty; say what to look for: qf search "a dog on a beach"')
        if self.run is None:
            if rerank:
                raise QfError("--rerank needs a trained model; train one first: qf train")
            vector = TextModel(self.features.encoder, self.device).encode([query])
        else:
            vector = self.run.embedder.texts([query]).cpu().numpy()
        rerank = max(k, rerank) if rerank else 0
        hits = best_distinct(self.index.images, vector, rerank or k, self.index.per_image)
        if self.run is None or not rerank:
            return self._answers(hits, k)
        pairs = np.stack([np.arange(len(hits.items)), np.zeros(len(hits.items), np.int64)], 1)
        itm = self.run.embedder.matching(self.features, hits.items, [query], pairs).numpy()
        ordered, order = reorder(hits, itm)
        return self._answers(ordered, k, hits.scores[order], itm[order])

    def image(self, file: Path, k: int) -> list[Hit]:
        """The k images most like the picture in `file`."""
        query = self._query(file)
        if self.run is None:
            return self._answers(best_distinct(self.index.images, query, k, 1), k)
        return self._answers(nearest_images(self.index.images, query, k, self.index.per_image), k)

    def captions(self, file: Path, k: int) -> list[Hit]:
        """The k captions that fit the picture in `file` best. Before any training the encoder's text tower reads them all first."""
        query = self._query(file)
        vectors = self.index.texts
        if vectors is None:
            vectors = flat(TextModel(self.features.encoder, self.device).encode(self.index.captions))
        hits = best_distinct(vectors, query, k, 1)
        images = self._answers(Ranking(self.index.text_rows[hits.items], hits.scores), k)
        texts = [self.index.captions[item] for item in hits.items]
        return [Hit(**{**vars(answer), "captions": [text]}) for answer, text in zip(images, texts, strict=True)]

    def _query(self, file: Path) -> np.ndarray:
        """The picture's vectors (Q, E), or (1, P) in the encoder's own space."""
        picture = encode_picture(file, self.features.encoder, self.device)
        if self.run is None:
            assert picture.pooled is not None
            return picture.pooled.cpu().numpy()
        return self.run.embedder.image(picture.tokens)[0].cpu().numpy()

    def _answers(
        self, hits: Ranking, k: int, itc: np.ndarray | None = None, itm: np.ndarray | None = None
    ) -> list[Hit]:
        return [
            Hit(
                rank=n + 1,
                key=row["key"],
                score=round(float(hits.scores[n]), 6),
                image=row["image"],
                captions=row["captions"],
                thumbnail=row["thumbnail"],
                itc=None if itc is None else round(float(itc[n]), 6),
                itm=None if itm is None else round(float(itm[n]), 6),
            )
            for n, row in enumerate(self.index.shows(hits.items[:k]))
        ]
