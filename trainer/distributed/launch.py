"""`qf train --nproc N`: the same command in N processes, with the environment that torchrun would give them. No torch here."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from ...pipeline.errors import TrainingError

POLL, GRACE = 0.2, 3.0  # seconds


def launched() -> bool:
    """Whether this process is already one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """The rank of this process among those that train together; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python -m qf.cli` with these arguments `count` times, and return the exit code of the first to fail, or 0.

    Only the first process speaks; of the others one hears what they said when they fail before it does. When one fails the
    rest are stopped. TrainingError if one is killed."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        said = [open(os.path.join(folder, str(rank)), "w+", encoding="utf-8") for rank in range(1, count)]  # noqa: SIM115
        children = []
        try:
            for rank in range(count):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}
                environment |= {name: str(value) for name, value in place.items()}
                command = [sys.executable, "-m", "qf.cli", *arguments]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": said[rank - 1]} if rank else {}
                children.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
            return _wait(children, said)
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
            for file in said:
                file.close()


def _wait(children: list["subprocess.Popen[bytes]"], said: Sequence[IO[str]]) -> int:
    while all(child.poll() in (None, 0) for child in children):
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(POLL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # what fails everywhere, the first tells itself
        children[0].wait(GRACE)
    codes = [child.poll() or 0 for child in children]
    failed = codes.index(min(codes)) if min(codes) < 0 else next(rank for rank, code in enumerate(codes) if code)
    code = children[failed].returncode
    if code < 0:
        raise TrainingError(f"process {failed} was killed by signal {-code}; run the same command to go on")
    if failed:
        said[failed - 1].seek(0)
        print(said[failed - 1].read(), end="", file=sys.stderr)
    return code
