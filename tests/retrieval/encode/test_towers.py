"""Text towers in NumPy against PyTorch's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from qf.pipeline.mapped_tensors import MappedTensors
from qf.pipeline.tensor_files import save_tensors
from qf.retrieval.encode.towers import QFormerText, erf, gelu, quick_gelu, tanh_gelu
from qf.trainer.config import QFormerConfig
from qf.trainer.qformer import QFormer

SIZES = {
    "vocab_size": 50, "encoder_hidden_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 80, "num_query_tokens": 2, "embed_dim": 24, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture(scope="module", params=[None, 8], ids=["heads as wide as they are", "narrow heads"])
def towers(request, tmp_path_factory):
    """A random Q-Former with every parameter drawn, and its text side in NumPy."""
    torch.manual_seed(0)
    config = QFormerConfig(**SIZES, head_dim=request.param)
    model = QFormer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("towers") / "model.safetensors"
    save_tensors(path, model.state_dict(), {})
    sizes = {**SIZES, "head_dim": request.param, "layer_norm_eps": config.layer_norm_eps}
    return model, QFormerText(MappedTensors([path]), sizes), sizes


@settings(max_examples=40)
@given(ids=st.lists(st.integers(0, 49), min_size=1, max_size=40))
def test_the_text_side_of_a_qformer_equals_pytorch(towers, ids):
    model, tower, _ = towers
    with torch.no_grad():
        wanted = model.encode_text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)).features[0]
    assert_allclose(tower.embed(np.array(ids)), wanted.numpy(), atol=1e-6)


def test_weights_that_do_not_fit_the_sizes_are_a_key_error(towers):
    _, tower, sizes = towers
    with pytest.raises(KeyError, match="intermediate"):
        QFormerText(tower.tensors, sizes | {"intermediate_size": 81})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gelu, F.gelu),
        (tanh_gelu, lambda x: F.gelu(x, approximate="tanh")),
        (quick_gelu, lambda x: x * torch.sigmoid(1.702 * x)),
    ],
)
def test_activations_equal_pytorch(ours, theirs):
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([-1e3, 1e3, 0.0])])
    found = ours(x.numpy())
    assert found.dtype == np.float32
    assert_allclose(found, theirs(x).numpy(), atol=1e-6, rtol=1e-6)


def test_the_error_function_is_exact_to_float32():
    x = np.linspace(-6, 6, 10_001)
    assert_allclose(erf(x), [math.erf(value) for value in x.tolist()], atol=2e-8)
