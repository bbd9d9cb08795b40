import torch
from hypothesis import given
from hypothesis import strategies as st
from qf.trainer.metrics.retrieval import image_to_text, recalls, retrieval, text_to_image

matrices = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=9).map(
        lambda texts: torch.tensor(texts, dtype=torch.float32).T  # (n images, M texts), many ties
    )
)


@given(matrices, st.randoms())
def test_recall_against_a_naive_count(scores, random):
    images, texts = scores.shape
    owner = [random.randrange(images) for _ in range(texts)]
    order = (-scores).argsort(dim=0, stable=True)  # of equal images the first in the dataset, as in search
    ranks = [order[:, m].tolist().index(owner[m]) for m in range(texts)]
    got = text_to_image(scores, torch.tensor(owner))
    for k in (1, 5, 10):
        assert abs(got[f"text_to_image_R@{k}"] - 100 * sum(r < k for r in ranks) / texts) < 0.01
    found = []
    for i in range(images):
        if i in owner:
            found.append([owner[m] == i for m in (-scores[i]).argsort(stable=True)].index(True))
    got = image_to_text(scores, torch.tensor(owner))
    assert abs(got["image_to_text_R@1"] - 100 * sum(r < 1 for r in found) / len(found)) < 0.01


def test_a_scorer_that_cannot_tell_finds_what_chance_finds():
    metrics = retrieval(torch.zeros(20, 20), torch.arange(20))
    assert metrics["text_to_image_R@5"] == metrics["image_to_text_R@5"] == 25.0
    perfect = retrieval(torch.eye(20), torch.arange(20))
    assert set(perfect.values()) == {100.0}
    assert recalls(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), "x")["x_R@1"] == 0.0
