"""The Q-Former of BLIP-2 (Li et al. 2023): queries and text share self-attention, queries look at the image.

Letters: B images, T tokens of an image, W encoder width, Q queries, L text length, M texts, N image-text pairs,
D hidden width, H heads, E shared space, V vocabulary.

Module and parameter names are those of transformers' Blip2ForImageTextRetrieval wherever it has the part. Everything that
depends on the image alone is computed once, in `encode_image`, and reused by matching and generation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import QFormerConfig

KeyValue = tuple[Tensor, Tensor]  # each (·, H, length, D / H)


@dataclass(frozen=True)
class ImageEncoding:
    """Images as the Q-Former sees them, and what `match` and `caption_logits` reuse."""

    output: Tensor  # (B, Q, D)
    features: Tensor  # (B, Q, E), unit length
    cross: list[
        KeyValue | None
    ]  # keys and values of the image, a pair a layer that has cross-attention: (B, H, T, D / H)
    queries: list[KeyValue]  # keys and values of the queries' self-attention: (B, H, Q, D / H)


@dataclass(frozen=True)
class TextEncoding:
    """Texts, encoded without an image."""

    output: Tensor  # (M, L, D)
    features: Tensor  # (M, E), unit length


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout, on a CPU with 16 random bits a value: PyTorch's own takes a third of a training step there."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Scaled dot-product attention; each (N, H, length, D / H), `mask` True where a key may be seen.

    Written out for training on a CPU, where the fused kernel's backward pass and its dropout are slower."""
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(-1, dtype=scores.dtype), p, p > 0) @ value


