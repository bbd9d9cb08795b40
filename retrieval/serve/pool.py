"""Work in a thread of its own, with a bounded queue before it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The queue is full."""


class Pool:
    """Runs functions one after another, because models and drawings are not made for several threads. One call uses all cores.

    At most `limit` calls wait or run; a further one raises Busy."""

    def __init__(self, name: str, limit: int) -> None:
        self.limit, self.waiting = limit, 0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. A caller that is cancelled leaves its place only when the work is done."""
        if self.waiting >= self.limit:
            raise Busy
        self.waiting += 1
        loop = asyncio.get_running_loop()

        def leave(done: "Future[T]") -> None:
            loop.call_soon_threadsafe(self._left)

        future = self._threads.submit(work)
        future.add_done_callback(leave)
        return await asyncio.wrap_future(future)

    def _left(self) -> None:
        self.waiting -= 1

    def close(self) -> None:
        """End the thread once it has done what it is at. What waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
