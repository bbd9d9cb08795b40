"""A trained Q-Former applied to many images and texts: embeddings, similarities, matching scores.

Letters as in qformer.py; N images and M texts in all."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...pipeline.device import autocast
from ...pipeline.features.codecs import Encoded, decode
from ...pipeline.features.reader import Features, empty_array
from ...pipeline.prefetch import map_ahead
from ..loader.batches import pinned
from ..objectives import similarities
from ..qformer import ImageEncoding, QFormer
from ..tokens import Tokens

PREFETCH = 3  # batches read ahead
OUT_OF_REACH = 1000.0  # more than any matching logit plus similarity


class Embedder:
    """A model with its tokenizer on a device. Every method puts the model into evaluation mode, and computes in batches."""

    def __init__(
        self, model: QFormer, tokens: Tokens, device: torch.device, dtype: torch.dtype, max_text_length: int
    ) -> None:
        self.model, self.tokens, self.device, self.dtype = model, tokens, device, dtype
        self.max_text_length = max_text_length
        self.empty = pinned if device.type == "cuda" else empty_array

    def images(self, features: Features, rows: np.ndarray) -> Tensor:
        """Query embeddings (N, Q, E) of the given rows of the features: float32, unit length, on the device."""
        none = torch.empty(0, self.model.config.num_query_tokens, self.model.config.embed_dim, device=self.device)
        return torch.cat([none, *self.image_batches(features, rows)])

    @torch.no_grad()
    def image_batches(self, features: Features, rows: np.ndarray, batch_size: int = 128) -> Iterator[Tensor]:
        """The query embeddings of `images`, `batch_size` rows at a time; the next rows are read meanwhile."""
        self.model.eval()
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        with ThreadPoolExecutor(1) as pool:
            for encoded in map_ahead(pool, partial(features.read, empty=self.empty), batches, PREFETCH):
                yield self._encode(encoded).features

    def image(self, image_embeds: Tensor) -> Tensor:
        """Frozen tokens (B, T, W) -> query embeddings (B, Q, E); for pictures that are not in a features folder."""
        self.model.eval()
        with torch.no_grad():
            return self._encode({"tokens": image_embeds}).features

    def _encode(self, encoded: Encoded) -> ImageEncoding:
        image_embeds = decode({name: tensor.to(self.device, non_blocking=True) for name, tensor in encoded.items()})
        with autocast(self.device, self.dtype):
            return self.model.encode_image(image_embeds)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Text embeddings (M, E): float32, unit length, on the device."""
        self.model.eval()
        ids = self.tokens.ids(texts, self.max_text_length)
        order = sorted(
            range(len(ids)), key=lambda m: len(ids[m])
        )  # texts of similar length together need little padding
        out = torch.empty(len(ids), self.model.config.embed_dim, device=self.device)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            input_ids, mask = (t.to(self.device) for t in self.tokens.pad([ids[m] for m in some]))
            with autocast(self.device, self.dtype):
                out[some] = self.model.encode_text(input_ids, mask, first_only=True).features
        return out

    def matching(self, features: Features, rows: np.ndarray, texts: Sequence[str], pairs: np.ndarray) -> Tensor:
        """pairs (n, 2) of positions in `rows` and `texts` -> the logit (n,) that each pair matches, on the CPU."""
        return self.match_logits(features, rows, texts, pairs)[:, 1]

    @torch.no_grad()
    def match_logits(
        self,
        features: Features,
        rows: np.ndarray,
        texts: Sequence[str],
        pairs: np.ndarray,
        image_batch: int = 64,
        pair_batch: int = 512,
    ) -> Tensor:
        """pairs (n, 2) of positions in `rows` and `texts` -> logits (n, 2) that they do not match and that they do, on the CPU.

        Each image is encoded once for all its pairs."""
        self.model.eval()
        ids = self.tokens.ids(texts, self.max_text_length)
        lengths = np.array([len(i) for i in ids])
        logits = torch.empty(len(pairs), 2)
        by_image = np.argsort(pairs[:, 0], kind="stable")
        asked = np.unique(pairs[:, 0])
        for start in range(0, len(asked), image_batch):
            some = asked[start : start + image_batch]
            first, last = np.searchsorted(pairs[by_image, 0], [some[0], some[-1] + 1])
            mine = by_image[first:last]
            mine = mine[np.argsort(lengths[pairs[mine, 1]], kind="stable")]
            image = self._encode(features.read(rows[some], empty=self.empty))
            for at in range(0, len(mine), pair_batch):
                now = mine[at : at + pair_batch]
                image_rows = torch.from_numpy(np.searchsorted(some, pairs[now, 0])).to(self.device)
                input_ids, mask = (t.to(self.device) for t in self.tokens.pad([ids[m] for m in pairs[now, 1]]))
                with autocast(self.device, self.dtype):
                    logits[now] = self.model.match(image, image_rows, input_ids, mask).cpu()
        return logits


def similarity_matrix(images: Tensor, texts: Tensor, batch_size: int = 256) -> Tensor:
    """Query embeddings (N, Q, E) and text embeddings (M, E) -> similarities (N, M), the maximum over queries, on the CPU."""
    rows = [similarities(images[i : i + batch_size], texts).cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(rows) if rows else torch.empty(0, len(texts))


def rerank(scores: Tensor, candidates: Tensor, matching: Tensor) -> Tensor:
    """Scores (N, C) -> (N, C) after re-ranking, as BLIP-2 ranks: the matching logit plus the contrastive similarity.

    `candidates` (N, K) are re-ranked by `matching` (N, K); all others come after them, in their old order."""
    out = scores - OUT_OF_REACH
    out.scatter_(1, candidates, matching + scores.gather(1, candidates))
    return out
