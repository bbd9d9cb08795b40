"""Tensors of safetensors files, memory-mapped by NumPy."""

import numpy as np
import pytest
import torch
from qf.pipeline.errors import ArtifactError
from qf.pipeline.mapped_tensors import MappedTensors
from safetensors.torch import save_file


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_type_are_read_as_float32(tmp_path, dtype):
    wanted = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a": wanted, "count": torch.arange(4)}, tmp_path / "x.safetensors", {"note": "text"})
    save_file({"b": wanted[0].clone()}, tmp_path / "y.safetensors")
    tensors = MappedTensors([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    found = tensors.tensor("a", 5, None)
    assert found.dtype == np.float32
    assert (found == wanted.float().numpy()).all()
    assert (tensors.rows("a", np.array([4, 0]), 3) == wanted[[4, 0]].float().numpy()).all()
    assert (tensors.tensor("b", 3) == wanted[0].float().numpy()).all()


@pytest.mark.parametrize(("name", "shape"), [("a", (5, 4)), ("a", (5,)), ("none", (5, 3)), ("count", (4,))])
def test_a_missing_tensor_or_another_shape_is_a_key_error(tmp_path, name, shape):
    save_file({"a": torch.zeros(5, 3), "count": torch.arange(4)}, tmp_path / "x.safetensors")
    with pytest.raises(KeyError, match=name):
        MappedTensors([tmp_path / "x.safetensors"]).tensor(name, *shape)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5, 3), "b": torch.ones(2)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"x\.safetensors is no complete safetensors file"):
            MappedTensors([path])
