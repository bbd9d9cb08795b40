"""Git LFS pointers: the few lines of text that lie in place of a large file where a repository was cloned without Git LFS."""

import os
import stat
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1"
CURE = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is a Git LFS pointer. False for anything that cannot be read or is no regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and is_lfs_text(file.read(len(POINTER)))
    except (OSError, ValueError):
        return False


def is_lfs_text(start: bytes) -> bool:
    """Whether bytes are those that a Git LFS pointer begins with."""
    return start.startswith(POINTER)
