"""A contact sheet of the texts that a scorer fails: the right picture, then what the scorer prefers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from .measure import Both, SplitScores
from .mix import mixed
from .mix_file import TEXT_TO_IMAGE, Row, Scorer
from .searcher import Hit
from .sheet import COLUMNS, contact_sheet

SHOWN = 12  # texts
NAMES = {"clip": "encoder"}


def failed(ranks: torch.Tensor, most: int = SHOWN) -> list[int]:
    """ranks (M,) -> at most so many of the queries that are not found first, spread evenly over all of them."""
    missed = (ranks > 0).nonzero().ravel().tolist()
    return [missed[n * len(missed) // most] for n in range(most)] if len(missed) > most else missed


def draw_failures(
    scores: SplitScores,
    scorers: Mapping[str, Scorer],
    rankings: Mapping[str, Both],
    rows: Mapping[str, Row],
    path: Path,
) -> None:
    """Draw texts whose picture the best scorer does not rank first, by R@1 of text to image; of equals the first one.

    Each row has the right picture in a frame, with the rank that it got, then those that are ranked before it. A picture that was not
    re-ranked has its first score."""
    best = max(rows, key=lambda name: rows[name][f"{TEXT_TO_IMAGE}_R@1"])
    ranked, weights = rankings[best][TEXT_TO_IMAGE], scorers[best.partition("+")[0]].text_to_image
    queries = torch.tensor(failed(ranked.ranks), dtype=torch.long)
    spaces = {name: one.scores(TEXT_TO_IMAGE, queries) for name, one in scores.embedded.items()}
    first = mixed(spaces, weights)  # (n, N)
    searches, wanted, notes = [], [], []
    for number, query in enumerate(queries.tolist()):
        right, rank = int(scores.data.image_rows[query]), int(ranked.ranks[query])
        found = dict(zip(ranked.chosen[query].tolist(), ranked.scores[query].tolist(), strict=True))
        hits = [_hit(scores, right, rank, found.get(right, float(first[number, right])))]
        preferred = [item for item in list(found)[:COLUMNS] if item != right][: min(rank, COLUMNS - 1)]
        hits += [_hit(scores, item, place, found[item]) for place, item in enumerate(preferred)]
        searches.append((scores.data.texts[query], hits))
        wanted.append({hits[0].key})
        notes.append(f"rank {rank + 1:,} of {len(scores.data.rows):,}")
    missed, texts = int((ranked.ranks > 0).sum()), len(scores.data.texts)
    name = NAMES.get(best, best.upper())
    title = f"{name}: {missed:,} of {texts:,} texts do not find their picture first"
    if len(queries) < missed:
        title += f"; {len(queries)} of them, evenly spread"
    contact_sheet(searches, path, wanted, notes, title)


def _hit(scores: SplitScores, item: int, rank: int, score: float) -> Hit:
    """The image at a place of the split, ranked at `rank` from 0 on."""
    row = int(scores.data.rows[item])
    record = {
        name: scores.features.table.column(name)[row].as_py() for name in ("key", "image", "captions", "thumbnail")
    }
    return Hit(rank + 1, score=round(score, 6), **record)
