"""The Q-Former of BLIP-2 (Li et al. 2023): queries and text share self-attention, queries look at the image.

Letters: B images, T tokens of an image, W encoder width, Q queries, L text length, M texts, N image-text pairs,
D hidden width, H heads, E shared space, V vocabulary, S tokens of all sequences of a pass together.

Module and parameter names are those of transformers' Blip2ForImageTextRetrieval wherever it has the part. Everything that
depends on the image alone is computed once, in `encode_image`, and reused by matching and generation. A pass lays the tokens of all
its sequences end to end (`Layout`): products run over (S, D) whatever the lengths, and only attention goes by sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import QFormerConfig

KeyValue = tuple[Tensor, Tensor]  # each (·, H, length, D / H)
LENGTH_GROUPS = 6  # of the texts of a pass
MOST_PADDING = 3.0  # times the pairs' own queries, where the pairs of an image look at it together


@dataclass(frozen=True)
class ImageEncoding:
    """Images as the Q-Former sees them, and what `match` and `caption_logits` reuse."""

    output: Tensor  # (B, Q, D)
    features: Tensor  # (B, Q, E), unit length
    cross: list[KeyValue | None]  # the image's keys and values, for each layer with cross-attention: (B, H, T, D / H)
    queries: list[KeyValue]  # keys and values of the queries' self-attention: (B, H, Q, D / H)


@dataclass(frozen=True)
class TextEncoding:
    """Texts, encoded without an image."""

    output: Tensor  # (M, L, D)
    features: Tensor  # (M, E), unit length


@dataclass(frozen=True)
class Layout:
    """Where the tokens of N sequences lie in (S, ·): first all queries, sequence by sequence, then all text, group by group.

    The sequences of a group are next to each other and have texts of one length, padding included."""

    queries: int  # of each sequence
    groups: tuple[tuple[int, int], ...]  # sequences, tokens of each one's text

    def split(self, x: Tensor) -> list[Tensor]:
        """(S, ·) -> (n, queries + l, ·) of each group."""
        count = sum(n for n, _ in self.groups)
        queries = x[: count * self.queries].unflatten(0, (count, self.queries)).split([n for n, _ in self.groups])
        texts = x[count * self.queries :].split([n * length for n, length in self.groups])
        parts = []
        for (n, length), query, text in zip(self.groups, queries, texts, strict=True):
            both = [query] * bool(self.queries) + [text.unflatten(0, (n, length))] * bool(length)
            parts.append(both[0] if len(both) == 1 else torch.cat(both, 1))
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, queries + l, ·) of each group -> (S, ·)."""
        queries = [part[:, : self.queries].flatten(0, 1) for part in parts] * bool(self.queries)
        texts = [
            part[:, self.queries :].flatten(0, 1)
            for part, (_, length) in zip(parts, self.groups, strict=True)
            if length
        ]
        both = queries + texts
        return both[0] if len(both) == 1 else torch.cat(both)

    def first(self, count: int) -> "Layout":
        """Of the first `count` tokens of each sequence, at least its queries."""
        return Layout(self.queries, tuple((n, min(length, count - self.queries)) for n, length in self.groups))


@dataclass(frozen=True)
class _Texts:
    """Texts sorted by length, in groups that are as long as their longest: padding costs little.

    Asking a device for lengths would wait for it: on CUDA all texts are one group, and so they are where none is `cut`."""

    order: Tensor  # (M,) rows of the texts, in the order of the groups
    back: Tensor  # (M,) where each text is in `order`
    groups: tuple[tuple[int, int], ...]  # texts, length
    input_ids: list[Tensor]  # (n, l) of each group
    attention_mask: list[Tensor]  # (n, l) bool

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, cut: bool = True) -> "_Texts":
        count, length = input_ids.shape
        mask = attention_mask.bool()
        if cut and mask.device.type == "cpu":
            lengths = mask.sum(1)
            order = lengths.argsort(stable=True)
            chunks = order.chunk(LENGTH_GROUPS)
            groups = tuple((len(rows), int(lengths[rows[-1]])) for rows in chunks)
        else:
            order = torch.arange(count, device=mask.device)
            chunks, groups = (order,), ((count, length),)
        parts = [(rows, longest) for rows, (_, longest) in zip(chunks, groups, strict=True)]
        return cls(
            order,
            order.argsort(),
            groups,
            [input_ids[rows, :longest] for rows, longest in parts],
            [mask[rows, :longest] for rows, longest in parts],
        )

    def restore(self, parts: Sequence[Tensor], length: int) -> Tensor:
        """(n, l, ·) of each group -> (M, length, ·), the texts in their own order, zeros after their group's length."""
        return torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts])[self.back]


