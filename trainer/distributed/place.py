"""Which of the processes that train together this one is, as torchrun and `qf train --nproc` tell it. It does not import torch."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from ...pipeline.errors import TrainingError

LAUNCHER = "QF_LAUNCHER"  # the process id of `qf train --nproc`, in the environment of its children
LOST = 75  # exit code of a child that ends because another one did
POLL, GRACE = 0.5, 5.0  # seconds between looks at the parent, and until an interrupted process is ended


@dataclass(frozen=True)
class Place:
    """The rank of a process among `count` that train together, and the process that started them, if qf should watch it."""

    rank: int = 0
    count: int = 1
    launcher: int | None = None

    def end_with_launcher(self) -> None:
        """End this process when its launcher has ended, even by SIGKILL: an orphan would train on, and keep the lock."""
        if self.launcher is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """End this process, unless it is the first: its work is done, and PyTorch's threads may abort it while Python ends."""
        if self.rank:
            sys.stderr.flush()
            os._exit(0)

    def _watch(self) -> None:
        while os.getppid() == self.launcher:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(130)  # it waits for another process, in code that no signal reaches


def place() -> Place:
    """The place of this process. TrainingError if the environment tells only a part of it."""
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return Place()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise _refused(f"WORLD_SIZE is set and {name} is not")
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port, _ = int(os.environ["MASTER_PORT"]), int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise _refused("one of WORLD_SIZE, RANK, LOCAL_RANK, MASTER_PORT is no number") from error
    if not (0 <= rank < count and 0 < port < 65536):
        raise _refused(f"RANK {rank}, WORLD_SIZE {count} and MASTER_PORT {port} make no sense")
    launcher = os.environ.get(LAUNCHER) or (os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
    return Place(rank, count, None if launcher is None else int(launcher))


def _refused(problem: str) -> TrainingError:
    return TrainingError(
        f"{problem} in the environment; start several processes with `qf train --nproc N` or torchrun, or unset WORLD_SIZE"
    )
