"""Text towers in NumPy: transformer blocks as BERT, CLIP and SigLIP have them, for one text at a time, without padding.

A search has one short text. PyTorch takes longer to import than this takes to compute. Equal to PyTorch in float32 to 1e-6.

Letters: L length of the text, D hidden width, H heads, E width of the space that images and texts share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ...pipeline.mapped_tensors import MappedTensors

Pair = tuple[np.ndarray, np.ndarray]  # weight and bias
Activation = Callable[[np.ndarray], np.ndarray]
ERF_ENDS, ERF_DEGREE = 4.0, 18  # from there on erf is 1 in float32; of the polynomial, which is off by 4e-10 at most


@dataclass(frozen=True)
class Layer:
    """The weights of a block, and how it computes."""

    query_key_value: tuple[Pair, Pair, Pair]
    out: Pair  # of attention
    up: Pair
    down: Pair  # of the feed-forward block
    attention_norm: Pair
    forward_norm: Pair
    heads: int
    eps: float
    activation: Activation


def after_norm(layer: Layer, x: np.ndarray) -> np.ndarray:
    """A block of BERT: each sum is normalised. x (L, D) -> (L, D)."""
    x = layer_norm(x + attended(layer, x, causal=False), layer.attention_norm, layer.eps)
    return layer_norm(x + fed_forward(layer, x), layer.forward_norm, layer.eps)


def before_norm(layer: Layer, x: np.ndarray, causal: bool) -> np.ndarray:
    """A block of CLIP, `causal`, or SigLIP: what each half takes is normalised. x (L, D) -> (L, D)."""
    x = x + attended(layer, layer_norm(x, layer.attention_norm, layer.eps), causal)
    return x + fed_forward(layer, layer_norm(x, layer.forward_norm, layer.eps))


def attended(layer: Layer, x: np.ndarray, causal: bool) -> np.ndarray:
    """Multi-head self-attention without its residual. With `causal` a token sees no later one."""
    length = len(x)

    def heads(pair: Pair) -> np.ndarray:
        return linear(x, pair).reshape(length, layer.heads, -1).transpose(1, 0, 2)  # (H, L, ·)

    query, key, value = map(heads, layer.query_key_value)
    scores = (query * np.float32(query.shape[-1] ** -0.5)) @ key.transpose(0, 2, 1)  # (H, L, L)
    if causal:
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear((weights @ value).transpose(1, 0, 2).reshape(length, -1), layer.out)


def fed_forward(layer: Layer, x: np.ndarray) -> np.ndarray:
    """The feed-forward block without its residual."""
    return linear(layer.activation(linear(x, layer.up)), layer.down)


def linear(x: np.ndarray, pair: Pair) -> np.ndarray:
    """A linear layer; its weight is (outputs, inputs)."""
    return x @ pair[0].T + pair[1]


def layer_norm(x: np.ndarray, pair: Pair, eps: float) -> np.ndarray:
    """LayerNorm over the last dimension."""
    centred = x - x.mean(-1, keepdims=True)
    scale = np.float32(1) / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(eps))
    return centred * scale * pair[0] + pair[1]


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors of unit length, as PyTorch's `normalize` makes them."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))


# ---- activations -----------------------------------------------------------------------------------------------------


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution's share below x."""
    return (0.5 * x * (1 + erf(x * math.sqrt(0.5)))).astype(np.float32)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """OpenAI's approximation of `gelu`."""
    with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0, as it should be
        return x / (1 + np.exp(np.float32(-1.702) * x))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """The approximation of `gelu` by tanh."""
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


ACTIVATIONS: dict[str, Activation] = {  # by transformers' names
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}


def erf(x: np.ndarray) -> np.ndarray:
    """The error function in float64, which NumPy lacks: x times a polynomial of x²."""
    x = x.astype(np.float64)
    squares = np.minimum(x * x * (2 / ERF_ENDS**2) - 1, 1)  # -1 to 1
    coefficients = _erf_coefficients()
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= squares
        total += coefficient
    return np.where(np.abs(x) < ERF_ENDS, total * x, np.sign(x))


@cache
def _erf_coefficients() -> tuple[float, ...]:
    """Of the polynomial that goes through erf(√s)/√s at the Chebyshev points of s from 0 to `ERF_ENDS`²."""
    from numpy.polynomial import chebyshev

    points = chebyshev.chebpts1(ERF_DEGREE + 1)
    roots = np.sqrt((points + 1) / 2) * ERF_ENDS
    values = np.array([math.erf(root) for root in roots.tolist()]) / roots
    return tuple(chebyshev.cheb2poly(chebyshev.chebfit(points, values, ERF_DEGREE)).tolist())


# ---- towers ----------------------------------------------------------------------------------------------------------