@dataclass(frozen=True)
class _ImageRouting:
    """Which image the queries of each pair look at.

    The queries of all pairs of an image attend together, to keys and values that exist once. That takes the number of pairs of each
    image: rows that are on a device are not asked for it, and keys and values are copied for each pair there."""

    image_rows: Tensor  # (N,)
    pairs: Tensor | None = None  # (B, P): the pairs of each image, padded with any; None: copy
    place: Tensor | None = None  # (N,): where in (B P,) each pair is

    @classmethod
    def of(cls, image_rows: Tensor, images: int) -> "_ImageRouting":
        if image_rows.device.type != "cpu":
            return cls(image_rows)
        counts = image_rows.bincount(minlength=images)  # (B,)
        most = int(counts.max())
        if most * images > MOST_PADDING * len(image_rows):
            return cls(image_rows)
        order = image_rows.argsort(stable=True)
        nth = torch.arange(len(order)) - (counts.cumsum(0) - counts)[image_rows[order]]  # of its image's pairs
        place = torch.empty_like(order)
        place[order] = image_rows[order] * most + nth
        pairs = torch.zeros(images * most, dtype=torch.long)
        pairs[place] = torch.arange(len(place))
        return cls(image_rows, pairs.view(images, most), place)

    def attend(self, query: Tensor, keys_values: KeyValue, p: float) -> Tensor:
        """query (N, Q, H, D / H) of each pair, keys and values (B, H, T, D / H) -> context (N, Q, D)."""
        key, value = keys_values
        if self.pairs is None or self.place is None:
            key, value = key[self.image_rows], value[self.image_rows]
            return attend(query.transpose(1, 2), key, value, None, p).transpose(1, 2).flatten(2)
        images, most = self.pairs.shape
        grouped = query.index_select(0, self.pairs.flatten()).unflatten(0, (images, most)).flatten(1, 2)
        context = attend(grouped.transpose(1, 2), key, value, None, p)  # (B, H, P Q, D / H)
        context = context.transpose(1, 2).flatten(2).unflatten(1, (most, -1))  # (B, P, Q, D)
        return context.flatten(0, 1).index_select(0, self.place)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout, on a CPU with 16 random bits a value: PyTorch's own takes a third of a training step there."""
    if not training or p == 0:
        return x
    return F.dropout(x, p) if x.device.type != "cpu" else _thin(x, _random_bits(x), p)


def _random_bits(x: Tensor) -> Tensor:
    """int16 of the shape of `x`."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return words.view(torch.int16)[: x.numel()].view(x.shape)


def _thin(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """`x` without the share `p` that `bits` choose, and the rest scaled up."""
    keep = bits >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def _end(x: Tensor, residual: Tensor, bits: Tensor, p: float, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The end of a block in training, as one function to compile: its random numbers are drawn before."""
    return F.layer_norm(_thin(x, bits, p) + residual, x.shape[-1:], weight, bias, eps).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Scaled dot-product attention; each (N, H, length, D / H), `mask` True where a key may be seen.

    Written out for training on a CPU, where the fused kernel's backward pass and its dropout are slower. With dropout the same
    whether gradients are wanted or not: gradient caching relies on it."""
    if query.device.type != "cpu" or not (p or torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(-1, dtype=scores.dtype), p, p > 0) @ value


def _as_computed(x: Tensor) -> Tensor:
    """`x` in the precision of the products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Projections(nn.Module):
    """Queries, keys and values of multi-head attention, `source` wide where keys and values come from elsewhere."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        self.query = nn.Linear(config.hidden_size, inner)
        self.key = nn.Linear(source, inner)
        self.value = nn.Linear(source, inner)

    def project(self, x: Tensor, *layers: nn.Linear) -> Tensor:
        """x (..., ·) through several of the layers in one product -> (..., layers, H, D / H)."""
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).unflatten(-1, (len(layers), self.heads, -1))


class _Residual(nn.Module):
    """dense, dropout, add, LayerNorm: the end of every BERT block."""

    def __init__(self, width: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.compiled: Callable[..., Tensor] | None = None  # of `_end`

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x, norm = self.dense(x), self.LayerNorm
        if self.compiled is not None and self.training and self.dropout:
            return self.compiled(x, residual, _random_bits(x), self.dropout, norm.weight, norm.bias, norm.eps)
        out: Tensor = norm(dropout(x, self.dropout, self.training) + residual)
        return out.to(x.dtype)  # where autocast makes it float32, as on CUDA


class _Attention(nn.Module):
    """The parts of multi-head attention with its residual."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.attention = _Projections(config, source)
        self.output = _Residual(self.attention.query.out_features, config)
        self.dropout = config.attention_probs_dropout_prob


