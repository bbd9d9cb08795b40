"""Git LFS pointers are told from everything else that can stand at a path."""

import os

from qf.pipeline.lfs import is_lfs_pointer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 300\n"


def test_a_pointer_is_one_whatever_its_name(tmp_path):
    for name in ("a.parquet", "weights", "b.jpg"):
        (tmp_path / name).write_text(POINTER)
        assert is_lfs_pointer(tmp_path / name)


def test_other_files_folders_pipes_and_missing_files_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n")
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "a.csv", tmp_path / "empty", tmp_path / "pipe", tmp_path, tmp_path / "none", "a\0b"):
        assert not is_lfs_pointer(path)
