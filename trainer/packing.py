"""Sequences of different lengths in one tensor, and the image that each image-text pair attends to.

Letters as in qformer.py. A pass of the network lays the tokens of all its sequences end to end, as (S, D). Linear layers then
compute no padding between sequences of different length; only attention goes by sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_GROUPS = 6  # groups that the texts of a pass are sorted into by length
MOST_PADDING = 3.0  # queries computed for each real one, at most, where the pairs of an image attend together


@dataclass(frozen=True)
class Layout:
    """Where the tokens of N sequences lie in (S, ·): first all queries, sequence by sequence, then all text, group by group.

    The sequences of a group lie next to each other. Their texts have one length, padding included."""

    queries: int  # queries of each sequence
    groups: tuple[tuple[int, int], ...]  # for each group: its sequences n, and the length l of their texts

    def split(self, x: Tensor) -> list[Tensor]:
        """(S, ·) -> a tensor (n, queries + l, ·) for each group."""
        count = sum(n for n, _ in self.groups)
        queries = x[: count * self.queries].unflatten(0, (count, self.queries)).split([n for n, _ in self.groups])
        texts = x[count * self.queries :].split([n * length for n, length in self.groups])
        split = []
        for (n, length), query, text in zip(self.groups, queries, texts, strict=True):
            both = [query] * bool(self.queries) + [text.unflatten(0, (n, length))] * bool(length)
            split.append(both[0] if len(both) == 1 else torch.cat(both, 1))
        return split

    def join(self, split: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`: (n, queries + l, ·) for each group -> (S, ·)."""
        queries = [group[:, : self.queries].flatten(0, 1) for group in split] * bool(self.queries)
        texts = [
            group[:, self.queries :].flatten(0, 1)
            for group, (_, length) in zip(split, self.groups, strict=True)
            if length
        ]
        both = queries + texts
        return both[0] if len(both) == 1 else torch.cat(both)

    def first(self, count: int) -> "Layout":
        """The layout of the first `count` tokens of each sequence; `count` is at least its number of queries."""
        return Layout(self.queries, tuple((n, min(length, count - self.queries)) for n, length in self.groups))


@dataclass(frozen=True)
class TextGroups:
    """M texts sorted by length into groups, each as long as its longest text, so that little padding is computed.

    Sorting needs the lengths, and reading them from a CUDA device would wait for it: there all texts are one group."""

    order: Tensor  # (M,) the text at each place of the groups
    back: Tensor  # (M,) the place of each text
    groups: tuple[tuple[int, int], ...]  # for each group: its texts n, and their length l
    input_ids: list[Tensor]  # (n, l) for each group
    attention_mask: list[Tensor]  # (n, l) bool for each group

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, trim: bool = True) -> "TextGroups":
        """input_ids, attention_mask (M, L). Without `trim` all texts are one group of length L on any device."""
        count, length = input_ids.shape
        mask = attention_mask.bool()
        if trim and mask.device.type == "cpu":
            lengths = mask.sum(1)
            order = lengths.argsort(stable=True)
            rows = order.chunk(LENGTH_GROUPS)
            groups = tuple((len(some), int(lengths[some[-1]])) for some in rows)
        else:
            order = torch.arange(count, device=mask.device)
            rows, groups = (order,), ((count, length),)
        by_group = [(some, longest) for some, (_, longest) in zip(rows, groups, strict=True)]
        return cls(
            order,
            order.argsort(),
            groups,
            [input_ids[some, :longest] for some, longest in by_group],
            [mask[some, :longest] for some, longest in by_group],
        )

    def restore(self, split: Sequence[Tensor], length: int) -> Tensor:
        """(n, l, ·) for each group -> (M, length, ·), the texts in their own order, zeros after the length of their group."""
        return torch.cat([F.pad(group, (0, 0, 0, length - group.shape[1])) for group in split])[self.back]


@dataclass(frozen=True)
class ImageRouting:
    """Which of B images the queries of each of N pairs attend to.

    On a CPU the queries of all pairs of an image attend together, and the keys and values of the image exist once. This
    needs the number of pairs of each image. Reading it from a CUDA device would wait, so keys and values are copied there."""

    image_rows: Tensor  # (N,) the image of each pair
    pairs: Tensor | None = None  # (B, P) the pairs of each image, padded with pair 0; None: copy keys and values
    place: Tensor | None = None  # (N,) where each pair is in (B P,)

    @classmethod
    def of(cls, image_rows: Tensor, images: int) -> "ImageRouting":
        """image_rows (N,), from 0 to `images` - 1."""
        if image_rows.device.type != "cpu":
            return cls(image_rows)
        counts = image_rows.bincount(minlength=images)  # (B,)
        most = int(counts.max())
        if most * images > MOST_PADDING * len(image_rows):
            return cls(image_rows)
        order = image_rows.argsort(stable=True)
        nth = torch.arange(len(order)) - (counts.cumsum(0) - counts)[image_rows[order]]  # 0, 1 … within each image
        place = torch.empty_like(order)
        place[order] = image_rows[order] * most + nth
        pairs = torch.zeros(images * most, dtype=torch.long)
        pairs[place] = torch.arange(len(place))
        return cls(image_rows, pairs.view(images, most), place)

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, Q, H, D / H), keys and values (B, H, T, D / H) -> the three arguments of attention.

        Together: (B, H, P Q, D / H) and keys and values as they are; copied: (N, H, Q, D / H) and (N, H, T, D / H)."""
        if self.pairs is None:
            return query.transpose(1, 2), key[self.image_rows], value[self.image_rows]
        grouped = query.index_select(0, self.pairs.flatten()).unflatten(0, self.pairs.shape).flatten(1, 2)
        return grouped.transpose(1, 2), key, value

    def scatter(self, context: Tensor) -> Tensor:
        """The result of attention, (B, H, P Q, D / H) or (N, H, Q, D / H) -> (N, Q, D)."""
        context = context.transpose(1, 2).flatten(2)
        if self.pairs is None or self.place is None:
            return context
        context = context.unflatten(1, (self.pairs.shape[1], -1))  # (B, P, Q, D)
        return context.flatten(0, 1).index_select(0, self.place)