class _Projections(nn.Module):
    """Queries, keys and values of multi-head attention, `source` wide where keys and values come from elsewhere."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        self.query = nn.Linear(config.hidden_size, inner)
        self.key = nn.Linear(source, inner)
        self.value = nn.Linear(source, inner)

    def project(self, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """x (N, length, ·) through several of the layers in one product -> (N, H, length, D / H) each."""
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        out = F.linear(x, weight, bias).unflatten(-1, (len(layers), self.heads, -1))  # (N, length, layers, H, D / H)
        return out.permute(2, 0, 3, 1, 4).unbind(0)


class _Residual(nn.Module):
    """dense, dropout, add, LayerNorm: the end of every BERT block."""

    def __init__(self, width: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(dropout(self.dense(x), self.dropout, self.training) + residual)
        return out


class _Attention(nn.Module):
    """Multi-head attention of `hidden` to keys and values, with the residual."""

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        self.attention = _Projections(config, source)
        self.output = _Residual(self.attention.query.out_features, config)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, query: Tensor, keys_values: KeyValue, mask: Tensor | None) -> Tensor:
        """`hidden` (N, length, D) attends by its `query` (N, H, length, D / H)."""
        key, value = keys_values
        context = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.output(context.transpose(1, 2).flatten(2), hidden)
        return out


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

    def image_keys_values(self, image: Tensor) -> KeyValue | None:
        """Keys and values of the image (B, T, W) for cross-attention, if this layer has it."""
        if self.crossattention is None:
            return None
        attention = self.crossattention.attention
        key, value = attention.project(image, attention.key, attention.value)
        return key, value

    def forward(
        self,
        hidden: Tensor,
        queries: int,
        mask: Tensor | None,
        past: KeyValue | None,
        cross: KeyValue | None,
        keep: int | None,
    ) -> tuple[Tensor, KeyValue]:
        """`hidden` (N, queries + L, D); `past` are further keys and values to attend to; `cross` the image's.

        With `keep` only the first that many positions are computed, though all are attended to."""
        attention = self.attention.attention
        query, key, value = attention.project(hidden, attention.query, attention.key, attention.value)
        keys_values = (key, value) if past is None else (torch.cat([past[0], key], 2), torch.cat([past[1], value], 2))
        hidden = self.attention(hidden[:, :keep], query[:, :, :keep], keys_values, mask)
        parts = []
        if queries:
            seen = hidden[:, :queries]
            if self.crossattention is not None:
                assert cross is not None
                (query,) = self.crossattention.attention.project(seen, self.crossattention.attention.query)
                seen = self.crossattention(seen, query, cross, None)
            parts.append(self.output_query(self.intermediate_query(seen), seen))
        if hidden.shape[1] > queries:
            text = hidden[:, queries:]
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), (key, value)


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

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.word_embeddings(input_ids) + self.position_embeddings(positions)
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

    @classmethod
    def from_pretrained(cls, path: object, **sizes: float) -> "QFormer":
        """A run, BLIP-2 weights of LAVIS (.safetensors, .pth) or Hugging Face, or a BERT; see `pretrained.load_qformer`."""
        from .pretrained import load_qformer

        return load_qformer(path, **sizes)

    def _run(
        self,
        hidden: Tensor,
        queries: int,
        mask: Tensor | None,
        past: list[KeyValue] | None,
        cross: list[KeyValue | None] | None,
        keep: int | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All layers over `hidden` (N, queries + L, D), which comes before the embedding LayerNorm.

        With `keep`, the last layer gives only the first that many positions: those that a head reads."""
        hidden = dropout(self.qformer.layernorm(hidden), self.config.hidden_dropout_prob, self.training)
        if torch.is_autocast_enabled(hidden.device.type):  # keep the residual stream in the precision of the products
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        kept = []
        layers = self.qformer.encoder.layers()
        for number, layer in enumerate(layers):
            hidden, own = layer(
                hidden,
                queries,
                mask,
                None if past is None else past[number],
                None if cross is None else cross[number],
                keep if number == len(layers) - 1 else None,
            )
            kept.append(own)
        return hidden, kept

    def encode_image(self, image_embeds: Tensor) -> ImageEncoding:
        """Frozen tokens (B, T, W) -> query output (B, Q, D) and unit features (B, Q, E)."""
        image = self.post_layernorm(image_embeds)  # (B, T, W)
        cross = [layer.image_keys_values(image) for layer in self.qformer.encoder.layers()]
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)  # (B, Q, D)
        output, kept = self._run(queries, queries.shape[1], None, None, cross)
        return ImageEncoding(output, F.normalize(self.vision_projection(output).float(), dim=-1), cross, kept)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, first_only: bool = False) -> TextEncoding:
        """input_ids, attention_mask (M, L) -> output (M, L, D) and unit features (M, E) of the first token.

        `first_only` spares the rest of the last layer: output is (M, 1, D)."""
        mask = attention_mask.bool()[:, None, None, :]  # (M, 1, 1, L)
        output, _ = self._run(self.embeddings(input_ids), 0, mask, None, None, 1 if first_only else None)
        return TextEncoding(output, F.normalize(self.text_projection(output[:, 0]).float(), dim=-1))

    def match(self, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (N, 2) of the pairs (image `image_rows[n]`, text n); class 1 means that they match. The mean over queries."""
        count = self.config.num_query_tokens
        cross = [None if kv is None else (kv[0][image_rows], kv[1][image_rows]) for kv in image.cross]
        hidden = torch.cat([self.query_tokens.expand(len(image_rows), -1, -1), self.embeddings(input_ids)], 1)
        mask = F.pad(attention_mask.bool(), (count, 0), value=True)[:, None, None, :]  # (N, 1, 1, Q + L)
        output, _ = self._run(hidden, count, mask, None, cross, count)
        logits: Tensor = self.itm_head(output).float().mean(1)
        return logits

    def caption_logits(
        self, image: ImageEncoding, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Next-token logits (M, L, V) of text m given image `image_rows[m]`: text sees all queries and earlier text."""
        past = [(key[image_rows], value[image_rows]) for key, value in image.queries]
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()  # (L, L)
        text = causal[None, None] & attention_mask.bool()[:, None, None, :]  # (M, 1, L, L)
        mask = F.pad(text, (self.config.num_query_tokens, 0), value=True)  # (M, 1, L, Q + L)
        output, _ = self._run(self.embeddings(input_ids), 0, mask, past, None)
        head = self.cls.predictions
        return F.linear(head.transform(output), self.embeddings.word_embeddings.weight, head.bias)
