"""A batch in micro-batches has the gradients of the plain losses."""

from dataclasses import replace

import pytest
import torch
from qf.trainer.attention import drop_tokens
from qf.trainer.config import QFormerConfig
from qf.trainer.loader.batches import Batches
from qf.trainer.objectives import LOSSES, Lesson, itc_loss, positives, similarities, stage1_losses, teach_loss
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.plan import StepPlan
from qf.trainer.stage1.step import Stage1Step, backward
from qf.trainer.tokens import Tokens
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


def batch_of(features, tokens, micro_batch_size, **more):
    options = {"batch_size": 7, "captions_per_image": 0, "matched_captions": 1, "max_text_length": 16, "seed": 0} | more
    batches = Batches(
        features, features.rows("train"), tokens, micro_batch_size=micro_batch_size, device=DEVICE, **options
    )
    return next(batches.between(1, 2))


def gradients(qformer, batch, plan, **options):
    qformer.zero_grad()
    losses = backward(Stage1Step(qformer, seed=5, **options), batch, plan)
    return losses, {name: p.grad.clone() for name, p in qformer.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("micro_batch_size", [7, 4, 2])
@pytest.mark.parametrize("losses", [LOSSES, ("loss_itc",), ("loss_itm", "loss_itg")])
@pytest.mark.parametrize("matched", [0, 1])
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    features, tokens, qformer, micro_batch_size, losses, matched
):
    batch = batch_of(features, tokens, micro_batch_size, matched_captions=matched)
    assert len(batch.micro_batches) == -(-7 // micro_batch_size)
    plan = StepPlan(3, losses, hardness=0.5)
    found, ours = gradients(qformer, batch, plan)

    stage = Stage1Step(qformer, seed=5)
    features_of = [stage.features(batch, n, plan) for n in range(len(batch.micro_batches))]
    pairs = stage.batch_gradients(batch, *(torch.cat(some) for some in zip(*features_of, strict=True)), plan).pairs
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


@pytest.mark.parametrize("micro_batch_size", [7, 3])
def test_the_lessons_of_a_teacher_reach_every_micro_batch(features, tokens, qformer, micro_batch_size):
    batch = batch_of(features, tokens, micro_batch_size)
    torch.manual_seed(1)
    width, (count, texts) = qformer.config.embed_dim, (7, len(batch.input_ids))
    embeds = [torch.nn.functional.normalize(torch.randn(n, width, device=DEVICE), dim=-1) for n in (count, texts)]
    batch = replace(batch, lesson=Lesson(*embeds))
    found, ours = gradients(qformer, batch, StepPlan(3, ("loss_itc",), teach=2.0, soft_targets=0.5))

    qformer.zero_grad()
    images = qformer.encode_image(batch.encoded["tokens"].float()).features
    text = qformer.encode_text(batch.input_ids, batch.attention_mask, first_only=True).features
    positive = positives(torch.arange(count, device=DEVICE), batch.image_rows, batch.text_id)
    itc = itc_loss(similarities(images, text) / qformer.temp, positive, batch.lesson, 0.5)
    distance = teach_loss(images, text, batch.lesson)
    (itc + 2.0 * distance).backward()
    assert_close(found, {"loss_itc": itc.detach(), "loss_teach": distance.detach()})
    assert_equal(ours, {name: p.grad for name, p in qformer.named_parameters() if p.grad is not None})


def test_dropout_is_the_same_when_a_micro_batch_is_encoded_again(features, tokens, qformer):
    """If it were not, the cached gradients would belong to other features."""
    trained = QFormer(replace(qformer.config, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)).to(DEVICE)
    trained.load_state_dict(qformer.state_dict())
    stage, batch = Stage1Step(trained, token_dropout=0.5, seed=5).train(), batch_of(features, tokens, 3)
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
    plan = StepPlan(0, ("loss_itc", "loss_itm"), hardness=0.0)
    first, last = batch.image_rows[0].item(), batch.image_rows[-1].item()
    assert first != last
    for number in range(40):
        images, texts = Stage1Step(qformer, seed=number).features(batch, 0, plan)
        pair_images, pair_texts, matches = (
            Stage1Step(qformer, seed=number).batch_gradients(double, images, texts, plan).pairs
        )
        wrong = set(zip(pair_images[~matches].tolist(), pair_texts[~matches].tolist(), strict=True))
        assert not wrong & {(first, len(texts) - 1), (last, 0)}


def test_token_dropout_leaves_out_a_random_share_of_the_tokens():
    embeds = torch.arange(24.0).reshape(2, 6, 2)
    assert drop_tokens(embeds, 0.0) is embeds
    some = drop_tokens(embeds, 0.5)
    assert some.shape == (2, 3, 2)
    whole = {tuple(token.tolist()) for token in embeds[1]}
    assert len({tuple(token.tolist()) for token in some[1]} & whole) == 3
    assert len({drop_tokens(embeds, 0.5)[0, :, 0].sum().item() for _ in range(30)}) > 3
