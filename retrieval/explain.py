"""Why a text fits a picture or not: which query answers, what it attends to, which patches speak for a match.

Letters as in qformer.py. Both maps over the patches come from the cross-attention A (H, Q, T) of a layer. The first is A
itself: the mean over heads and over the layers that have cross-attention. The second, the evidence for a match, is Grad-CAM
on attention, as ALBEF draws it (Selvaraju et al. 2017, arXiv:1610.02391; Li et al. 2021, arXiv:2107.07651): A times the
positive part of the gradient of the log-odds of a match, summed over layers, the mean over heads and queries."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..pipeline.device import autocast
from ..pipeline.encoders.picture import Picture
from ..pipeline.encoders.preprocessing import Preprocessing
from ..pipeline.errors import EncoderError, QfError
from ..pipeline.features.codecs import decode
from ..pipeline.features.reader import Features
from ..pipeline.formatting import printable
from ..pipeline.images import load_image
from ..pipeline.results import Result
from ..trainer.qformer import ImageEncoding, QFormer
from .encode.qformer import Run
from .encode.query_encoder import warn_of_unknown_words

# tokens before the patches: none; class; class and distillation; registers; class and registers
LEADING_TOKENS = (0, 1, 2, 4, 5)


@dataclass(frozen=True)
class Grid:
    """Where the patches are: `rows` x `columns` squares of `side` pixels, from the upper left corner on.

    `first` other tokens come before them. The encoder does not see the margin at the right and below that is narrower than a
    patch."""

    first: int
    rows: int
    columns: int
    side: int


@dataclass(frozen=True)
class Explanation:
    """A picture and a text, seen by a run."""

    picture: str
    caption: str
    pixels: np.ndarray  # (3, height, width) uint8, as the encoder sees it
    grid: Grid
    scores: np.ndarray  # (Q,) dot product of each query with the text; the greatest is the ITC score
    # share of each query's attention; the tokens before the patches get the rest
    attention: np.ndarray  # (Q, rows, columns)
    match: float  # the matching logit (ITM), which `qf search --rerank` adds to the ITC score
    probability: float  # that they match
    evidence: np.ndarray  # (rows, columns) evidence for a match, in its own unit

    @property
    def query(self) -> int:
        """The query that answers."""
        return int(self.scores.argmax())

    def result(self, run: str, out: str) -> "Explained":
        """The figures, with the run that gave them and the file of the drawing."""
        elsewhere = 1 - self.attention.sum((1, 2))
        queries = [
            {"query": int(n), "score": round(float(self.scores[n]), 6), "off_patches": round(float(elsewhere[n]), 6)}
            for n in np.argsort(-self.scores, kind="stable")
        ]
        return Explained(
            image=self.picture,
            caption=self.caption,
            itc=round(float(self.scores.max()), 6),
            itm=round(self.match, 6),
            itm_probability=round(self.probability, 6),
            query=self.query,
            queries=queries,
            grid=[self.grid.rows, self.grid.columns],
            run=run,
            out=out,
        )


@dataclass(frozen=True)
class Explained(Result):
    """The figures of an explanation; queries are ordered by score."""

    image: str
    caption: str
    itc: float
    itm: float
    itm_probability: float
    query: int  # the one that answers
    queries: list[dict[str, Any]]  # query, score, and the share of its attention that is on no patch
    grid: list[int]  # rows, columns
    run: str
    out: str

    def __str__(self) -> str:
        first, *others = self.queries
        behind = ", ".join(f"query {other['query']} {other['score']:.3f}" for other in others[:3])
        return "\n".join(
            [
                f"run       {self.run}",
                f"scores    ITC {self.itc:.3f}, ITM {self.itm:.3f} (probability {self.itm_probability:.1%})",
                f"queries   query {first['query']} answers, {first['score']:.3f}"
                + (f"; behind it {behind}" if others else ""),
                f"drawing   {self.out}",
            ]
        )


def patch_grid(encoder: dict[str, Any]) -> Grid:
    """The patches of an encoder, from its identity. EncoderError if its tokens are no grid.

    Patches of side p make a grid of height // p x width // p, in vision transformers and in feature maps alike."""
    tokens, height, width = encoder["tokens"], encoder["preprocessing"]["height"], encoder["preprocessing"]["width"]
    for first in LEADING_TOKENS:
        for side in range(min(height, width), 0, -1):
            rows, columns = height // side, width // side
            if rows * columns == tokens - first:
                return Grid(first, rows, columns, side)
    raise EncoderError(
        f"the {tokens} tokens of encoder {encoder['id']} are no grid of patches over {height}x{width} pixels; "
        "qf explain can only draw encoders whose tokens are a grid"
    )


