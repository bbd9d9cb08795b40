"""Queries a second and latency of `qf serve` on loopback, for several numbers of clients. Prints JSON.

    python benchmarks/serve.py qf-out --seconds 10

Server and clients are two processes on one machine. Each client keeps its connection, and asks for the next caption of the index as
soon as it has an answer; no caption is asked for twice in a row. A search has `--k` hits. A 503 counts as refused, and its client
waits as long as it says."""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import torch
from common import machine
from qf.pipeline.workspace import Workspace
from qf.retrieval.index.store import open_index

WARM_UP = 1.0  # seconds
ASKED = 5000  # captions to ask, at most


async def client(
    port: int, addresses: Iterator[str], start: float, end: float, times: list[float], refused: list[int]
) -> None:
    """Ask until `end`; note the seconds of each answer after `start`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(f"GET {next(addresses)} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        header = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        await reader.readexactly(int(header.split("content-length:")[1].split("\r\n")[0]))
        status, now = int(header.split()[1]), time.perf_counter()
        if status == 503:
            refused[0] += now > start
            await asyncio.sleep(int(header.split("retry-after:")[1].split("\r\n")[0]))
        elif status != 200:
            raise SystemExit(f"the server answered {status}")
        elif began > start:
            times.append(now - began)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far, of all its threads. 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(pid: int, port: int, addresses: Iterator[str], clients: int, seconds: float) -> dict[str, Any]:
    """The figures of so many clients at a time."""
    times: list[float] = []
    refused = [0]
    start = time.perf_counter() + WARM_UP
    end = start + seconds
    clients_at_work = asyncio.gather(*(client(port, addresses, start, end, times, refused) for _ in range(clients)))
    await asyncio.sleep(WARM_UP)
    before = cpu_seconds(pid)
    await clients_at_work
    used = cpu_seconds(pid) - before
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return {
        "clients": clients,
        "queries_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "refused": refused[0],
        "server_cpu_ms_per_query": round(1000 * used / len(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workspace", type=Path, help="a workspace with an index")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 200])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--k", type=int, default=10, help="hits of a search")
    options = parser.parse_args()
    index = open_index(Workspace(options.workspace).index)
    addresses = itertools.cycle(
        [
            f"/api/search?{urlencode({'q': text, 'k': options.k})}"
            for text in index.rows.texts(np.arange(min(ASKED, index.rows.captions)))
        ]
    )
    command = [sys.executable, "-m", "qf.cli", "serve", "--port", "0", "--workspace", str(options.workspace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
            port = urlsplit(url).port or 0
            rows = [
                asyncio.run(measure(server.pid, port, addresses, count, options.seconds)) for count in options.clients
            ]
        finally:
            server.send_signal(signal.SIGINT)
    print(
        json.dumps(
            {"machine": machine(torch.device("cpu")), "images": len(index), "k": options.k, "rows": rows}, indent=2
        )
    )


if __name__ == "__main__":
    main()
