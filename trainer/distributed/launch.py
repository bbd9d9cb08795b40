"""`qf train --nproc N`: runs the command in N processes, with the environment that torchrun sets. It does not import torch."""

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
from .place import GRACE, LAUNCHER, LOST

POLL = 0.2  # seconds between checks of the processes
PATIENCE = 3.0  # seconds for rank 0 to fail by itself, when another rank has failed


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python -m qf.cli` with these arguments in `count` processes. Returns 0, or the exit code of the first to fail.

    Only rank 0 prints; another rank's stderr is shown if it fails first. When one process fails or this one is interrupted,
    the others are stopped. They also end when this process is killed. TrainingError if a signal kills one."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads, LAUNCHER: str(os.getpid())}
        outputs = [open(os.path.join(folder, str(rank)), "w+", encoding="utf-8") for rank in range(1, count)]  # noqa: SIM115
        children = []
        try:
            for rank in range(count):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                environment = shared | {name: str(value) for name, value in place.items()}
                command = [sys.executable, "-m", "qf.cli", *arguments]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": outputs[rank - 1]} if rank else {}
                children.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
            return _wait(children, outputs)
        finally:
            _stop(children)
            for file in outputs:
                file.close()


def _stop(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End the processes that still run: those that wait for another one, in code that no signal reaches, by SIGKILL."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        child.kill()
        child.wait()


def _wait(children: list["subprocess.Popen[bytes]"], outputs: Sequence[IO[str]]) -> int:
    """The exit code of `launch`, once all processes have ended well or one has failed. `outputs`: stderr from rank 1 on."""
    while all(child.poll() in (None, 0) for child in children):
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(POLL)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and (children[0].poll() is None or not _failed(children)):
        time.sleep(POLL)  # if all fail alike, rank 0 prints the error; a rank that lost another one is not the cause
    failed = _failed(children)
    if not failed:
        raise TrainingError("the processes lost each other; run the same command to resume")
    rank = min(failed, key=lambda rank: failed[rank] >= 0)  # signals first
    if failed[rank] < 0:
        raise TrainingError(f"process {rank} was killed by signal {-failed[rank]}; run the same command to resume")
    if rank:
        outputs[rank - 1].seek(0)
        print(outputs[rank - 1].read(), end="", file=sys.stderr)
    return failed[rank]


def _failed(children: Sequence["subprocess.Popen[bytes]"]) -> dict[int, int]:
    """The exit codes, by rank, of the processes that failed by themselves."""
    codes = {rank: child.poll() for rank, child in enumerate(children)}
    return {rank: code for rank, code in codes.items() if code is not None and code not in (0, LOST)}
