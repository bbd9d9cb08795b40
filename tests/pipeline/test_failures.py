"""Failures of files, disks and memory are one line each; a defect of qf is none."""

import errno
import os

import numpy as np
import pytest
import torch
from qf.pipeline.failures import explanation


def failure(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the library raises
        call()
    return explanation(caught.value)


@pytest.mark.parametrize("call", [lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**60)])
def test_every_library_that_runs_out_of_memory_is_told_alike(call):
    assert "out of memory" in failure(call)


def test_a_recursion_that_is_too_deep_is_the_input():
    def deep():
        return deep()

    assert "nested too deeply" in failure(deep)


def test_a_file_is_named_with_its_cure(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert "no such file or directory; check the path" in failure((tmp_path / "none").read_bytes)
    assert f"{tmp_path}: is a directory; give a file" in failure(tmp_path.read_bytes)
    assert "not a directory; give a folder" in failure((tmp_path / "file" / "x").read_bytes)
    assert "circle" in failure((tmp_path / "loop").read_bytes)
    assert "circle" in failure((tmp_path / "loop").resolve)
    assert "choose a shorter name" in failure((tmp_path / ("n" * 300)).read_bytes)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_a_line(number):
    assert explanation(OSError(number, os.strerror(number), "some/path"))
    assert explanation(OSError(number, os.strerror(number)))


def test_a_defect_is_no_failure_of_the_system():
    for error in (ValueError("x"), KeyError("x"), RuntimeError("shapes differ"), OSError("no number")):
        assert explanation(error) is None
