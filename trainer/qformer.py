"""The Q-Former of BLIP-2 (Li et al. 2023): queries and text share self-attention, queries attend to the image.

Letters: B images, T tokens of an image, W encoder width, Q queries, L text length, M texts, N image-text pairs,
D hidden width, H heads, E shared space, V vocabulary, S tokens of all sequences of a pass together.

Module and parameter names follow transformers' Blip2ForImageTextRetrieval wherever it has the same part. Everything that depends on
the image alone is computed once, in `encode_image`, and reused by matching and generation. packing.py lays sequences end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..pipeline.errors import ArtifactError
from .attention import Attention, Residual, attend, block_end, dropout, in_compute_dtype
from .config import QFormerConfig
from .packing import ImageRouting, Layout, TextGroups
from .weights.names import Weights
from .weights.read import fill, read_weights

KeyValue = tuple[Tensor, Tensor]  # each (·, H, length, D / H)


@dataclass(frozen=True)
class QueryOutput:
    """B images that the queries have read, with the keys and values that a text beside them reuses."""

    output: Tensor  # (B, Q, D)
    cross: list[
        KeyValue | None
    ]  # for each layer: the image's keys and values (B, H, T, D / H), None without cross-attention
    queries: list[KeyValue]  # for each layer: keys and values of the queries' self-attention (B, H, Q, D / H)


@dataclass(frozen=True)
class ImageEncoding(QueryOutput):
    """The same with the features of the space that images and texts share."""

    features: Tensor  # (B, Q, E), unit length


@dataclass(frozen=True)
class TextEncoding:
    """M texts, encoded without an image."""

    output: Tensor  # (M, L, D)
    features: Tensor  # (M, E), unit length


class _Intermediate(nn.Module):
    """The first half of a feed-forward block."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Layer(nn.Module):
    """Self-attention over queries and text, cross-attention for the queries, a feed-forward block for queries and one for text."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_hidden_size) if has_cross_attention else None
        self.intermediate = _Intermediate(config)
        self.output = Residual(config.intermediate_size, config)
        self.intermediate_query = _Intermediate(config)
        self.output_query = Residual(config.intermediate_size, config)

    def image_keys_values(self, image: Tensor, norm: nn.LayerNorm) -> KeyValue | None:
        """Keys and values (B, H, T, D / H) for cross-attention; None if this layer has none.

        `image` (B, T, W) is normalised, without the scale and shift of `norm`. Folding these into the weights saves a product
        over all image tokens in the backward pass."""
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
        routing: ImageRouting | None,
        keep: int | None,
    ) -> tuple[Tensor, KeyValue]:
        """One layer: `hidden` (S, D), packed by `layout` -> (S, D), and the self-attention's keys and values of the first group.

        `masks` holds one mask a group. `past` holds keys and values that each sequence attends to as well. `cross` holds those of
        the images. With `keep` the layer computes the first `keep` positions of each sequence, which attend to all positions."""
        hidden, keys_values = self._self_attention(hidden, layout, masks, past, keep)
        kept = layout if keep is None else layout.first(keep)
        count = sum(n for n, _ in kept.groups) * kept.queries
        both = []
        if count:
            queries = hidden[:count]
            if self.crossattention is not None:
                assert cross is not None
                queries = queries.unflatten(0, (-1, kept.queries))  # (N, Q, D)
                queries = self._cross_attention(self.crossattention, queries, cross, routing)
            both.append(self.output_query(self.intermediate_query(queries), queries))
        if len(hidden) > count:
            text = hidden[count:]
            both.append(self.output(self.intermediate(text), text))
        return both[0] if len(both) == 1 else torch.cat(both), keys_values

    def _self_attention(
        self,
        hidden: Tensor,
        layout: Layout,
        masks: Sequence[Tensor | None],
        past: KeyValue | None,
        keep: int | None,
    ) -> tuple[Tensor, KeyValue]:
        """Self-attention with its residual, for the first `keep` positions; and the keys and values of the first group."""
        attention = self.attention.attention
        p = self.attention.dropout if self.training else 0.0

        def heads(x: Tensor, where: Layout, *layers: nn.Linear) -> list[tuple[Tensor, ...]]:
            """(S, D) through the layers -> for each group a tuple with (n, H, length, D / H) for each layer."""
            return [group.permute(2, 0, 3, 1, 4).unbind(0) for group in where.split(attention.project(x, *layers))]

        if keep is None:  # queries, keys and values in one matrix product
            projected = heads(hidden, layout, attention.query, attention.key, attention.value)
        else:
            keys_values, everything = heads(hidden, layout, attention.key, attention.value), layout.split(hidden)
            layout = layout.first(keep)
            hidden = layout.join([group[:, :keep] for group in everything])
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
        self, crossattention: Attention, queries: Tensor, cross: KeyValue, routing: ImageRouting | None
    ) -> Tensor:
        """Queries (N, Q, D) attend to their images -> (N Q, D). Without `routing` pair n attends to image n."""
        p = crossattention.dropout if self.training else 0.0
        query = crossattention.attention.project(queries, crossattention.attention.query).squeeze(2)  # (N, Q, H, D / H)
        if routing is None:
            context = attend(query.transpose(1, 2), *cross, None, p).transpose(1, 2).flatten(2)  # (N, Q, D)
        else:
            context = routing.scatter(attend(*routing.gather(query, *cross), None, p))
        out: Tensor = crossattention.output(context.flatten(0, 1), queries.flatten(0, 1))
        return out


class _Encoder(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(config, number % config.cross_attention_frequency == 0) for number in range(config.num_hidden_layers)
        )

    def layers(self) -> list[_Layer]:
        """The layers, with their type."""
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

    def forward(self, input_ids: Sequence[Tensor], first: int = 0) -> Tensor:
        """Texts (n, l) of each group -> (S, D). One lookup serves all groups: its gradient is as large as the vocabulary.

        `first` is the position of the first token."""
        longest, most = first + max(group.shape[1] for group in input_ids), self.position_embeddings.num_embeddings
        if longest > most:
            raise ValueError(f"texts of {longest} tokens; the model has positions for {most}")
        ids = torch.cat([group.flatten() for group in input_ids])
        positions = torch.cat(
            [torch.arange(first, first + g.shape[1], device=g.device).expand_as(g).flatten() for g in input_ids]
        )
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
    """BERT's language head; the word embeddings are its decoder."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class _LanguageHead(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)


