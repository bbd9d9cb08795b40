from collections import Counter

import numpy as np
import pytest
import torch
from qf.pipeline.errors import TrainingError
from qf.trainer.batches import Batches
from qf.trainer.tokens import Tokens

from conftest import run_extract  # isort: skip


@pytest.fixture(scope="module")
def tokens(features):
    return Tokens.train([c for captions in features.captions for c in captions] * 2, 100)


def make(features, tokens, **more):
    options = {"batch_size": 5, "captions_per_image": 1, "matched_captions": 0, "max_text_length": 16, "seed": 0} | more
    return Batches(features, features.rows("train"), tokens, **options)


def test_an_epoch_shows_every_image_once_and_two_epochs_every_caption(features, tokens):
    batches = make(features, tokens, batch_size=4)
    seen = Counter()
    for step in range(2 * batches.steps_per_epoch):
        batch = batches.batch(step)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            seen[tuple(ids[: int(mask.sum())].tolist())] += 1
    texts = [tuple(i) for row in features.rows("train") for i in tokens.ids(features.captions[row], 16)]
    assert seen == Counter(texts)


def test_features_captions_and_images_belong_together(features, tokens):
    batches = make(features, tokens, captions_per_image=0)
    batch = batches.batch(3)
    assert batch.image_rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    by_tokens = {features.encoded(np.array([row]))["tokens"].numpy().tobytes(): row for row in features.rows("train")}
    for row, embeds in enumerate(batch.encoded["tokens"]):
        captions = features.captions[by_tokens[embeds.numpy()[None].tobytes()]]
        mine = [tokens.tokenizer.decode(batch.input_ids[m].tolist()) for m in range(10) if batch.image_rows[m] == row]
        assert sorted(mine) == sorted(captions)


def test_all_captions_are_matched_over_the_epochs(features, tokens):
    batches = make(features, tokens, batch_size=4, captions_per_image=0, matched_captions=1)
    seen = Counter()
    for step in range(2 * batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch.image_rows[batch.matched].tolist() == [0, 1, 2, 3]
        seen.update(tuple(batch.input_ids[m][batch.attention_mask[m].bool()].tolist()) for m in batch.matched)
    assert seen == Counter(tuple(i) for row in features.rows("train") for i in tokens.ids(features.captions[row], 16))


def test_a_batch_is_a_function_of_the_step(features, tokens):
    first, second = make(features, tokens), make(features, tokens)
    ahead = list(first.steps(2, 7))
    for step, batch in enumerate(ahead, start=2):
        assert torch.equal(batch.encoded["tokens"], second.batch(step).encoded["tokens"])
        assert torch.equal(batch.input_ids, second.batch(step).input_ids)
    other = make(features, tokens, seed=1)
    assert any(not torch.equal(other.batch(s).encoded["tokens"], first.batch(s).encoded["tokens"]) for s in range(3))


def test_too_few_images_are_refused(features, tokens):
    with pytest.raises(TrainingError, match="has 1 training images"):
        Batches(
            features,
            np.array([0]),
            tokens,
            batch_size=2,
            captions_per_image=1,
            matched_captions=1,
            max_text_length=8,
            seed=0,
        )


def test_each_epoch_takes_another_view(pictures, clip_folder, tokens, tmp_path):
    """Over three epochs each image comes once as it is and once in either of its two views."""
    features = run_extract(pictures, clip_folder, tmp_path / "features", views=2)
    rows = features.rows("train")
    owners = {}
    for view in range(3):
        for row, embeds in zip(rows, features.encoded(rows, np.full(len(rows), view))["tokens"], strict=True):
            owners[embeds.numpy().tobytes()] = (int(row), view)
    assert len(owners) == 3 * len(rows)
    batches = make(features, tokens, batch_size=4)
    seen = Counter(
        owners[embeds.numpy().tobytes()]
        for step in range(3 * batches.steps_per_epoch)
        for embeds in batches.batch(step).encoded["tokens"]
    )
    assert seen == Counter(owners.values())
