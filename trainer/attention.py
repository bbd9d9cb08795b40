"""Multi-head attention with its dropout and its residual, as every block of a BERT has them.

Letters as in qformer.py. Module and parameter names are those of transformers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import QFormerConfig


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout. On a CPU it draws 16 random bits a value: PyTorch's own dropout takes a third of a training step there."""
    if not training or p == 0:
        return x
    return F.dropout(x, p) if x.device.type != "cpu" else thin(x, random_bits(x), p)


def drop_tokens(image_embeds: Tensor, share: float) -> Tensor:
    """(B, T, W) -> (B, T', W): leaves out a random share of the tokens, the same ones for the whole batch.

    FLIP masks patches so for speed (Li et al. 2023, arXiv:2212.00794); here it works against overfitting of small datasets."""
    if share == 0:
        return image_embeds
    count = image_embeds.shape[1]
    kept = torch.randperm(count, device=image_embeds.device)[: max(1, round(count * (1 - share)))]
    return image_embeds[:, kept]


def random_bits(x: Tensor) -> Tensor:
    """Random int16 values in the shape of `x`."""
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape)


def thin(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """`x` with a share `p` of its values, chosen by `bits`, set to zero, and the rest scaled up."""
    keep = bits >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def block_end(x: Tensor, residual: Tensor, bits: Tensor, p: float, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Dropout, sum and LayerNorm, the end of a block in training. One function to compile; the caller draws its random bits."""
    return F.layer_norm(thin(x, bits, p) + residual, x.shape[-1:], weight, bias, eps).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Scaled dot-product attention -> (N, H, length, D / H), the shape of `query`; `mask` is True where a key may be attended to.

    Training on a CPU takes the written-out form, because the backward pass and dropout of the fused kernel are slower there.
    With dropout the result does not depend on whether gradients are computed: gradient caching relies on it."""
    if query.device.type != "cpu" or not (p or torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(-1, dtype=scores.dtype), p, p > 0) @ value


def in_compute_dtype(x: Tensor) -> Tensor:
    """`x` in the precision that matrix products have under autocast, else `x` itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Projections(nn.Module):
    """The linear layers for queries, keys and values of multi-head attention. Keys and values are made from inputs `source` wide."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        self.query = nn.Linear(config.hidden_size, inner)
        self.key = nn.Linear(source, inner)
        self.value = nn.Linear(source, inner)

    def project(self, x: Tensor, *layers: nn.Linear) -> Tensor:
        """x (..., ·) through several of the layers in one matrix product -> (..., layers, H, D / H)."""
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).unflatten(-1, (len(layers), self.heads, -1))


class Residual(nn.Module):
    """Linear layer, dropout, sum and LayerNorm: the end of every BERT block."""

    def __init__(self, width: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.compiled: Callable[..., Tensor] | None = None  # `block_end`, compiled

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x, norm = self.dense(x), self.LayerNorm
        if self.compiled is not None and self.training and self.dropout:
            return self.compiled(x, residual, random_bits(x), self.dropout, norm.weight, norm.bias, norm.eps)
        out: Tensor = norm(dropout(x, self.dropout, self.training) + residual)
        return out.to(x.dtype)  # autocast on CUDA makes it float32


class Attention(nn.Module):
    """The layers of multi-head attention and its residual. `QFormer` joins them: it attends within several layouts."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.attention = Projections(config, source)
        self.output = Residual(self.attention.query.out_features, config)
        self.dropout = config.attention_probs_dropout_prob