class QFormer(nn.Module):
    """Learned queries that read a frozen encoder's tokens, with heads for contrastive features, matching and language."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # compute layers again in the backward pass: less memory, more time
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
        """Let torch.compile fuse the end of every block in training: dropout, sum and LayerNorm.

        The ends take (S, D) for texts of any length, so that one compilation serves all layers. Whole layers would be compiled
        for each length, and dropout compiled within them would differ between passes with and without gradients."""
        compiled = torch.compile(block_end, dynamic=True)
        for module in self.modules():
            if isinstance(module, Residual):
                module.compiled = compiled

    @classmethod
    def from_weights(cls, config: QFormerConfig, weights: Weights | None) -> "QFormer":
        """A model with fresh parameters, then filled with `weights`. ArtifactError if these do not fit; see `weights.read.fill`."""
        model = cls(config)
        if weights is not None:
            fill(model, weights)
        return model

    @classmethod
    def from_pretrained(cls, path: object, **sizes: Any) -> "QFormer":
        """The model of a run, of BLIP-2 weights from LAVIS or Hugging Face, or of a BERT, in evaluation mode.

        `sizes` are fields of QFormerConfig that the source does not hold. A LAVIS file needs `num_attention_heads` unless its
        heads are 64 wide, a BERT needs `encoder_hidden_size`; `bos_token_id` is the last id by default. ArtifactError if `path`
        holds no weights, or weights of another model."""
        weights = read_weights(str(path), sizes.get("num_attention_heads"))
        sizes = weights.sizes | sizes
        if "encoder_hidden_size" not in sizes:
            raise ArtifactError(
                f"{path} is a BERT: give encoder_hidden_size, the width of the frozen encoder's features"
            )
        return cls.from_weights(QFormerConfig(**sizes), weights).eval()

    def _run(
        self,
        hidden: Tensor,
        layout: Layout,
        masks: Sequence[Tensor | None],
        past: list[KeyValue] | None = None,
        cross: list[KeyValue | None] | None = None,
        routing: ImageRouting | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """The embedding LayerNorm and all layers: `hidden` (S, D) -> (S, D), and the keys and values that each layer returns.

        With `keep` the last layer computes the first `keep` positions of each sequence alone: a head reads no others."""
        hidden = dropout(self.qformer.layernorm(hidden), self.config.hidden_dropout_prob, self.training)
        hidden = in_compute_dtype(hidden)  # the residual stream too
        kept = []
        layers = self.qformer.encoder.layers()
        for number, layer in enumerate(layers):
            arguments = (
                hidden,
                layout,
                masks,
                None if past is None else past[number],
                None if cross is None else cross[number],
                routing,
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
        read = self.read_image(image_embeds)
        features = F.normalize(self.vision_projection(read.output).float(), dim=-1)
        return ImageEncoding(read.output, read.cross, read.queries, features)

    def read_image(self, image_embeds: Tensor) -> QueryOutput:
        """Frozen tokens (B, T, W) -> query output (B, Q, D)."""
        norm = self.post_layernorm
        image_embeds = image_embeds.to(norm.weight.dtype)  # cached features may be float16
        image = in_compute_dtype(F.layer_norm(image_embeds, norm.normalized_shape, eps=norm.eps))  # (B, T, W)
        cross = [layer.image_keys_values(image, norm) for layer in self.qformer.encoder.layers()]
        count = len(image_embeds)
        queries = self.query_tokens.expand(count, -1, -1).flatten(0, 1)  # (B Q, D)
        output, kept = self._run(queries, Layout(self.config.num_query_tokens, ((count, 0),)), [None], cross=cross)
        return QueryOutput(output.unflatten(0, (count, -1)), cross, kept)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, first_only: bool = False) -> TextEncoding:
        """input_ids, attention_mask (M, L) -> output (M, L, D) and unit features (M, E) of the first token.

        With `first_only` the last layer computes the first token alone, and output is (M, 1, D). ValueError if the model has fewer
        than L positions."""
        texts = TextGroups.of(input_ids, attention_mask, trim=first_only)
        layout, keep = Layout(0, texts.groups), 1 if first_only else None
        masks = [mask[:, None, None, :] for mask in texts.attention_mask]  # (n, 1, 1, l)
        hidden, _ = self._run(self.embeddings(texts.input_ids), layout, masks, keep=keep)
        groups = (layout.first(1) if first_only else layout).split(hidden)
        output = texts.restore(groups, 1 if first_only else input_ids.shape[1])
        return TextEncoding(output, F.normalize(self.text_projection(output[:, 0]).float(), dim=-1))

    def match(self, image: QueryOutput, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (N, 2) of the pairs (image `image_rows[n]`, text n), the mean over queries; class 1 means that they match."""
        output, back = self._read_pairs(image, image_rows, input_ids, attention_mask)
        logits: Tensor = self.itm_head(output).float().unflatten(0, (-1, self.config.num_query_tokens)).mean(1)
        return logits[back]

    def read_pairs(self, image: QueryOutput, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Query output (N, Q, D) of the pairs (image `image_rows[n]`, text n): queries and text attend to each other."""
        output, back = self._read_pairs(image, image_rows, input_ids, attention_mask)
        return output.unflatten(0, (-1, self.config.num_query_tokens))[back]

    def _read_pairs(
        self, image: QueryOutput, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The query output (N Q, D), with the pairs sorted by the length of their text, and the place (N,) of each pair."""
        count = self.config.num_query_tokens
        texts = TextGroups.of(input_ids, attention_mask)
        layout = Layout(count, texts.groups)
        queries = self.query_tokens.expand(len(image_rows), -1, -1).flatten(0, 1)
        hidden = torch.cat([queries, self.embeddings(texts.input_ids)])
        seen = [F.pad(mask, (count, 0), value=True) for mask in texts.attention_mask]  # (n, Q + l)
        masks = [mask[:, None, None, :] for mask in seen]
        routing = ImageRouting.of(image_rows[texts.order], len(image.output))
        output, _ = self._run(hidden, layout, masks, cross=image.cross, routing=routing, keep=count)
        return output, texts.back

    def caption_states(
        self, image: QueryOutput, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """States (M, L, D) for the language head, of text m given image `image_rows[m]`; a token attends to all queries and to
        earlier tokens."""
        texts = TextGroups.of(input_ids, attention_mask)
        rows = image_rows[texts.order]
        past = [(key[rows], value[rows]) for key, value in image.queries]
        masks = []
        for mask in texts.attention_mask:
            causal = mask.new_ones(mask.shape[1], mask.shape[1]).tril() & mask[:, None, None, :]  # (n, 1, l, l)
            masks.append(F.pad(causal, (self.config.num_query_tokens, 0), value=True))  # (n, 1, l, Q + l)
        layout = Layout(0, texts.groups)
        output, _ = self._run(self.embeddings(texts.input_ids), layout, masks, past)
        return texts.restore(layout.split(output), input_ids.shape[1])

    def next_states(self, input_ids: Tensor, position: int, past: list[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        """The token (N,) at `position` of each caption, from 0 -> its state (N, D), and its keys and values in each layer.

        `past` has for each layer the keys and values of the queries and of earlier tokens, (N, H, Q + position, D / H)."""
        hidden = self.embeddings([input_ids[:, None]], position)
        return self._run(hidden, Layout(0, ((len(input_ids), 1),)), [None], past)

    def language_logits(self, states: Tensor) -> Tensor:
        """(..., D) -> next-token logits (..., V)."""
        head = self.cls.predictions
        return F.linear(head.transform(states), self.embeddings.word_embeddings.weight, head.bias)

    def caption_logits(
        self, image: QueryOutput, image_rows: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Next-token logits (M, L, V) of text m given image `image_rows[m]`."""
        return self.language_logits(self.caption_states(image, image_rows, input_ids, attention_mask))
