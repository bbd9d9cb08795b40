"""Features cached in memory give the same batches as the disk."""

import numpy as np
import pytest
import torch
from qf.pipeline.features.codecs import CODECS
from qf.pipeline.formatting import size
from qf.trainer.loader import cache
from qf.trainer.loader.batches import Batches
from qf.trainer.loader.cache import Cache, cached
from qf.trainer.tokens import Tokens

from conftest import run_extract  # isort: skip

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("device", DEVICES)
def test_cached_batches_equal_those_from_disk(pictures, clip_folder, tmp_path, device, codec):
    """All views, from host memory and from the device's memory."""
    features = run_extract(pictures, clip_folder, tmp_path / "features", codec=codec, views=2, shard_size=7)
    rows = features.rows("train")
    tokens = Tokens.train([c for captions in features.captions for c in captions], 100)
    options = {"batch_size": 5, "captions_per_image": 1, "matched_captions": 0, "max_text_length": 16, "seed": 0}
    disk = Batches(features, rows, tokens, **options)
    for place in {device, "cpu"}:
        kept = Cache(features, rows, torch.device(place))
        assert all(column.device == torch.device(place) for column in kept.columns.values())
        batches = Batches(features, rows, tokens, **options, device=torch.device(device), source=kept)
        for step, batch in enumerate(batches.between(0, 3 * batches.per_epoch)):
            for ours, theirs in zip(batch.tensors(), disk.batch(step).tensors(), strict=True):
                assert ours.device.type == torch.device(device).type
                assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_place_of_cached_features_is_reported(features, monkeypatch, device):
    rows, messages = features.rows("train"), []
    needed = len(rows) * features.read(rows[:1])["tokens"].nbytes
    free = {device: needed * 2, "cpu": needed * 2}
    monkeypatch.setattr(cache, "free_memory", lambda place: free[str(place)])
    on = torch.device(device)
    kept = cached(features, rows, on, 1, messages.append)
    assert {column.device for column in kept.columns.values()} == {on}
    assert f"{size(needed)} of features into" in messages[-1]
    assert f"{size(2 * needed)} are free there" in messages[-1]
    if on.type == "cuda":
        free[device] = needed
        kept = cached(features, rows, on, 1, messages.append)
        assert {column.device for column in kept.columns.values()} == {CPU}
        assert "host memory" in messages[-1]
        assert f"the memory of {device} has too little" in messages[-1]
    free["cpu"] = free[device] = needed
    assert cached(features, rows, on, 1, messages.append) is None
    assert "stay on disk, " in messages[-1]
    assert "host memory has too little" in messages[-1]


def test_each_process_keeps_its_own_in_host_memory(features, monkeypatch):
    rows = features.rows("train")
    needed = len(rows) * features.read(rows[:1])["tokens"].nbytes
    monkeypatch.setattr(cache, "free_memory", lambda place: needed * 4)
    assert cached(features, rows, CPU, 2, lambda text: None)
    assert cached(features, rows, CPU, 3, lambda text: None) is None


def test_any_rows_can_be_cached_in_any_order(features):
    rows = features.rows("val")[::-1][:5].copy()
    kept = Cache(features, rows, CPU)
    chosen = np.array([4, 0, 0, 3])
    from_disk = features.read(rows[chosen])["tokens"]
    out = kept(chosen, np.zeros(4, np.int64), lambda shape, dtype: torch.empty(shape, dtype=dtype))
    assert torch.equal(out["tokens"], from_disk)
