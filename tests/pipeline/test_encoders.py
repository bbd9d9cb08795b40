"""Token features against transformers' own hidden states, through the code path of any Hugging Face model."""

import json
import shutil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from qf.pipeline.artifacts import sha256_file
from qf.pipeline.encoders import load_encoder
from qf.pipeline.errors import EncoderError
from qf.pipeline.text_tower import TextTower

from conftest import draw  # isort: skip

CPU = torch.device("cpu")


@pytest.mark.parametrize(("layer", "chosen"), [(None, -2), (-1, -1), (1, 1)])
def test_clip_tokens_and_pooled(clip_folder, layer, chosen):
    from transformers import AutoImageProcessor, CLIPModel

    encoder = load_encoder(str(clip_folder), CPU, torch.float32, layer)
    pictures = [draw("red", "bar"), draw("blue", "pole", (90, 130))]
    tokens, pooled = encoder.encode(np.stack([encoder.preprocessing(picture) for picture in pictures]))
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), AutoImageProcessor.from_pretrained(clip_folder)
    inputs = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        hidden = model.vision_model(**inputs, output_hidden_states=True).hidden_states
        embeds = model.get_image_features(**inputs)
    embeds = getattr(embeds, "pooler_output", embeds)
    assert_allclose(tokens, hidden[chosen].numpy(), atol=1e-5)
    assert_allclose(pooled, torch.nn.functional.normalize(embeds, dim=-1).numpy(), atol=1e-5)
    identity = encoder.identity
    assert (identity["tokens"], identity["width"], identity["joint"], identity["layer"]) == (17, 32, 24, chosen)
    assert identity["sha256"] == sha256_file(clip_folder / "model.safetensors")


def test_the_text_tower_gives_the_models_own_text_embeddings(clip_folder):
    from transformers import AutoTokenizer, CLIPModel

    encoder = load_encoder(str(clip_folder), CPU, torch.float32)
    texts = ["a red bar", "the blue square is a pole", "a " * 40]
    got = TextTower(encoder.identity, CPU).encode(texts, batch_size=2)
    inputs = AutoTokenizer.from_pretrained(clip_folder)(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        out = (
            CLIPModel.from_pretrained(clip_folder)
            .eval()
            .get_text_features(inputs["input_ids"], inputs["attention_mask"])
        )
    out = getattr(out, "pooler_output", out)
    assert_allclose(got, torch.nn.functional.normalize(out, dim=-1).numpy(), atol=1e-5)


def test_bfloat16_is_close(clip_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    exact, rough = (
        load_encoder(str(clip_folder), CPU, dtype).encode(pixels) for dtype in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(exact, rough, strict=True):
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.99


def test_onnx_tokens(onnx_folder):
    encoder = load_encoder(str(onnx_folder), CPU, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    tokens, pooled = encoder.encode(pixels)
    values = (pixels / 255 - 0.5) / 0.5
    naive = values.reshape(2, 3, 4, 8, 4, 8).mean((3, 5)).reshape(2, 3, 16).transpose(0, 2, 1)
    assert_allclose(tokens, naive, atol=1e-5)
    assert pooled is None
    assert (encoder.identity["tokens"], encoder.identity["width"], encoder.identity["joint"]) == (16, 3, None)
    with pytest.raises(EncoderError, match="last layer only"):
        load_encoder(str(onnx_folder), CPU, torch.float32, -2)
    with pytest.raises(EncoderError, match="text tower"):
        TextTower(encoder.identity, CPU)


def test_what_is_no_encoder_says_so(clip_folder, tmp_path):
    with pytest.raises(EncoderError, match="no such folder"):
        load_encoder(str(tmp_path / "nothing"), CPU, torch.float32)
    with pytest.raises(EncoderError, match=r"is no encoder: config\.json cannot be read"):
        load_encoder(str(tmp_path), CPU, torch.float32)
    with pytest.raises(EncoderError, match="cannot be fetched from Hugging Face.*--encoder builtin"):
        load_encoder("nobody/nothing", CPU, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(EncoderError, match="of type 'gpt2'; qf takes ONNX exports and the transformers models clip, "):
        load_encoder(str(tmp_path), CPU, torch.float32)
    with pytest.raises(EncoderError, match="--layer 9: .* has 3 layers; use -4 to 3"):
        load_encoder(str(clip_folder), CPU, torch.float32, 9)
    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load_encoder(str(broken), CPU, torch.float32)


def test_other_weights_under_the_same_name_are_refused(clip_folder):
    identity = load_encoder(str(clip_folder), CPU, torch.float32).identity
    with pytest.raises(EncoderError, match="no longer the one that made the features"):
        TextTower(identity | {"sha256": "0"}, CPU)