def cached_picture(features: Features, key: str) -> Picture:
    """The picture of that key in the features: the tokens that training sees, and its thumbnail as pixels.

    QfError if there is none."""
    row = pc.index(features.table.column("key"), printable(key)).as_py()
    if row < 0:
        raise QfError(f"{key} is neither a file nor a key of {features.folder}; name a picture")
    thumbnail = features.table.column("thumbnail")[row].as_py()
    pixels = Preprocessing(**features.encoder["preprocessing"])(load_image(thumbnail))
    return Picture(key, pixels, decode(features.read(np.array([row]))), None)


def explain(run: Run, picture: Picture, caption: str) -> Explanation:
    """Explain what `run` sees in a picture and a text. QfError if the text is empty."""
    if not caption.strip():
        raise QfError('the caption is empty; say what the picture may show: qf explain photo.jpg "a dog on a beach"')
    grid = patch_grid(run.manifest["encoder"])
    embedder, model = run.embedder, run.embedder.model
    tokens = embedder.tokens
    warn_of_unknown_words("model", *tokens.unknown(caption))
    input_ids, mask = (t.to(embedder.device) for t in tokens.pad(tokens.ids([caption], embedder.max_text_length)))
    image_embeds = picture.tokens.to(embedder.device).clone()  # tensors of inference mode cannot be part of a graph
    model.eval()
    with autocast(embedder.device, embedder.dtype):
        with watched(model) as encoding:
            image = model.encode_image(image_embeds)
        text = model.encode_text(input_ids, mask)
        with watched(model) as matching:
            logits = model.match(image, torch.zeros_like(input_ids[:, 0]), input_ids, mask)[0]
        encoding_layers, matching_layers = (layers_of(model, image, passed) for passed in (encoding, matching))
    attention = torch.stack([layer.probabilities[0].mean(0) for layer in encoding_layers]).mean(0)  # (Q, T)
    evidence = grad_cam(logits[1] - logits[0], matching_layers)

    def patches(of_tokens: Tensor) -> np.ndarray:
        """(…, T) -> (…, rows, columns)."""
        return of_tokens[..., grid.first :].unflatten(-1, (grid.rows, grid.columns)).cpu().numpy()

    return Explanation(
        picture.name,
        caption,
        picture.pixels,
        grid,
        scores=(image.features[0] @ text.features[0]).detach().cpu().numpy(),
        attention=patches(attention),
        match=logits[1].item(),
        probability=logits.softmax(0)[1].item(),
        evidence=patches(evidence),
    )


@dataclass(frozen=True)
class CrossAttention:
    """The cross-attention of one layer in a pass over a single image."""

    query: Tensor  # (1, H, Q, D / H)
    key: Tensor  # (1, H, T, D / H)
    value: Tensor  # V (1, H, T, D / H)
    context: Tensor  # A V, heads side by side (Q, D): the only one that is part of the graph

    @property
    def probabilities(self) -> Tensor:
        """A (1, H, Q, T). Computed anew, because the fused kernels of the model never hold it."""
        return (self.query @ self.key.transpose(-1, -2) * self.query.shape[-1] ** -0.5).softmax(-1)


@contextmanager
def watched(model: QFormer) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect, layer by layer, the output A V of each cross-attention and the hidden states it started from, both (Q, D)."""
    passed: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.crossattention.output.register_forward_pre_hook(lambda _, arguments: passed.append(arguments))
        for layer in model.qformer.encoder.layers()
        if layer.crossattention is not None
    ]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: QFormer, image: ImageEncoding, passed: Sequence[tuple[Tensor, Tensor]]) -> list[CrossAttention]:
    """The cross-attentions of a pass over one image, from the tensors that `watched` collected."""
    all_layers = zip(model.qformer.encoder.layers(), image.cross, strict=True)
    crossing = [(layer.crossattention, cross) for layer, cross in all_layers if layer.crossattention and cross]
    found = []
    for (module, cross), (context, hidden) in zip(crossing, passed, strict=True):
        query = module.attention.project(hidden[None], module.attention.query).squeeze(2).transpose(1, 2)
        key, value = cross
        found.append(CrossAttention(query.detach().float(), key.detach().float(), value.detach().float(), context))
    return found


def grad_cam(score: Tensor, layers: list[CrossAttention]) -> Tensor:
    """(T,): attention times the positive part of d score / d A, which is d score / d (A V) times V transposed."""
    evidence = torch.zeros_like(layers[0].key[0, 0, :, 0])
    gradients = torch.autograd.grad(score, [layer.context for layer in layers])
    for layer, gradient in zip(layers, gradients, strict=True):
        by_head = gradient.float().unflatten(-1, (layer.value.shape[1], -1)).transpose(0, 1)  # (H, Q, D / H)
        gradient_of_attention = by_head @ layer.value.transpose(-1, -2)  # (1, H, Q, T)
        evidence += (layer.probabilities * gradient_of_attention.clamp(min=0)).mean((0, 1, 2))
    return evidence
