"""Rankings, some queries at a time, against the whole matrix: equal, with ties on purpose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qf.retrieval import ranking
from qf.retrieval.mix_file import IMAGE_TO_TEXT, TEXT_TO_IMAGE, WAYS, Scorer, Weights
from qf.retrieval.ranking import Embedded, rank, rerank

SCORERS = {
    "clip": Scorer(Weights(1, 0, 1), Weights(1, 0, 1)),
    "itc": Scorer(Weights(0, 1, 1), Weights(0, 1, 1)),
    "mix": Scorer(Weights(0.5, 0.25, 1), Weights(0.25, 0.5, 2)),
}


@st.composite
def splits(draw):
    """Embeddings of both spaces and the image of each text. Whole numbers: their sums are exact, and there are many ties."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, m, q, e = (draw(st.integers(1, most)) for most in (9, 12, 3, 2))
    m = max(n, m)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=random).float()

    owners = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=random)]).sort().values
    return {"clip": Embedded(whole(n, 1, e), whole(m, e)), "itc": Embedded(whole(n, q, e), whole(m, e))}, owners


def plain_scores(embedded, scorer, way):
    """The whole matrix by plain sums, a row for each query."""
    weights = getattr(scorer, way)
    images, texts = (embedded["clip"].images, embedded["clip"].texts)
    scores = [[0.0] * len(texts) for _ in images]
    for space, weight in (("clip", weights.clip), ("itc", weights.itc)):
        images, texts = embedded[space].images.tolist(), embedded[space].texts.tolist()
        for n, image in enumerate(images):
            for m, text in enumerate(texts):
                best = max(sum(a * b for a, b in zip(query, text, strict=True)) for query in image)
                scores[n][m] += weight * best
    return [list(column) for column in zip(*scores, strict=True)] if way == TEXT_TO_IMAGE else scores


def in_order(row):
    """The candidates from the best to the worst; of equals the first one."""
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


def belongs(query, candidate, way, owners):
    image, text = (candidate, query) if way == TEXT_TO_IMAGE else (query, candidate)
    return owners[text] == image


def best_place(order, query, way, owners):
    return next(place for place, c in enumerate(order) if belongs(query, c, way, owners))


@settings(max_examples=100)
@given(splits(), st.sampled_from(WAYS), st.integers(1, 14), st.integers(1, 60))
def test_any_block_gives_what_the_whole_matrix_gives(split, way, k, block):
    embedded, owners = split
    found = rank(embedded, SCORERS, way, owners, k, block)
    for name, scorer in SCORERS.items():
        scores = plain_scores(embedded, scorer, way)
        orders = [in_order(row) for row in scores]
        ranked = found[name]
        assert ranked.chosen.tolist() == [order[:k] for order in orders]
        assert ranked.scores.tolist() == [[row[c] for c in in_order(row)[:k]] for row in scores]
        assert ranked.ranks.tolist() == [best_place(order, q, way, owners) for q, order in enumerate(orders)]


@settings(max_examples=100)
@given(splits(), st.sampled_from(WAYS), st.integers(1, 14), st.integers(1, 14), st.integers(0, 2**31))
def test_reranking_orders_the_candidates_by_the_sum_and_leaves_the_others_behind(split, way, k, kept, seed):
    embedded, owners = split
    first = rank(embedded, SCORERS, way, owners, max(k, kept))["itc"]
    matching = torch.randint(-3, 4, first.chosen[:, :k].shape, generator=torch.Generator().manual_seed(seed)).float()
    again = rerank(first, way, owners, matching, seconds=1.0)
    assert again.seconds == first.seconds + 1
    for q, row in enumerate(plain_scores(embedded, SCORERS["itc"], way)):
        order = in_order(row)
        sums = {c: row[c] + logit for c, logit in zip(order[:k], matching[q].tolist(), strict=True)}
        order = [*sorted(sums, key=lambda c: (-sums[c], c)), *order[k:]]
        assert again.chosen[q].tolist() == order[: max(k, kept)]
        assert again.ranks[q] == best_place(order, q, way, owners)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 5), st.integers(1, 100))
def test_tiles_cover_the_matrix_once_and_stay_small(images, texts, per_image, block):
    seen = torch.zeros(images, texts)
    for some, those in ranking._tiles(images, texts, per_image, block):
        seen[some, those] += 1
        tile = seen[some, those]
        assert tile.numel() * per_image <= max(block, per_image)
    assert bool((seen == 1).all())


def test_a_query_costs_its_spaces_and_no_others():
    embedded = {name: Embedded(torch.rand(50, 4, 8), torch.rand(250, 8)) for name in ("clip", "itc")}
    found = rank(embedded, SCORERS, IMAGE_TO_TEXT, torch.arange(250) // 5, 10)
    assert found["mix"].seconds > 0
    assert found["mix"].milliseconds == found["mix"].seconds * 1000 / 50
