"""How long does a text search take? Cold, as a process, beside `import torch`; warm, in one process, beside FAISS alone.

    python benchmarks/search.py qf-out/demo              # a workspace with a run and an index
    python benchmarks/search.py qf-out/demo --turns 30

Prints one JSON object. Cold figures are medians: the commands take turns, so that other work on the machine meets them alike.
`cpu_s` is user and system time of the process, `peak_MB` its largest resident memory, which counts the pages of mapped files that
it touched. Warm queries are captions of the index. `faiss` is the search for as many vectors as qf asks for, of an embedded text.
`cpu_ms` is the mean: beside other work, times of the clock count that work too."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.searcher import Searcher, open_searcher

QUERY = "two blue rings"
K = 10
SPACE = {"encoder": "clip", "itc": "itc"}  # of the scorers that have one


def process(command: list[str]) -> dict[str, float]:
    """The figures of one process."""
    began = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_MB": used.ru_maxrss * 1024 / 1e6,
    }


def cold(commands: dict[str, list[str]], turns: int) -> dict[str, dict[str, float]]:
    """The median figures of each command, after a first turn that does not count."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(turns + 1):
        for name, command in commands.items():
            figures[name].append(process(command))
    return {
        name: {figure: round(median(one[figure] for one in several[1:]), 3) for figure in several[0]}
        for name, several in figures.items()
    }


class Times:
    """The times of one piece of work that is done again and again."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.clock.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])

    def in_ms(self) -> dict[str, float]:
        """The 50th and the 99th percentile of the clock, and the mean of the processor's time."""
        p50, p99 = np.percentile(np.array(self.clock) * 1000, [50, 99]).tolist()
        return {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "cpu_ms": round(float(np.mean(self.cpu)) * 1000, 2)}


def warm(searcher: Searcher, scorer: str, queries: list[str]) -> dict[str, Any]:
    """The time of a query of that scorer, and of its search in FAISS alone."""
    space = searcher.index.spaces[SPACE[scorer]]
    whole, alone = Times(), Times()
    searcher.text(queries[0], K, scorer=scorer)
    for query in queries:
        with whole:
            searcher.text(query, K, scorer=scorer)
        vector = searcher.encoders[SPACE[scorer]].query(query)
        with alone:
            space.images.search(vector, (K + 1) * space.per_image)
    return {"vectors": space.images.ntotal, "search": whole.in_ms(), "faiss": alone.in_ms()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--turns", type=int, default=10, help="processes of each kind")
    parser.add_argument("--queries", type=int, default=300, help="warm queries of each kind")
    arguments = parser.parse_args()
    search = [sys.executable, "-m", "qf.cli", "search", QUERY, "-w", str(arguments.workspace)]
    commands = {
        "qf search": search,
        "qf search --scorer itc": [*search, "--scorer", "itc"],
        "qf --help": [sys.executable, "-m", "qf.cli", "--help"],
        'python -c "import torch"': [sys.executable, "-c", "import torch"],
    }
    result: dict[str, Any] = {"cold": cold(commands, arguments.turns)}
    searcher = open_searcher(Workspace(arguments.workspace), ComputeOptions("cpu"))
    rows = searcher.index.rows
    drawn = np.random.default_rng(0).choice(rows.captions, min(arguments.queries, rows.captions), replace=False)
    queries = rows.texts(drawn)
    result["warm"] = {
        name: warm(searcher, name, queries) for name, space in SPACE.items() if space in searcher.index.spaces
    }
    result["images"] = len(searcher.index)
    assert "torch" not in sys.modules
    from common import machine  # it imports PyTorch
    from torch import device

    print(json.dumps({**result, "machine": machine(device("cpu"))}, indent=2))


if __name__ == "__main__":
    main()