class _Intermediate(nn.Module):
    """The first half of a feed-forward block."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Layer(nn.Module):
    """Self-attention over queries and text, cross-attention for the queries, and a feed-forward block for each kind."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = _Attention(config, config.hidden_size)
        self.crossattention = _Attention(config, config.encoder_hidden_size) if has_cross_attention else None
        self.intermediate = _Intermediate(config)
        self.output = _Residual(config.intermediate_size, config)
        self.intermediate_query = _Intermediate(config)
        self.output_query = _Residual(config.intermediate_size, config)

    def image_keys_values(self, image: Tensor, norm: nn.LayerNorm) -> KeyValue | None:
        """Keys and values for cross-attention, if this layer has it, of the image (B, T, W) before the scale and shift of `norm`.

        These are folded into the weights: the gradient then needs no product over the frozen tokens but the weights' own."""
        if self.crossattention is None:
            return None
        layers = (self.crossattention.attention.key, self.crossattention.attention.value)
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        out = F.linear(image, weight * norm.weight, bias + weight @ norm.bias)  # (B, T, 2 H D / H)
        key, value = out.unflatten(-1, (2, self.crossattention.attention.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        masks: Sequence[Tensor | None],
        past: KeyValue | None,
        cross: KeyValue | None,
        looks: _ImageRouting | None,
        keep: int | None,
    ) -> tuple[Tensor, KeyValue]:
        """`hidden` (S, D) as `layout` says; a mask a group; `past`: further keys and values for each sequence; `cross`: the images'.

        With `keep` only the first that many positions of each sequence are computed, though all are attended to."""
        hidden, keys_values = self._self_attention(hidden, layout, masks, past, keep)
        kept = layout if keep is None else layout.first(keep)
        count = sum(n for n, _ in kept.groups) * kept.queries
        parts = []
        if count:
            seen = hidden[:count]
            if self.crossattention is not None:
                assert cross is not None
                seen = self._cross_attention(self.crossattention, seen.unflatten(0, (-1, kept.queries)), cross, looks)
            parts.append(self.output_query(self.intermediate_query(seen), seen))
        if len(hidden) > count:
            text = hidden[count:]
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts), keys_values

    def _self_attention(
        self,
        hidden: Tensor,
        layout: Layout,
        masks: Sequence[Tensor | None],
        past: KeyValue | None,
        keep: int | None,
    ) -> tuple[Tensor, KeyValue]:
        """The attended `hidden`, its first `keep` positions a sequence, and the keys and values of the first group."""
        attention = self.attention.attention
        p = self.attention.dropout if self.training else 0.0

        def heads(x: Tensor, where: Layout, *layers: nn.Linear) -> list[tuple[Tensor, ...]]:
            """(S, D) through the layers -> of each group, of each layer: (n, H, length, D / H)."""
            return [part.permute(2, 0, 3, 1, 4).unbind(0) for part in where.split(attention.project(x, *layers))]

        if keep is None:  # all in one product
            projected = heads(hidden, layout, attention.query, attention.key, attention.value)
        else:
            keys_values, everything = heads(hidden, layout, attention.key, attention.value), layout.split(hidden)
            layout = layout.first(keep)
            hidden = layout.join([part[:, :keep] for part in everything])
            queries = heads(hidden, layout, attention.query)
            projected = [query + pair for query, pair in zip(queries, keys_values, strict=True)]
        sizes = [n for n, _ in layout.groups]
        pasts = [None] * len(sizes) if past is None else list(zip(*(x.split(sizes) for x in past), strict=True))
        contexts = []
        for (query, key, value), mask, before in zip(projected, masks, pasts, strict=True):
            if before is not None:
                key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
            contexts.append(attend(query, key, value, mask, p).transpose(1, 2).flatten(2))
        return self.attention.output(layout.join(contexts), hidden), (projected[0][1], projected[0][2])

    def _cross_attention(
        self, crossattention: _Attention, seen: Tensor, cross: KeyValue, looks: _ImageRouting | None
    ) -> Tensor:
        """Queries (N, Q, D) look at their images -> (N Q, D)."""
        p = crossattention.dropout if self.training else 0.0
        query = crossattention.attention.project(seen, crossattention.attention.query).squeeze(2)  # (N, Q, H, D / H)
        if looks is None:  # each at its own
            context = attend(query.transpose(1, 2), *cross, None, p).transpose(1, 2).flatten(2)
        else:
            context = looks.attend(query, cross, p)
        out: Tensor = crossattention.output(context.flatten(0, 1), seen.flatten(0, 1))
        return out


