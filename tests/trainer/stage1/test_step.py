"""A step split over parts, batches and processes has the gradients of the plain losses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from qf.trainer.config import QFormerConfig
from qf.trainer.loader.batches import Batches
from qf.trainer.objectives import LOSSES, stage1_losses
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.step import Stage1, StepPlan, backward
from qf.trainer.tokens import Tokens
from safetensors.torch import load_file
from torch.testing import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def tokens(features):
    return Tokens.train([c for captions in features.captions for c in captions] * 2, 100)


@pytest.fixture
def qformer(features, tokens):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = QFormerConfig(
        vocab_size=len(tokens),
        encoder_hidden_size=features.encoder["width"],
        num_query_tokens=3,
        bos_token_id=tokens.bos_token_id,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )
    return QFormer(config).to(DEVICE)


def batch_of(features, tokens, part_size, **more):
    options = {"batch_size": 7, "captions_per_image": 0, "matched_captions": 1, "max_text_length": 16, "seed": 0} | more
    batches = Batches(features, features.rows("train"), tokens, part_size=part_size, device=DEVICE, **options)
    return next(batches.steps(1, 2))


def gradients(qformer, batch, moment, **options):
    qformer.zero_grad()
    losses = backward(Stage1(qformer, seed=5, **options), batch, moment)
    return losses, {name: p.grad.clone() for name, p in qformer.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("part_size", [7, 4, 2])
@pytest.mark.parametrize("losses", [LOSSES, ("loss_itc",), ("loss_itm", "loss_itg")])
@pytest.mark.parametrize("matched", [0, 1])
def test_parts_have_the_gradients_of_the_whole(features, tokens, qformer, part_size, losses, matched):
    batch = batch_of(features, tokens, part_size, matched_captions=matched)
    assert len(batch.parts) == -(-7 // part_size)
    moment = StepPlan(3, losses, hardness=0.5)
    found, ours = gradients(qformer, batch, moment)

    stage = Stage1(qformer, seed=5)
    features_of = [stage.features(batch, n, moment) for n in range(len(batch.parts))]
    pairs = stage.contrast(batch, *(torch.cat(some) for some in zip(*features_of, strict=True)), moment).pairs
    negatives = None
    if pairs is not None:
        count = len(batch.matched)
        negatives = pairs[0][count : 2 * count], pairs[1][2 * count :]
    qformer.zero_grad()
    plain = stage1_losses(
        qformer, batch.encoded["tokens"].float(), batch.input_ids, batch.attention_mask, None, negatives,
        batch.image_rows, losses, batch.matched, text_id=batch.text_id,
    )  # fmt: skip
    sum(plain.values()).backward()
    assert_close(found, {name: loss.detach() for name, loss in plain.items()})
    assert_equal(ours, {name: p.grad for name, p in qformer.named_parameters() if p.grad is not None})


def test_dropout_is_the_same_when_parts_are_encoded_again(features, tokens, qformer):
    """Otherwise the cached gradients would belong to other features."""
    trained = QFormer(replace(qformer.config, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)).to(DEVICE)
    trained.load_state_dict(qformer.state_dict())
    stage, batch = Stage1(trained, token_dropout=0.5, seed=5).train(), batch_of(features, tokens, 3)
    with torch.no_grad():
        first = stage.features(batch, 1, StepPlan(3))
        stage.features(batch, 2, StepPlan(3))
    for again, before in zip(stage.features(batch, 1, StepPlan(3)), first, strict=True):
        assert torch.equal(again.detach(), before)
    assert not torch.equal(stage.features(batch, 1, StepPlan(4))[0], first[0])


def test_no_caption_is_a_negative_of_a_picture_that_it_describes_too(features, tokens, qformer):
    """Identical captions of different pictures are positives of both."""
    batch = batch_of(features, tokens, 7)
    double = replace(batch, text_id=batch.text_id.clone())
    double.text_id[-1] = double.text_id[0]
    moment = StepPlan(0, ("loss_itc", "loss_itm"), hardness=0.0)
    first, last = batch.image_rows[0].item(), batch.image_rows[-1].item()
    assert first != last
    for number in range(40):
        images, texts = Stage1(qformer, seed=number).features(batch, 0, moment)
        pair_images, pair_texts, matches = Stage1(qformer, seed=number).contrast(double, images, texts, moment).pairs
        wrong = set(zip(pair_images[~matches].tolist(), pair_texts[~matches].tolist(), strict=True))
        assert not wrong & {(first, len(texts) - 1), (last, 0)}


def run_train(workspace, *arguments, torchrun=()):
    command = [
        sys.executable, "-m", *torchrun, "qf.cli", "train", "-w", str(workspace), "--epochs", "2", "--batch-size", "4", "--dropout", "0",
        "--preset", "tiny", "--num-query-tokens", "2", "--precision", "float32", "--device", "cpu",
        "--log-every", "1", "--no-index", "--json", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert b"find_unused_parameters" not in err
    return json.loads(out)


def test_two_processes_equal_one(features, tmp_path):
    """Real processes over gloo: contrast and hard negatives across both; and a contrastive batch in parts, accumulated."""
    (tmp_path / "features").symlink_to(features.folder)
    more = ["--contrastive-batch", "8", "--accumulate", "1", "--contrast-first", "0.3"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    runs = {
        "one": run_train(tmp_path, "--name", "one", *more),
        "two": run_train(tmp_path, "--name", "two", *more, "--nproc", "2"),
        "torchrun": run_train(tmp_path, "--name", "torchrun", *more, torchrun=torchrun),
    }
    for process in runs.values():
        assert finished(process)["steps"] == 2 * (len(features.rows("train")) // 8)
    one, *others = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in runs)
    for name, weight in one.items():
        assert (weight - others[0][name]).norm() <= 1e-3 * weight.norm() + 1e-4, name
        assert torch.equal(others[0][name], others[1][name])
    lines = [
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for first, second in zip(*lines, strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], abs=1e-3)
            assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(features, tmp_path):
    (tmp_path / "features").symlink_to(features.folder)
    process = run_train(tmp_path, "--nproc", "2", "--epochs", "40")
    metrics = tmp_path / "runs" / "stage1" / "metrics.jsonl"
    while not metrics.is_file() or not metrics.stat().st_size:
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode()
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by signal 9; run the same command to go on" in err.decode()
    assert np.isfinite(finished(run_train(tmp_path, "--nproc", "2", "--epochs", "40"))["loss"])
