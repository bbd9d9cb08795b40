"""The model and the losses against values that the original BLIP-2 code computed (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from qf.trainer.loader.batches import Batch, MicroBatch
from qf.trainer.objectives import LOSSES, itc_loss, similarities, stage1_losses
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.plan import StepPlan
from qf.trainer.stage1.step import Stage1Step, backward
from qf.trainer.weights.names import LAVIS
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "stage1-golden.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        names = list(file.keys())
        return {key: file.get_tensor(key) for key in names}, json.loads(file.metadata()["config"])


@pytest.fixture
def model(golden, tmp_path):
    tensors, config = golden
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    save_file(weights, tmp_path / "lavis.safetensors")
    return QFormer.from_pretrained(tmp_path / "lavis.safetensors", num_attention_heads=config["num_attention_heads"])


@pytest.fixture
def inputs(golden):
    return {key.removeprefix("inputs/"): value for key, value in golden[0].items() if key.startswith("inputs/")}


@pytest.fixture
def outputs(golden):
    return {key.removeprefix("outputs/"): value for key, value in golden[0].items() if key.startswith("outputs/")}


def losses_of(model, inputs, **more):
    negatives = (inputs["negative_image"], inputs["negative_text"])
    return stage1_losses(
        model, inputs["image_embeds"], inputs["input_ids"], inputs["attention_mask"], negatives=negatives, **more
    )


def test_sizes_are_read_from_the_weights(model, golden):
    for name, value in golden[1].items():
        if name == "cls_token_id":  # belongs to the tokenizer
            continue
        assert getattr(model.config, name) == value, name


def test_encodings_and_similarities(model, inputs, outputs):
    image = model.encode_image(inputs["image_embeds"])
    text = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    assert_close(image.output, outputs["query_output"], atol=2e-5, rtol=0)
    assert_close(image.features, outputs["image_features"], atol=2e-5, rtol=0)
    assert_close(text.features, outputs["text_features"], atol=2e-5, rtol=0)
    assert_close(text.output, outputs["text_output"], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="texts of 600 tokens; the model has positions for"):
        model.encode_text(torch.ones(2, 600, dtype=torch.long), torch.ones(2, 600))
    half = model.encode_image(inputs["image_embeds"].half())  # as cached
    assert_close(half.features, image.features, atol=5e-3, rtol=0)
    similarity = similarities(image.features, text.features) / model.temp
    assert_close(similarity, outputs["similarity_i2t"], atol=1e-4, rtol=0)
    assert_close(similarity.T, outputs["similarity_t2i"], atol=1e-4, rtol=0)


def test_matching_logits(model, inputs, outputs):
    rows = torch.arange(6)
    image_rows = torch.cat([rows, inputs["negative_image"], rows])
    text_rows = torch.cat([rows, rows, inputs["negative_text"]])
    logits = model.match(
        model.encode_image(inputs["image_embeds"]),
        image_rows,
        inputs["input_ids"][text_rows],
        inputs["attention_mask"][text_rows],
    )
    assert_close(logits, outputs["itm_logits"], atol=2e-5, rtol=0)


def test_caption_logits(model, inputs, outputs):
    ids = inputs["input_ids"].clone()
    ids[:, 0] = model.config.bos_token_id
    image = model.encode_image(inputs["image_embeds"])
    logits = model.caption_logits(image, torch.arange(6), ids, inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    assert_close(logits[real], outputs["itg_logits"][real], atol=1e-4, rtol=0)


def test_losses(model, inputs, outputs):
    losses = losses_of(model, inputs)
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert_close(losses[name], outputs[name], atol=2e-5, rtol=0)
    multi = losses_of(model, inputs, image_id=inputs["image_id"])
    assert_close(multi["loss_itc"], outputs["loss_itc_multi_positive"], atol=2e-5, rtol=0)
    assert_close(multi["loss_itm"], outputs["loss_itm"], atol=2e-5, rtol=0)  # given negatives stay negatives


def test_gradients(model, inputs, golden):
    sum(losses_of(model, inputs).values()).backward()
    check_gradients(model, golden)


@pytest.mark.parametrize("micro_batch_size", [6, 4, 1])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_and_gradients_of_a_step_in_micro_batches(
    model, inputs, outputs, golden, monkeypatch, micro_batch_size, gradient_checkpointing
):
    model.gradient_checkpointing = gradient_checkpointing
    monkeypatch.setattr(
        "qf.trainer.stage1.step.hard_negatives", lambda *_: (inputs["negative_image"], inputs["negative_text"])
    )
    rows = torch.arange(6)
    texts = inputs["input_ids"], inputs["attention_mask"], rows, rows, rows
    cuts = [slice(start, min(6, start + micro_batch_size)) for start in range(0, 6, micro_batch_size)]
    batch = Batch({"tokens": inputs["image_embeds"]}, *texts, [6], [MicroBatch(cut, cut, cut, cut) for cut in cuts])
    losses = backward(Stage1Step(model), batch, StepPlan(0))
    for name in LOSSES:
        assert_close(losses[name], outputs[name], atol=2e-5, rtol=0)
    check_gradients(model, golden)


def check_gradients(model, golden):
    expected = {key.removeprefix("grads/"): value for key, value in golden[0].items() if key.startswith("grads/")}
    ours = {to_lavis(name): parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # the gradient of a key's bias is zero up to rounding, because softmax ignores it
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5, name


def to_lavis(name: str) -> str:
    """LAVIS's name for our parameter, written independently of the code."""
    for lavis, ours in LAVIS:
        if name.startswith(ours):
            name = lavis + name.removeprefix(ours)
            break
    name = name.replace(".attention.attention.", ".attention.self.")
    return name.replace(".crossattention.attention.", ".crossattention.self.")


def test_an_image_encoded_once_serves_several_captions(model, inputs):
    """An image repeated for each caption has the same matching and generation losses as one image with several captions."""
    embeds = inputs["image_embeds"][[0, 0, 1, 1, 2, 2]]
    image_id = torch.tensor([0, 0, 1, 1, 2, 2])
    negatives = (torch.tensor([2, 3, 4, 5, 0, 1]), torch.tensor([3, 2, 5, 4, 1, 0]))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain = stage1_losses(model, embeds, ids, mask, image_id, negatives)
    shared = stage1_losses(
        model, inputs["image_embeds"][:3], ids, mask, None, (negatives[0] // 2, negatives[1]), image_id
    )
    assert_close(shared["loss_itm"], plain["loss_itm"])
    assert_close(shared["loss_itg"], plain["loss_itg"])
    similarity = similarities(
        model.encode_image(inputs["image_embeds"][:3]).features, model.encode_text(ids, mask).features
    )
    positive = torch.arange(3)[:, None] == image_id[None]
    assert_close(shared["loss_itc"], itc_loss(similarity / model.temp, positive))
