"""Texts from next-token scores: greedy search, beam search and sampling, for any decoder.

Beam search is transformers' (version 5, `early_stopping=False`), so that equal logits give equal texts. The logits come from a
`Decoder`, which keeps its keys and values. Letters: N sequences, V vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NEVER = -1e9  # the log-probability of what must not be chosen


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; lengths are in tokens, without the end token."""

    beams: int = 1
    min_length: int = 0
    max_length: int = 30
    length_penalty: float = 1.0  # a beam's score is its log-probability divided by its length to this power
    temperature: float = 0.0  # 0: the likeliest token; above, tokens are drawn
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Decoder(Protocol):
    """Sequences that grow by a token at a time."""

    def start(self) -> Tensor:
        """Logits (N, V) of the first token of each sequence."""

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Go on with the sequences `rows` (M,) of the current ones, each with its next token (M,). Logits (M, V)."""


OnToken = Callable[[list[int]], None]  # gets the tokens so far of a text
OnText = Callable[[str], None]  # gets a text so far


@torch.inference_mode()
def generate(decoder: Decoder, ends: frozenset[int], how: Decoding, on_token: OnToken | None = None) -> list[list[int]]:
    """The tokens of a text for each of the decoder's sequences, without the end token that closed it.

    `ends` are the ids that end a text. Drawn texts depend on the seed and on the sequence's number alone. `on_token` is called after
    each token of the first sequence, except with beams, where no text is certain before the end."""
    if how.beams > 1 and not how.temperature:
        return _beam_search(decoder, ends, how)
    return _one_by_one(decoder, ends, how, on_token)


def generate_texts(
    decoder: Decoder,
    ends: frozenset[int],
    how: Decoding,
    text_of: Callable[[list[int]], str],
    on_text: OnText | None = None,
) -> list[str]:
    """As `generate`, with the tokens turned into text by `text_of`."""
    on_token = None if on_text is None else lambda tokens: on_text(text_of(tokens))
    return [text_of(tokens) for tokens in generate(decoder, ends, how, on_token)]


def _one_by_one(decoder: Decoder, ends: frozenset[int], how: Decoding, on_token: OnToken | None) -> list[list[int]]:
    """Greedy search or sampling. Sequences that have ended leave the batch."""
    logits = decoder.start()
    texts: list[list[int]] = [[] for _ in range(len(logits))]
    draws = [np.random.default_rng([how.seed, number]) for number in range(len(texts))]
    alive = list(range(len(texts)))  # the text of each row
    for length in range(how.max_length):
        scores = _adjusted(logits.float(), [texts[n] for n in alive], length, ends, how)
        chosen = _drawn(scores, [draws[n] for n in alive], how) if how.temperature else scores.argmax(-1).tolist()
        goes_on = [row for row, token in enumerate(chosen) if token not in ends]
        for row in goes_on:
            texts[alive[row]].append(chosen[row])
        if on_token and alive and alive[0] == 0 and 0 in goes_on:
            on_token(texts[0])
        if not goes_on or length + 1 == how.max_length:
            break
        tokens = torch.tensor([chosen[row] for row in goes_on], device=logits.device)
        logits = decoder.advance(torch.tensor(goes_on, device=logits.device), tokens)
        alive = [alive[row] for row in goes_on]
    return texts


def _adjusted(
    scores: Tensor, texts: Sequence[Sequence[int]], length: int, ends: frozenset[int], how: Decoding
) -> Tensor:
    """Scores (N, V), logits or log-probabilities, with the repetition penalty (Keskar et al. 2019) and the least length."""
    if how.repetition_penalty != 1:
        for row, text in enumerate(texts):
            if text:
                seen = torch.tensor(sorted(set(text)), device=scores.device)
                values = scores[row, seen]
                penalty = how.repetition_penalty
                scores[row, seen] = torch.where(values < 0, values * penalty, values / penalty)
    if length < how.min_length:
        scores[:, list(ends)] = -torch.inf
    return scores


def _drawn(logits: Tensor, draws: Sequence[np.random.Generator], how: Decoding) -> list[int]:
    """A token for each row of logits (N, V), from the likeliest ones that make up `top_p` (Holtzman et al. 2020)."""
    shares, order = (logits / how.temperature).softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= how.top_p, 0.0)
    upto = shares.cumsum(-1)
    at = torch.tensor([rng.random() for rng in draws], dtype=torch.float64, device=logits.device) * upto[:, -1]
    places = torch.searchsorted(upto, at[:, None], right=True).squeeze(1)
    last = (shares > 0).sum(-1) - 1  # rounding must not lead beyond
    return order.gather(1, torch.minimum(places, last)[:, None]).squeeze(1).tolist()


@dataclass
class _Beams:
    """The beams of one text."""

    texts: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])  # sums of log-probabilities
    ended: list[tuple[float, list[int]]] = field(default_factory=list)  # the best ones, with their score, best first


def _beam_search(decoder: Decoder, ends: frozenset[int], how: Decoding) -> list[list[int]]:
    """The best ended beam of each text. Texts whose running beams cannot beat their ended ones leave the batch."""
    logits = decoder.start()
    device, vocabulary = logits.device, logits.shape[1]
    found = [_Beams() for _ in range(len(logits))]
    alive = list(range(len(found)))
    kept = max(2, 1 + len(ends)) * how.beams  # enough of them go on even if every beam ends in every way
    for length in range(how.max_length):
        texts = [text for n in alive for text in found[n].texts]
        scores = _adjusted(logits.float().log_softmax(-1), texts, length, ends, how)
        so_far = torch.tensor([score for n in alive for score in found[n].scores], device=device)
        scores = (scores + so_far[:, None]).view(len(alive), -1)  # (texts, beams V)
        best, places = scores.topk(min(kept, scores.shape[1]), dim=-1)
        rows: list[int] = []
        tokens: list[int] = []
        going_on: list[int] = []
        width = scores.shape[1] // vocabulary  # beams of each text now
        for nth, (n, values, where) in enumerate(zip(alive, best.tolist(), places.tolist(), strict=True)):
            beams = found[n]
            origins = [divmod(place, vocabulary) for place in where]
            last = length + 1 == how.max_length
            ending = [token in ends or last for _, token in origins]
            for rank in range(min(how.beams, len(values))):
                if ending[rank]:
                    origin, token = origins[rank]
                    text = beams.texts[origin] + ([] if token in ends else [token])
                    beams.ended.append((values[rank] / (length + 1) ** how.length_penalty, text))
            beams.ended = sorted(beams.ended, key=lambda ended: -ended[0])[: how.beams]
            running = [rank for rank in range(len(values)) if not ending[rank]][: how.beams]
            beams.texts = [[*beams.texts[origins[rank][0]], origins[rank][1]] for rank in running]
            beams.scores = [values[rank] for rank in running]
            if running and _may_improve(beams, length + 1, how):
                going_on.append(n)
                rows += [nth * width + origins[rank][0] for rank in running]
                tokens += [origins[rank][1] for rank in running]
                missing = how.beams - len(running)  # a vocabulary smaller than the beams
                rows += rows[-1:] * missing
                tokens += tokens[-1:] * missing
                beams.texts += beams.texts[-1:] * missing
                beams.scores += [NEVER] * missing
        if not going_on:
            break
        alive = going_on
        logits = decoder.advance(torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
    return [max(beams.ended, key=lambda ended: ended[0])[1] for beams in found]


def _may_improve(beams: _Beams, length: int, how: Decoding) -> bool:
    """Whether the best running beam could still enter the ended ones, if it ended at this length."""
    return len(beams.ended) < how.beams or beams.scores[0] / length**how.length_penalty > beams.ended[-1][0]