class _Encoder(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(config, number % config.cross_attention_frequency == 0) for number in range(config.num_hidden_layers)
        )

    def layers(self) -> list[_Layer]:
        """The layers, as what they are."""
        return list(self.layer)  # type: ignore[arg-type]


class _QFormerBody(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config)


class _Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Sequence[Tensor]) -> Tensor:
        """Texts (n, l) of each group -> (S, D), one lookup for all: its gradient is as large as the vocabulary."""
        longest, most = max(group.shape[1] for group in input_ids), self.position_embeddings.num_embeddings
        if longest > most:
            raise ValueError(f"texts of {longest} tokens; the model has positions for {most}")
        ids = torch.cat([group.flatten() for group in input_ids])
        positions = torch.cat([torch.arange(g.shape[1], device=g.device).expand_as(g).flatten() for g in input_ids])
        out: Tensor = self.word_embeddings(ids) + self.position_embeddings(positions)
        return out


class _Transform(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out


class _Predictions(nn.Module):
    """BERT's language head; its decoder is tied to the word embeddings."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class _LanguageHead(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)


class QFormer(nn.Module):
    """Learned queries that read a frozen encoder's tokens, with heads for contrast, matching and language."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # compute layers again in the backward pass: slower, less memory
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.post_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.ln_vision_eps)
        self.embeddings = _Embeddings(config)
        self.qformer = _QFormerBody(config)
        self.vision_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.cls = _LanguageHead(config)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.apply(self._initialise)
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx : module.padding_idx + 1].detach())

    def compile_blocks(self) -> None:
        """Have torch.compile fuse the end of every block in training: dropout, sum and LayerNorm.

        These take (S, D) whatever the texts' lengths: compiled once, for all layers. Whole layers were compiled anew for each
        length, or copied padding; and dropout compiled with them differs between passes with and without gradients."""
        compiled = torch.compile(_end, dynamic=True)
        for module in self.modules():
            if isinstance(module, _Residual):
                module.compiled = compiled

    @classmethod
    def from_pretrained(cls, path: object, **sizes: float) -> "QFormer":
        """A run, BLIP-2 weights of LAVIS (.safetensors, .pth) or Hugging Face, or a BERT; see `pretrained.load_qformer`."""
        from .weights.read import load_qformer

        return load_qformer(path, **sizes)

    def _run(
        self,
        hidden: Tensor,
        layout: Layout,
        masks: Sequence[Tensor | None],
        past: list[KeyValue] | None = None,
        cross: list[KeyValue | None] | None = None,
        looks: _ImageRouting | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All layers over `hidden` (S, D), which comes before the embedding LayerNorm.

        With `keep`, the last layer gives only the first that many positions of each sequence: those that a head reads."""
        hidden = dropout(self.qformer.layernorm(hidden), self.config.hidden_dropout_prob, self.training)
        hidden = _as_computed(hidden)  # keep the residual stream in the precision of the products
        kept = []
        layers = self.qformer.encoder.layers()
        for number, layer in enumerate(layers):
            arguments = (
                hidden,
                layout,
                masks,
                None if past is None else past[number],
                None if cross is None else cross[number],
                looks,
                keep if number == len(layers) - 1 else None,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden, own = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden, own = layer(*arguments)
            kept.append(own)
        return hidden, kept

    def encode_image(self, image_embeds: Tensor) -> ImageEncoding:
        """Frozen tokens (B, T, W) -> query output (B, Q, D) and unit features (B, Q, E)."""
        norm = self.post_layernorm
        image_embeds = image_embeds.to(norm.weight.dtype)  # cached features may be float16
        image = _as_computed(F.layer_norm(image_embeds, norm.normalized_shape, eps=norm.eps))  # (B, T, W)
        cross = [layer.image_keys_values(image, norm) for layer in self.qformer.encoder.layers()]
        count = len(image_embeds)
        queries = self.query_tokens.expand(count, -1, -1).flatten(0, 1)  # (B Q, D)
        output, kept = self._run(queries, Layout(self.config.num_query_tokens, ((count, 0),)), [None], cross=cross)
        output = output.unflatten(0, (count, -1))
        return ImageEncoding(output, F.normalize(self.vision_projection(output).float(), dim=-1), cross, kept)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, first_only: bool = False) -> TextEncoding:
        """input_ids, attention_mask (M, L) -> output (M, L, D) and unit features (M, E) of the first token.

        `first_only` spares the padding, and the rest of the last layer: output is (M, 1, D). ValueError if L is more than the
        model has positions for."""
        texts = _Texts.of(input_ids, attention_mask, cut=first_only)
        layout, keep = Layout(0, texts.groups), 1 if first_only else None
        masks = [mask[:, None, None, :] for mask in texts.attention_mask]  # (n, 1, 1, l)
        hidden, _ = self._run(self.embeddings(texts.input_ids), layout, masks, keep=keep)
        parts = (layout.first(1) if first_only else layout).split(hidden)
        output = texts.restore(parts, 1 if first_only else input_ids.shape[1])
        return TextEncoding(output, F.normalize(self.text_projection(output[:, 0]).float(), dim=-1))

    def match(self, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (N, 2) of the pairs (image `image_rows[n]`, text n); class 1 means that they match. The mean over queries."""
        count = self.config.num_query_tokens
        texts = _Texts.of(input_ids, attention_mask)
        layout = Layout(count, texts.groups)
        queries = self.query_tokens.expand(len(image_rows), -1, -1).flatten(0, 1)
        hidden = torch.cat([queries, self.embeddings(texts.input_ids)])
        seen = [F.pad(mask, (count, 0), value=True) for mask in texts.attention_mask]  # (n, Q + l)
        masks = [mask[:, None, None, :] for mask in seen]
        looks = _ImageRouting.of(image_rows[texts.order], len(image.output))
        output, _ = self._run(hidden, layout, masks, cross=image.cross, looks=looks, keep=count)
        logits: Tensor = self.itm_head(output).float().unflatten(0, (-1, count)).mean(1)
        return logits[texts.back]

    def caption_states(
        self, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """What the language head reads, (M, L, D), of text m given image `image_rows[m]`: text sees all queries and earlier text."""
        texts = _Texts.of(input_ids, attention_mask)
        rows = image_rows[texts.order]
        past = [(key[rows], value[rows]) for key, value in image.queries]
        masks = []
        for mask in texts.attention_mask:
            causal = mask.new_ones(mask.shape[1], mask.shape[1]).tril() & mask[:, None, None, :]  # (n, 1, l, l)
            masks.append(F.pad(causal, (self.config.num_query_tokens, 0), value=True))  # (n, 1, l, Q + l)
        layout = Layout(0, texts.groups)
        output, _ = self._run(self.embeddings(texts.input_ids), layout, masks, past)
        return texts.restore(layout.split(output), input_ids.shape[1])

    def language_logits(self, states: Tensor) -> Tensor:
        """(..., D) -> next-token logits (..., V)."""
        head = self.cls.predictions
        return F.linear(head.transform(states), self.embeddings.word_embeddings.weight, head.bias)

    def caption_logits(
        self, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Next-token logits (M, L, V) of text m given image `image_rows[m]`: text sees all queries and earlier text."""
        return self.language_logits(self.caption_states(image, image_rows, input_ids, attention_mask))
