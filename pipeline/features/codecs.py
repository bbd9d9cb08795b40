"""Codecs: token features as they lie on disk. `encode` makes the columns of a shard, `decode` is what the training device does.

    B images   T tokens   W encoder width   G = ceil(W / 64) groups of channels

    codec     columns of a record                                                      bytes an image
    float32   tokens float32 [T, W]                                                    4 T W
    float16   tokens float16 [T, W]                                                    2 T W
    int8      tokens int8 [T, W], token_scale float16 [T], channel_scale float16 [W]   T W + 2 T + 2 W
    int4      tokens uint8 [T, ceil(W / 2)], two values a byte, the even channel in    T ceil(W / 2) + 2 T G + 4 W
              the low half; token_scale float16 [T, G], channel_scale and
              channel_offset float16 [W]

    int8      value = tokens * token_scale * channel_scale
    int4      value = LEVELS[tokens] * token_scale * channel_scale + channel_offset

Vision transformers have a few channels that are large everywhere and a few tokens with enormous values in them (Sun et al.
2024, arXiv:2402.17762), so that one scale an image leaves nothing of the rest. Here a channel's scale is the square root of its
largest value, and a token's scale takes what remains: the balance that SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) strikes
between activations and weights. It costs a large value's row and column alike a little, and neither of them everything;
benchmarks/results.md compares it with the others. A record is encoded by itself: its bytes depend on no other.

Four bits use the levels of NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), which are dense around zero as features are, and
a scale for every 64 channels of a token. The mean of each channel over the tokens is taken out first where that errs less: it
does in a transformer, whose channels keep far from zero, and not in a network of rectified, mostly empty channels."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EncoderError

Encoded = dict[str, Tensor]  # column -> (B, *shape of a record), the type on disk
TokenColumns = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # column -> type, shape of a record

GROUP = 64  # channels of a token that share a scale, in int4
PIECE = 2**20  # values quantised at once: temporary arrays stay small enough for the cache at any batch size
MOST = 127  # the largest level of both integer codecs
# the smallest float16 above 0, added to every scale: none is 0, and no tiny one is rounded to less than it was
TINY = 2.0**-24

# the largest magnitude that a codec holds; a scale of float16 reaches 2**15 with room for rounding
LIMITS = {
    "float16": 65504.0,
    "float32": torch.finfo(torch.float32).max,
    "int8": MOST * 2.0**15,
    "int4": MOST * 2.0**15,
}
CODECS = tuple(LIMITS)


def columns(codec: str, tokens: int, width: int) -> TokenColumns:
    """The columns on disk of a record with (T, W) features."""
    if codec in ("float16", "float32"):
        return {"tokens": (getattr(torch, codec), (tokens, width))}
    channel_scale = (torch.float16, (width,))
    if codec == "int8":
        return {
            "tokens": (torch.int8, (tokens, width)),
            "token_scale": (torch.float16, (tokens,)),
            "channel_scale": channel_scale,
        }
    return {
        "tokens": (torch.uint8, (tokens, -(-width // 2))),
        "token_scale": (torch.float16, (tokens, -(-width // GROUP))),
        "channel_scale": channel_scale,
        "channel_offset": channel_scale,
    }


def encode(codec: str, image_embeds: Tensor) -> Encoded:
    """(B, T, W) float32 -> columns, on the same device, without waiting for it. `check` finds values that cannot be stored."""
    if codec in ("float16", "float32"):
        return {"tokens": image_embeds.to(getattr(torch, codec))}
    quantise = _int8 if codec == "int8" else _int4
    batch, tokens, width = image_embeds.shape
    out = {
        name: torch.empty(batch, *shape, dtype=dtype, device=image_embeds.device)
        for name, (dtype, shape) in columns(codec, tokens, width).items()
    }
    size = max(1, PIECE // (tokens * width))
    for start in range(0, batch, size):
        for name, column in quantise(image_embeds[start : start + size]).items():
            out[name][start : start + size] = column
    return out


def decode(encoded: Encoded) -> Tensor:
    """TokenColumns -> image_embeds (B, T, W) float32, on their own device. The type of `tokens` decides the codec."""
    tokens = encoded["tokens"]
    if tokens.dtype.is_floating_point:
        return tokens.float()
    channel_scale = encoded["channel_scale"].float().unsqueeze(-2)  # (B, 1, W)
    token_scale = encoded["token_scale"].float()
    if tokens.dtype == torch.int8:
        return (tokens * token_scale.unsqueeze(-1)).mul_(channel_scale)
    width = channel_scale.shape[-1]
    values = F.embedding(tokens.int(), _pairs(tokens.device)).flatten(-2)[..., :width]  # (B, T, W/2, 2) -> (B, T, W)
    values.mul_(token_scale.repeat_interleave(GROUP, -1)[..., :width]).mul_(channel_scale)
    return values.add_(encoded["channel_offset"].float().unsqueeze(-2))


def largest(image_embeds: Tensor) -> Tensor:
    """(B, T, W) -> (B,): the largest magnitude of each; a NaN stays one."""
    return torch.maximum(image_embeds.amax((1, 2)), -image_embeds.amin((1, 2)))


def check(codec: str, largest: Tensor, keys: Sequence[str]) -> None:
    """EncoderError that names the first of `keys` (B) whose features the codec cannot hold. `largest` (B,), on the CPU."""
    wrong = (~(largest <= LIMITS[codec])).nonzero().flatten().tolist()
    if not wrong:
        return
    value, key = largest[wrong[0]].item(), keys[wrong[0]]
    if not math.isfinite(value):
        raise EncoderError(f"the encoder gave features that are not finite for {key}; try --precision float32")
    wider = "int8 or float32" if codec == "float16" else "float32"
    raise EncoderError(
        f"{key} has a feature of {value:.4g}, beyond {LIMITS[codec]:.4g}, the most that --codec {codec} holds; "
        f"use --codec {wider}"
    )


def _scale(value: Tensor) -> Tensor:
    """A scale, rounded to float16. Tokens are divided by the rounded scale, so that rounding costs no accuracy."""
    return (value + TINY).half()


def _balance(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, W) -> the same over the channels' scales, and those (B, W): at most 1."""
    largest = values.abs().amax(1)
    channel_scale = _scale((largest / largest.amax(1, keepdim=True).clamp_min(1e-30)).sqrt())
    return values / channel_scale.float().unsqueeze(1), channel_scale


