"""Tensors on disk: read back as they were, and any change is found."""

import os

import pytest
import torch
from qf.pipeline.errors import ArtifactError
from qf.pipeline.tensor_files import ZEROS, check_tensors, open_tensors, read_info, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "sha256": torch.ones(1)}


def test_tensors_and_information_are_read_back(tmp_path):
    path = tmp_path / os.fsdecode(b"not \xff UTF-8")
    info = {"step": 3, "text": f'"sha256":"{ZEROS}"'}
    save_tensors(path, TENSORS, info)
    check_tensors(path)
    assert read_info(path) == info
    with open_tensors(path) as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: value.tolist() for name, value in TENSORS.items()
        }


def test_every_change_of_one_byte_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, {"step": 3})
    whole = path.read_bytes()
    for at in range(len(whole)):
        for changed in (whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :], whole[:at] + whole[at + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match="is damaged: it is not what its checksum says"):
                check_tensors(path)


@pytest.mark.parametrize("data", [b"", b"x", bytes(8), b"\xff" * 8, (2).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        check_tensors(path)
    with pytest.raises(ArtifactError):
        read_info(path)
