"""Failures of the system as one line with a cure: files, disks, memory. Standard library only."""

import errno

CURES = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; give the file or folder itself",
    errno.EROFS: "choose another --workspace",
    errno.EIO: "the disk or the network drive failed; check it, then run the same command to go on",
    errno.EMFILE: "raise the limit with `ulimit -n`, or use fewer --workers",
    errno.ENFILE: "close other programs, or use fewer --workers",
    errno.ENOMEM: "free some memory, or use a smaller --batch-size where there is one",
}
FULL = "the disk is full; free some space or choose another --workspace, then run the same command to go on"
NO_MEMORY = "out of memory; use smaller sizes, such as a smaller --batch-size where there is one, or free some memory"
NO_DEVICE_MEMORY = "the device is out of memory; use a smaller --batch-size where there is one, or --device cpu"
NO_THREADS = (
    "the system allows no more threads; use fewer --workers where there are some, or raise the limit with `ulimit -u`"
)
LOST_PEER = "another of the processes that train together has ended; run the same command to resume"
TOO_DEEP = "the input is nested too deeply to be read; flatten it"
ALLOCATION = (
    "can't allocate memory",
    "annot allocate memory",
    "not enough memory",
    "bad_alloc",
    "nable to allocate",
    "failed to map segment",
    "Invalid buffer size",
    "Storage size calculation overflowed",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran short, as Python, NumPy, PyTorch and FAISS say it."""
    named = (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    )  # PyTorch's, not imported for it
    return named or (isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in ALLOCATION))


def lost_peer(error: BaseException) -> bool:
    """Whether an error of PyTorch means that another of the processes that train together is gone."""
    if not isinstance(error, RuntimeError):
        return False
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or any(words in str(error) for words in ("gloo", "Connection closed by peer", "NCCL"))


def explanation(error: BaseException) -> str | None:
    """A line that tells what failed and what to do. None for anything else, which is a defect of qf."""
    if type(error).__name__ == "OutOfMemoryError":
        return NO_DEVICE_MEMORY
    if out_of_memory(error):
        return NO_MEMORY
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return NO_THREADS
    if lost_peer(error):
        return LOST_PEER
    if isinstance(error, RuntimeError) and "Symlink loop from" in str(error):  # pathlib's own
        return f"{str(error).removeprefix('Symlink loop from ')}: {CURES[errno.ELOOP]}"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    what = "reading or writing" if error.filename is None else str(error.filename)
    reason = (error.strerror or errno.errorcode.get(error.errno, "")).lower()
    return f"{what}: {reason}; {CURES.get(error.errno, 'check the path and its permissions')}"
