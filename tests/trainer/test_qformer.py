"""The Q-Former's short cuts against the plain computation, written out here."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from qf.trainer import packing
from qf.trainer.config import QFormerConfig
from qf.trainer.objectives import itc_loss, itm_pairs, similarities, stage1_losses
from qf.trainer.qformer import QFormer
from torch.testing import assert_close

CONFIG = QFormerConfig(
    vocab_size=50, encoder_hidden_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    num_query_tokens=3, embed_dim=8, max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
IMAGES, CAPTIONS, TOKENS = 5, 3, 7
ROWS = torch.arange(IMAGES).repeat_interleave(CAPTIONS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = QFormer(replace(CONFIG, initializer_range=0.2))
    torch.nn.init.normal_(model.post_layernorm.weight, 1.0, 0.3)
    torch.nn.init.normal_(model.post_layernorm.bias, 0.0, 0.3)
    return model


@pytest.fixture
def batch():
    """Images, and captions of 2 to 16 tokens."""
    torch.manual_seed(1)
    embeds = torch.randn(IMAGES, TOKENS, CONFIG.encoder_hidden_size)
    lengths = torch.randint(2, 17, (len(ROWS), 1))
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    ids = torch.randint(6, CONFIG.vocab_size, mask.shape) * mask
    negatives = (
        (ROWS + 1 + torch.arange(len(ROWS)) % (IMAGES - 1)) % IMAGES,
        (torch.arange(len(ROWS)) + CAPTIONS) % len(ROWS),
    )
    return embeds, ids, mask, negatives


def long_way(model, embeds, ids, mask, negatives):
    """The three losses, for one image and one unpadded text at a time, with layers as the paper draws them."""
    heads, count = CONFIG.num_attention_heads, CONFIG.num_query_tokens

    def attention(block, hidden, source, seen):
        def split(layer, x):
            return layer(x).unflatten(-1, (heads, -1)).transpose(0, 1)

        part = block.attention
        query, key, value = split(part.query, hidden), split(part.key, source), split(part.value, source)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        context = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        return block.output.LayerNorm(block.output.dense(context.transpose(0, 1).flatten(1)) + hidden)

    def feed(first, second, x):
        return second.LayerNorm(second.dense(F.gelu(first.dense(x))) + x)

    def run(hidden, queries, image, seen):
        hidden = model.qformer.layernorm(hidden)
        for layer in model.qformer.encoder.layer:
            hidden = attention(layer.attention, hidden, hidden, seen)
            queried, text = hidden[:queries], hidden[queries:]
            if queries and layer.crossattention is not None:
                everything = torch.ones(queries, len(image), dtype=torch.bool)
                queried = attention(layer.crossattention, queried, image, everything)
            queried = feed(layer.intermediate_query, layer.output_query, queried)
            hidden = torch.cat([queried, feed(layer.intermediate, layer.output, text)])
        return hidden

    def embed(text):
        return model.embeddings.word_embeddings(text) + model.embeddings.position_embeddings.weight[: len(text)]

    images = [model.post_layernorm(image) for image in embeds]
    texts = [row[: int(m.sum())] for row, m in zip(ids, mask, strict=True)]
    queries, seen = model.query_tokens[0], torch.ones(count, count, dtype=torch.bool)
    image_features = torch.stack(
        [F.normalize(model.vision_projection(run(queries, count, image, seen)), dim=-1) for image in images]
    )
    text_features = torch.stack(
        [
            F.normalize(
                model.text_projection(run(embed(text), 0, None, torch.ones(len(text), len(text)).bool())[0]), dim=-1
            )
            for text in texts
        ]
    )
    positive = torch.arange(len(images))[:, None] == ROWS[None]
    loss_itc = itc_loss(similarities(image_features, text_features) / model.temp, positive)

    pair_images, pair_texts, matches = itm_pairs(positive, ROWS, torch.arange(len(texts)), negatives)
    logits = []
    for image, text in zip(pair_images.tolist(), pair_texts.tolist(), strict=True):
        hidden = torch.cat([queries, embed(texts[text])])
        out = run(hidden, count, images[image], torch.ones(len(hidden), len(hidden)).bool())
        logits.append(model.itm_head(out[:count]).mean(0))
    loss_itm = F.cross_entropy(torch.stack(logits), matches.long())

    words, labels = [], []
    for image, text in zip(ROWS.tolist(), texts, strict=True):
        spoken = torch.cat([torch.tensor([CONFIG.bos_token_id]), text[1:]])
        hidden = torch.cat([queries, embed(spoken)])
        seen = torch.ones(len(hidden), len(hidden)).tril().bool()
        seen[:count, :count] = True
        states = run(hidden, count, images[image], seen)[count:-1]
        head = model.cls.predictions
        transformed = head.transform.LayerNorm(F.gelu(head.transform.dense(states)))
        words.append(transformed @ model.embeddings.word_embeddings.weight.T + head.bias)
        labels.append(text[1:])
    loss_itg = F.cross_entropy(torch.cat(words), torch.cat(labels), label_smoothing=0.1)
    return {"loss_itc": loss_itc, "loss_itm": loss_itm, "loss_itg": loss_itg}


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("padding", [0.0, 3.0])
def test_losses_and_gradients_equal_those_of_one_text_at_a_time(model, batch, monkeypatch, groups, padding):
    """With texts in one group, as on CUDA, or in several; and with pairs that attend to an image together, or to copies."""
    embeds, ids, mask, negatives = batch
    monkeypatch.setattr(packing, "LENGTH_GROUPS", groups)
    monkeypatch.setattr(packing, "MOST_PADDING", padding)
    ours = stage1_losses(model, embeds, ids, mask, image_rows=ROWS, negatives=negatives)
    theirs = long_way(model, embeds, ids, mask, negatives)
    for name, loss in theirs.items():
        assert_close(ours[name], loss, atol=1e-5, rtol=1e-5)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-5, name


def test_texts_keep_their_order_and_place(model, batch):
    _, ids, mask, _ = batch
    together = model.encode_text(ids, mask)
    assert together.output.shape == (*ids.shape, CONFIG.hidden_size)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        alone = model.encode_text(ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert_close(together.output[row, :length], alone.output[0])
        assert_close(together.features[row], alone.features[0])
    assert_close(model.encode_text(ids, mask, first_only=True).features, together.features)


@pytest.mark.parametrize("images", [[0], [4, 4, 4, 4], [2, 0, 2, 1, 2, 0]])
def test_matching_takes_any_number_of_pairs_of_an_image(model, batch, images):
    embeds, ids, mask, _ = batch
    rows = torch.tensor(images)
    count = len(rows)
    image = model.encode_image(embeds)
    together = model.match(image, rows, ids[:count], mask[:count])
    for n in range(count):
        one = model.encode_image(embeds[rows[n], None])
        assert_close(
            together[n], model.match(one, torch.tensor([0]), ids[n, None], mask[n, None])[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing_to_the_bit(batch, precision):
    """With dropout: the second pass draws the same random numbers."""
    torch.manual_seed(0)
    model = QFormer(replace(CONFIG, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)).train()
    found = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(2)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses = stage1_losses(model, *batch[:3], image_rows=ROWS)
        found.append((losses, gradients(model, losses), torch.rand(1)))
    (plain, before, then), (again, after, now) = found
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(then, now)
    torch.manual_seed(3)  # dropout had an effect
    assert not torch.equal(stage1_losses(model, *batch[:3], image_rows=ROWS)["loss_itg"], plain["loss_itg"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile asks for it while it traces
def test_compiled_blocks_give_the_same(batch, tmp_path, monkeypatch):
    """With dropout, which draws the same random numbers; also without gradients, on which gradient caching relies."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)  # they would leave 150 MB
    torch.manual_seed(0)
    model = QFormer(replace(CONFIG, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)).train()
    found = []
    for prepare in (lambda: None, model.compile_blocks):
        prepare()
        torch.manual_seed(2)
        losses = stage1_losses(model, *batch[:3], image_rows=ROWS)
        torch.manual_seed(3)
        with torch.no_grad():
            images = model.encode_image(batch[0]).features
        found.append((losses, gradients(model, losses), images))
    (plain, before, images), (compiled, after, again) = found
    for name, loss in plain.items():
        assert_close(compiled[name], loss, atol=1e-5, rtol=1e-5)
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name
    assert_close(again, images, atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    assert_close(model.encode_image(batch[0]).features, again, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == QFormer(CONFIG).state_dict().keys()