def _int8(values: Tensor) -> Encoded:
    balanced, channel_scale = _balance(values)
    token_scale = _scale(balanced.abs().amax(2) / MOST)  # (B, T)
    tokens = (balanced / token_scale.float().unsqueeze(2)).round().clamp(-MOST, MOST).to(torch.int8)
    return {"tokens": tokens, "token_scale": token_scale, "channel_scale": channel_scale}


def _int4(values: Tensor) -> Encoded:
    most = LIMITS["float16"]
    means = values.mean(1).clamp(-most, most).half()  # (B, W)
    plain, centred = _int4_around(torch.zeros_like(means), values), _int4_around(means, values)
    better = _relative_error(values, centred) < _relative_error(values, plain)  # (B,)
    return {name: torch.where(better.view(-1, *[1] * (a.ndim - 1)), centred[name], a) for name, a in plain.items()}


def _int4_around(channel_offset: Tensor, values: Tensor) -> Encoded:
    balanced, channel_scale = _balance(values - channel_offset.float().unsqueeze(1))
    width = balanced.shape[2]
    groups = F.pad(balanced, (0, -width % GROUP)).unflatten(2, (-1, GROUP))  # (B, T, G, 64)
    token_scale = _scale(groups.abs().amax(3) / MOST)  # (B, T, G)
    nearest = (groups / token_scale.float().unsqueeze(3)).round().clamp(-MOST, MOST) + MOST  # 0 … 254
    codes = _codes(values.device).index_select(0, nearest.int().flatten()).view(nearest.shape)
    codes = codes.flatten(2)[..., : width + width % 2]
    return {
        "tokens": codes[..., 0::2] | codes[..., 1::2] << 4,
        "token_scale": token_scale,
        "channel_scale": channel_scale,
        "channel_offset": channel_offset,
    }


def _relative_error(values: Tensor, encoded: Encoded) -> Tensor:
    """(B,): the squared error over the squared length of a token, averaged over the tokens."""
    error = (decode(encoded) - values).square().sum(2)
    return (error / values.square().sum(2).clamp_min(1e-30)).mean(1)


def _nf4() -> Tensor:
    """The 16 levels of NF4 over -127 … 127: quantiles of the normal distribution, 0 among them."""
    normal, most = NormalDist(), 0.9677083  # the outermost quantile, as QLoRA has it
    above = [normal.inv_cdf(most + (0.5 - most) * n / 8) for n in range(8)]
    below = [-normal.inv_cdf(most + (0.5 - most) * n / 7) for n in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above])) * (MOST / above[0])


LEVELS = _nf4()


@cache
def _codes(device: torch.device) -> Tensor:
    """(255,) uint8: the level next to each of -127 … 127."""
    values = torch.arange(-MOST, MOST + 1.0)
    return (values.unsqueeze(1) - LEVELS).abs().argmin(1).to(torch.uint8).to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values that a byte of int4 stands for."""
    codes = torch.arange(256)
    return torch.stack((LEVELS[codes & 15], LEVELS[codes >> 4]), 1).to(device)
