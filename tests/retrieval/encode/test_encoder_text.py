"""The encoder's text model in NumPy, against transformers and its tokenizer."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from qf.pipeline.encoders.identity import BUILTIN
from qf.pipeline.encoders.load import load_encoder
from qf.pipeline.encoders.text import TextModel
from qf.pipeline.errors import ArtifactError
from qf.retrieval.encode.encoder_text import DescribedText, describe

from conftest import COLOURS, SHAPES  # isort: skip

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {
    "vocab_size": 14,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
MODELS = {  # model, changes of its text model, type of its weights
    "CLIP": ("CLIP", {}, torch.float32),  # eos_token_id is 2: the end is the largest id
    "CLIP with gelu, another end": ("CLIP", {"hidden_act": "gelu", "eos_token_id": 5}, torch.float32),
    "CLIP in float16": ("CLIP", {}, torch.float16),
    "SigLIP in bfloat16": ("Siglip", {"projection_size": 32}, torch.bfloat16),
    "SigLIP": ("Siglip", {"projection_size": 32}, torch.float32),
    "builtin": None,
}
WORDS = ["a", "the", "is", *COLOURS, *SHAPES, "purple", "Ёж", "two rings", "<eos>", "<pad>", "!", "…"]


def saved(clip_folder, place, kind, changes, dtype):
    """A random model of transformers with every parameter drawn, beside the tokenizer of the small CLIP."""
    folder = shutil.copytree(clip_folder, place)
    torch.manual_seed(0)
    parts = {"text_config": TEXT | changes, "vision_config": VISION}
    more = {"projection_dim": 24} if kind == "CLIP" else {}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**parts, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def models(request, clip_folder, tmp_path_factory):
    """A text model in PyTorch, and in NumPy."""
    made = MODELS[request.param]
    folder = BUILTIN if made is None else saved(clip_folder, tmp_path_factory.mktemp("models") / "encoder", *made)
    model = TextModel(load_encoder(str(folder), CPU, torch.float32).identity, CPU)
    weights = [folder / "model.safetensors"]
    return model, DescribedText(describe(model, weights), weights)


@settings(max_examples=40)
@given(words=st.lists(st.sampled_from(WORDS), max_size=30))
def test_a_text_is_read_and_embedded_as_by_transformers(models, words):
    theirs, ours = models
    text = " ".join(words)
    assert ours.limit == theirs.limit
    assert ours.truncates(text) == theirs.truncates(text)
    assert ours.unknown(text) == theirs.unknown(text)
    assert_allclose(ours.encode([text]), theirs.encode([text]), atol=1e-6)


@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_any_text_has_the_tokens_that_transformers_gives_it(models, text):
    theirs, ours = models
    assert ours.unknown(text) == theirs.unknown(text)
    assert_allclose(ours.encode([text]), theirs.encode([text]), atol=1e-6)


def test_models_with_other_blocks_tokenizers_or_names_are_not_described(clip_folder, tmp_path):
    folder = saved(clip_folder, tmp_path / "encoder", *MODELS["CLIP"])
    model = TextModel(load_encoder(str(folder), CPU, torch.float32).identity, CPU)
    assert describe(model, [folder / "model.safetensors"]) is not None
    assert describe(model, []) is None  # no tensor has the name
    model.kind = model.kind._replace(model="MetaClip2TextModelWithProjection")
    assert describe(model, [folder / "model.safetensors"]) is None


def test_a_description_that_is_none_is_refused():
    for description in (b"", b"{}", np.random.default_rng(0).bytes(50)):
        with pytest.raises(ArtifactError, match="rebuild it with `qf index`"):
            DescribedText(description, [])