class QFormerText:
    """The text side of a Q-Former: BERT's blocks, and a projection of the first token."""

    def __init__(self, tensors: MappedTensors, sizes: dict[str, Any]) -> None:
        """From the tensors of a run; `sizes` are those of its manifest. KeyError if a tensor is missing or of another shape."""
        self.tensors, self.eps = tensors, float(sizes["layer_norm_eps"])
        self.width, wide = sizes["hidden_size"], sizes["intermediate_size"]
        heads = sizes["num_attention_heads"]
        inner = heads * (sizes["head_dim"] or self.width // heads)

        def pair(name: str, outputs: int, inputs: int) -> Pair:
            return tensors.tensor(f"{name}.weight", outputs, inputs), tensors.tensor(f"{name}.bias", outputs)

        def norm(name: str) -> Pair:
            return tensors.tensor(f"{name}.weight", self.width), tensors.tensor(f"{name}.bias", self.width)

        def layer(name: str) -> Layer:
            def projection(part: str) -> Pair:
                return pair(f"{name}.attention.attention.{part}", inner, self.width)

            return Layer(
                query_key_value=(projection("query"), projection("key"), projection("value")),
                out=pair(f"{name}.attention.output.dense", self.width, inner),
                up=pair(f"{name}.intermediate.dense", wide, self.width),
                down=pair(f"{name}.output.dense", self.width, wide),
                attention_norm=norm(f"{name}.attention.output.LayerNorm"),
                forward_norm=norm(f"{name}.output.LayerNorm"),
                heads=heads,
                eps=self.eps,
                activation=gelu,
            )

        self.layers = [layer(f"qformer.encoder.layer.{number}") for number in range(sizes["num_hidden_layers"])]
        self.positions = tensors.tensor("embeddings.position_embeddings.weight", None, self.width)
        self.norm = norm("qformer.layernorm")
        self.projection = pair("text_projection", sizes["embed_dim"], self.width)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Ids (L,) of a text, special tokens included -> its embedding (E,), float32 of unit length."""
        x = self.tensors.rows("embeddings.word_embeddings.weight", ids, self.width) + self.positions[: len(ids)]
        x = layer_norm(x, self.norm, self.eps)
        for layer in self.layers:
            x = after_norm(layer, x)
        return unit(linear(x[0], self.projection))


class EncoderText:
    """The text model of a CLIP or a SigLIP."""

    def __init__(
        self,
        tensors: MappedTensors,
        causal: bool,
        layers: int,
        heads: int,
        activation: str,
        eps: float,
        eos_token_id: int,
    ) -> None:
        """From the tensors of the whole model. CLIP's is `causal` and ends with the token `eos_token_id`; SigLIP's takes the
        last token. KeyError if a tensor is missing or of another shape, or if there is no such activation."""
        self.tensors, self.causal, self.eps, self.eos_token_id = tensors, causal, eps, eos_token_id
        self.positions = tensors.tensor("text_model.embeddings.position_embedding.weight", None, None)
        self.width = self.positions.shape[1]

        def pair(name: str, outputs: int | None, inputs: int | None) -> Pair:
            weight = tensors.tensor(f"{name}.weight", outputs, inputs)
            return weight, tensors.tensor(f"{name}.bias", len(weight))

        def norm(name: str) -> Pair:
            return tensors.tensor(f"{name}.weight", self.width), tensors.tensor(f"{name}.bias", self.width)

        def layer(name: str) -> Layer:
            def projection(part: str) -> Pair:
                return pair(f"{name}.self_attn.{part}_proj", self.width, self.width)

            up = pair(f"{name}.mlp.fc1", None, self.width)
            return Layer(
                query_key_value=(projection("q"), projection("k"), projection("v")),
                out=projection("out"),
                up=up,
                down=pair(f"{name}.mlp.fc2", self.width, len(up[0])),
                attention_norm=norm(f"{name}.layer_norm1"),
                forward_norm=norm(f"{name}.layer_norm2"),
                heads=heads,
                eps=eps,
                activation=ACTIVATIONS[activation],
            )

        self.layers = [layer(f"text_model.encoder.layers.{number}") for number in range(layers)]
        self.norm = norm("text_model.final_layer_norm")
        if causal:
            projection = tensors.tensor("text_projection.weight", None, self.width)
            self.projection = projection, np.zeros(len(projection), np.float32)
        else:
            self.projection = pair("text_model.head", None, self.width)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Ids (L,) of a text, special tokens included -> its embedding (E,), float32 of unit length.

        SigLIP's texts are padded to the full length, because its model sees the padding."""
        x = self.tensors.rows("text_model.embeddings.token_embedding.weight", ids, self.width)
        x = x + self.positions[: len(ids)]
        for layer in self.layers:
            x = before_norm(layer, x, self.causal)
        return unit(linear(layer_norm(x[self._place(ids)], self.norm, self.eps), self.projection))

    def _place(self, ids: np.ndarray) -> int:
        """The token whose state stands for the text. Old configurations of CLIP name 2 as the end, and mean the largest id."""
        if not self.causal:
            return len(ids) - 1
        return int(np.argmax(ids if self.eos_token_id == 2 else ids == self.eos_token_id))
