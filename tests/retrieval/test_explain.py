"""Heat maps: a planted patch lights up, gradients are the true ones, patches lie where the encoder has them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from qf.pipeline.encoders.picture import Picture, encode_picture
from qf.pipeline.errors import EncoderError, QfError
from qf.pipeline.features.reader import Features
from qf.retrieval import heatmaps
from qf.retrieval.encode.qformer import Run
from qf.retrieval.explain import Grid, cached_picture, explain, grad_cam, layers_of, patch_grid, watched
from qf.retrieval.heatmaps import draw_explanation
from qf.trainer import qformer
from qf.trainer.config import QFormerConfig
from qf.trainer.qformer import QFormer
from qf.trainer.stage1.embedder import Embedder
from qf.trainer.tokens import Tokens

from conftest import draw  # isort: skip

CPU = torch.device("cpu")
ROWS, COLUMNS, WIDTH = 3, 4, 6


def encoder(tokens, height, width=None):
    return {"id": "some", "tokens": tokens, "preprocessing": {"height": height, "width": width or height}}


@pytest.fixture(scope="module")
def run():
    """A random model of two layers, whose queries attend to tokens that begin with a large value."""
    torch.manual_seed(0)
    tokens = Tokens.train(["a red bar", "a blue pole"], 60)
    config = QFormerConfig(
        len(tokens), WIDTH, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_query_tokens=3, embed_dim=8, initializer_range=0.3, cross_attention_frequency=1,
    )  # fmt: skip
    model = QFormer(config)
    for layer in model.qformer.encoder.layers():
        attention = layer.crossattention.attention
        with torch.no_grad():
            attention.query.weight.zero_()
            attention.query.bias.fill_(1.0)
            attention.key.weight.zero_()
            attention.key.weight[:, 0] = 1.0
    identity = encoder(1 + ROWS * COLUMNS, 8 * ROWS, 8 * COLUMNS)
    return SimpleNamespace(manifest={"encoder": identity}, embedder=Embedder(model, tokens, CPU, torch.float32, 16))


def picture(planted):
    """Tokens of no interest but one."""
    tokens = torch.full((1, 1 + ROWS * COLUMNS, WIDTH), 0.0)
    tokens[..., 1] = 5.0
    tokens[0, planted] = torch.tensor([5.0, 0, 0, 0, 0, 0])
    pixels = np.full((3, 8 * ROWS, 8 * COLUMNS), 90, np.uint8)
    return Picture("planted.png", pixels, tokens, None)


@pytest.mark.parametrize("place", [0, 3, 5, 11])
def test_a_decisive_patch_lights_up(run, place):
    head = run.embedder.model.itm_head
    found = explain(run, picture(1 + place), "a red bar")
    if not found.evidence.any():  # the planted patch speaks against a match: let it speak for one
        with torch.no_grad():
            head.weight.neg_()
        found = explain(run, picture(1 + place), "a red bar")
    assert found.attention.shape == (3, ROWS, COLUMNS)
    assert (found.attention.reshape(3, -1).argmax(1) == place).all()
    assert found.attention[:, place // COLUMNS, place % COLUMNS].min() > 0.9
    assert found.evidence.argmax() == place
    assert found.evidence.max() > 10 * np.delete(found.evidence.ravel(), place).max()


def test_the_scores_equal_those_of_search(run):
    shown = picture(4)
    found = explain(run, shown, "a blue pole")
    model, tokens = run.embedder.model, run.embedder.tokens
    assert found.scores == pytest.approx(
        (run.embedder.image(shown.tokens)[0] @ run.embedder.texts(["a blue pole"])[0]).numpy(), abs=1e-6
    )
    assert found.query == found.scores.argmax()
    with torch.no_grad():
        input_ids, mask = tokens.pad(tokens.ids(["a blue pole"], 16))
        logits = model.match(model.encode_image(shown.tokens), torch.tensor([0]), input_ids, mask)[0]
    assert found.match == pytest.approx(logits[1].item(), abs=1e-5)
    assert found.probability == pytest.approx(logits.softmax(0)[1].item(), abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    summary = found.result("run", "out.png").to_json()
    assert [q["score"] for q in summary["queries"]] == sorted((q["score"] for q in summary["queries"]), reverse=True)
    assert summary["queries"][0]["query"] == summary["query"]


def test_the_gradient_of_attention_is_the_one_that_autograd_gives(run, monkeypatch):
    """Against attention written out, which keeps its probabilities in the graph."""
    torch.manual_seed(3)
    model, tokens = run.embedder.model, run.embedder.tokens
    image_embeds = torch.randn(1, 1 + ROWS * COLUMNS, WIDTH)
    input_ids, mask = tokens.pad(tokens.ids(["a red bar"], 16))
    kept = []

    def attend(query, key, value, mask, p):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        probabilities = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        kept.append(probabilities)
        return probabilities @ value

    image = model.eval().encode_image(image_embeds)
    monkeypatch.setattr(qformer, "attend", attend)
    with watched(model) as passed:
        logits = model.match(image, torch.tensor([0]), input_ids, mask)[0]
    layers = layers_of(model, image, passed)
    cross = kept[1::2]  # after each self-attention
    gradients = torch.autograd.grad(logits[1], cross, retain_graph=True)
    naive = sum((a * g.clamp(min=0)).mean((0, 1, 2)) for a, g in zip(cross, gradients, strict=True))
    torch.testing.assert_close(grad_cam(logits[1], layers), naive.detach())
    assert len(layers) == 2
    assert not any(layer.crossattention.output._forward_pre_hooks for layer in model.qformer.encoder.layers())


@pytest.mark.parametrize(
    ("identity", "grid"),
    [
        (encoder(37, 96), Grid(1, 6, 6, 16)),  # builtin: class token
        (encoder(257, 224), Grid(1, 16, 16, 14)),  # CLIP ViT-L/14, DINOv2
        (encoder(261, 224), Grid(5, 16, 16, 14)),  # DINOv2 with registers
        (encoder(201, 224), Grid(5, 14, 14, 16)),  # DINOv3
        (encoder(729, 384), Grid(0, 27, 27, 14)),  # SigLIP so400m: six pixels are left over
        (encoder(49, 224), Grid(0, 7, 7, 32)),  # a convolutional network's last feature map
        (encoder(50, 224), Grid(1, 7, 7, 32)),  # CLIP ViT-B/32
        (encoder(85, 96, 224), Grid(1, 6, 14, 16)),
    ],
)
def test_patches_lie_where_the_encoder_has_them(identity, grid):
    assert patch_grid(identity) == grid


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(EncoderError, match="the 32 tokens of encoder some are no grid"):
        patch_grid(encoder(32, 224))


def test_a_file_and_its_key_give_the_same(trained, tmp_path):
    run = Run(trained / "runs" / "stage1", CPU, "float32")
    features = Features(trained / "features")
    draw("red", "bar").save(tmp_path / "photo.png")
    fresh = explain(run, encode_picture(tmp_path / "photo.png", run.manifest["encoder"], CPU), "a red bar")
    cached = explain(run, cached_picture(features, "red-bar-0.png"), "a red bar")
    assert cached.scores == pytest.approx(fresh.scores, abs=2e-3)  # float16 on disk
    assert cached.attention == pytest.approx(fresh.attention, abs=2e-3)
    assert cached.pixels.shape == fresh.pixels.shape == (3, 32, 32)
    assert np.abs(cached.pixels.astype(int) - fresh.pixels).mean() < 10  # a thumbnail
    with pytest.raises(QfError, match="nothing is neither a file nor a key"):
        cached_picture(features, "nothing")
    with pytest.raises(QfError, match="the caption is empty"):
        explain(run, cached_picture(features, "red-bar-0.png"), " ")


def test_the_drawing_is_hot_where_the_patch_is(run, tmp_path):
    shown = explain(run, picture(1 + 6), "a caption of $5\nand " + "many " * 80 + "words 海")
    draw_explanation(shown, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        page = np.asarray(drawn.convert("RGB")).astype(float)
    inch = page.shape[1] / heatmaps.WIDTH
    panel = (heatmaps.WIDTH - 2 * heatmaps.MARGIN - 2 * heatmaps.GAP) / 3
    left = heatmaps.MARGIN + panel + heatmaps.GAP  # edge of the panel with the answering query
    # below the caption, cut to three lines
    top = heatmaps.MARGIN + 3 * heatmaps.LINE + heatmaps.SCORES + heatmaps.TITLE
    height = panel * ROWS / COLUMNS
    part = page[int(top * inch) : int((top + height) * inch), int(left * inch) : int((left + panel) * inch)]
    down, across = np.nonzero(part[..., 0] - part[..., 2] > 100)  # orange: the upper end of the scale
    assert down.mean() / (height * inch) * ROWS == pytest.approx(6 // COLUMNS + 0.5, abs=0.1)
    assert across.mean() / (panel * inch) * COLUMNS == pytest.approx(6 % COLUMNS + 0.5, abs=0.1)
