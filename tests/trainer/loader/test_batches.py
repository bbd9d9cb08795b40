from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from qf.pipeline.errors import TrainingError
from qf.pipeline.features.codecs import decode
from qf.trainer.loader.batches import Batches, BufferPool
from qf.trainer.tokens import Tokens

from conftest import run_extract  # isort: skip


@pytest.fixture(scope="module")
def tokens(features):
    return Tokens.train([c for captions in features.captions for c in captions] * 2, 100)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_a_buffer_is_taken_again_once_its_tensor_is_gone_and_never_before():
    memory = BufferPool()
    first = memory.empty((3, 4), torch.float16)
    where, part = first.data_ptr(), first[1:]
    assert first.shape == (3, 4)
    assert first.dtype == torch.float16
    del first  # `part` still holds its memory
    second = memory.empty((3, 4), torch.float16)
    assert second.data_ptr() != where
    del part
    assert memory.empty((3, 4), torch.float16).data_ptr() == where
    assert memory.empty((3, 4), torch.int8).data_ptr() != where


def make(features, tokens, **more):
    options = {"batch_size": 5, "captions_per_image": 1, "matched_captions": 0, "max_text_length": 16, "seed": 0} | more
    return Batches(features, features.rows("train"), tokens, **options)


def test_an_epoch_shows_every_image_once_and_two_epochs_every_caption(features, tokens):
    batches = make(features, tokens, batch_size=4)
    seen = Counter()
    for step in range(2 * batches.per_epoch):
        batch = batches.batch(step)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            seen[tuple(ids[: int(mask.sum())].tolist())] += 1
    texts = [tuple(i) for row in features.rows("train") for i in tokens.ids(features.captions[row], 16)]
    assert seen == Counter(texts)


def test_features_captions_and_images_belong_together(features, tokens):
    batches = make(features, tokens, captions_per_image=0)
    batch = batches.batch(3)
    assert batch.image_rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    by_tokens = {features.read(np.array([row]))["tokens"].numpy().tobytes(): row for row in features.rows("train")}
    for row, embeds in enumerate(batch.encoded["tokens"]):
        captions = features.captions[by_tokens[embeds.numpy()[None].tobytes()]]
        mine = [tokens.tokenizer.decode(batch.input_ids[m].tolist()) for m in range(10) if batch.image_rows[m] == row]
        assert sorted(mine) == sorted(captions)


def test_all_captions_are_matched_over_the_epochs(features, tokens):
    batches = make(features, tokens, batch_size=4, captions_per_image=0, matched_captions=1)
    seen = Counter()
    for step in range(2 * batches.per_epoch):
        batch = batches.batch(step)
        assert batch.image_rows[batch.matched].tolist() == [0, 1, 2, 3]
        seen.update(tuple(batch.input_ids[m][batch.attention_mask[m].bool()].tolist()) for m in batch.matched)
    assert seen == Counter(tuple(i) for row in features.rows("train") for i in tokens.ids(features.captions[row], 16))


def test_a_batch_is_a_function_of_the_step(features, tokens):
    first, second = make(features, tokens), make(features, tokens)
    ahead = list(first.between(2, 7))
    for step, batch in enumerate(ahead, start=2):
        assert torch.equal(batch.encoded["tokens"], second.batch(step).encoded["tokens"])
        assert torch.equal(batch.input_ids, second.batch(step).input_ids)
    other = make(features, tokens, seed=1)
    assert any(not torch.equal(other.batch(s).encoded["tokens"], first.batch(s).encoded["tokens"]) for s in range(3))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_made_ahead_are_the_same_on_every_device(features, tokens, device):
    batches, plain = make(features, tokens, device=torch.device(device)), make(features, tokens)
    for step, batch in enumerate(batches.between(0, 12)):
        expected = plain.batch(step)
        assert decode(batch.encoded).device.type == device
        for ours, theirs in zip(batch.tensors(), expected.tensors(), strict=True):
            assert ours.device.type == device
            assert torch.equal(ours.cpu(), theirs)


def captions_of(batch):
    """(image of the batch, its token ids) of each text, and which of them are matched."""
    rows = zip(batch.image_rows, batch.input_ids, batch.attention_mask, strict=True)
    texts = [(int(image), ids[mask.bool()].tolist()) for image, ids, mask in rows]
    return texts, [texts[m] for m in batch.matched]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_the_batch_of_one(features, tokens, world_size):
    options = {"batch_size": 6, "captions_per_image": 0, "matched_captions": 1, "shuffle_window": 7}
    one = make(features, tokens, **options)
    ranks = [make(features, tokens, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step in range(5):
        whole, shares = one.batch(step), [batches.batch(step) for batches in ranks]
        assert torch.equal(torch.cat([share.encoded["tokens"] for share in shares]), whole.encoded["tokens"])
        for share in shares:  # every process holds all captions, and knows its own
            assert captions_of(share) == captions_of(whole)
            assert sum(share.texts_of) == len(whole.input_ids)
        images, texts, matched = (
            [list(range(*getattr(share.micro_batches[0], name).indices(99))) for share in shares]
            for name in ("images", "texts", "matched")
        )
        assert list(chain(*images)) == list(range(6))
        assert list(chain(*texts)) == list(range(len(whole.input_ids)))
        assert list(chain(*matched)) == list(range(len(whole.matched)))
        for mine, captions in zip(images, texts, strict=True):
            assert set(whole.image_rows[captions].tolist()) == set(mine)


def test_a_batch_that_processes_cannot_share_is_refused(features, tokens):
    with pytest.raises(TrainingError, match=r"2 processes cannot share a batch of 5 images evenly; use a --batch-size"):
        make(features, tokens, world_size=2)


def test_too_few_images_are_refused(features, tokens):
    with pytest.raises(TrainingError, match="has too few training images"):
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
    """Over three epochs each image comes once plain and once in each of its two views."""
    features = run_extract(pictures, clip_folder, tmp_path / "features", views=2, seed=1)  # no two crops alike
    rows = features.rows("train")
    owners = {}
    for view in range(3):
        for row, embeds in zip(rows, features.read(rows, np.full(len(rows), view))["tokens"], strict=True):
            owners[embeds.numpy().tobytes()] = (int(row), view)
    assert len(owners) == 3 * len(rows)
    batches = make(features, tokens, batch_size=4)
    seen = Counter(
        owners[embeds.numpy().tobytes()]
        for step in range(3 * batches.per_epoch)
        for embeds in batches.batch(step).encoded["tokens"]
    )
    assert seen == Counter(owners.values())
