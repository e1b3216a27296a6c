"""Run generations in worker threads, a bounded number at once; the others wait in their order. Imports no torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from traceback import clear_frames
from typing import Any

from zsl.generation.pieces import Generated, Piece
from zsl.link.cancellation import Cancellation
from zsl.serving.api_errors import ApiError

# Makes one text; is given a function for its pieces, and what says that nobody wants more.
Job = Callable[[Callable[[Piece], None], Cancellation], Generated]


class Generation:
    """One text that is being generated, or waits for its turn."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Any] = asyncio.Queue()  # at most one for each token
        self._cancellation = Cancellation()
        self.future: Future[None] | None = None

    def cancel(self) -> None:
        """End it, at the latest after what this process computes. Nobody may wait for its results any more."""
        self._cancellation.set()
        if self.future is not None:
            self.future.cancel()  # if it waits for its turn

    async def next(self) -> Piece | Generated:
        """Wait for the next piece, or the whole, which is the last result. Raises the error of the generation."""
        result: Piece | Generated | Exception = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def run(self) -> None:
        """Generate, in a worker thread."""
        try:
            self._tell(self._job(self._tell, self._cancellation))
        except Exception as error:
            clear_frames(error.__traceback__)  # whose tensors would stay until the garbage collector runs
            self._tell(error)

    def _tell(self, result: Piece | Generated | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)
        except RuntimeError:  # the loop has ended
            self._cancellation.set()


class Service:
    """Worker threads for generations: `parallel` run at once, `most_waiting` more may wait."""

    def __init__(self, parallel: int, *, most_waiting: int) -> None:
        self._most = parallel + most_waiting
        self._workers = ThreadPoolExecutor(parallel, "zsl-generation")
        self._generations: set[Generation] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def count(self) -> int:
        """Number of generations that run or wait."""
        return len(self._generations)

    def start(self, job: Job) -> Generation:
        """Queue a generation. Raises `ApiError` if too many wait. To be called on the event loop."""
        if self._closed:
            raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
        if self.count >= self._most:
            raise ApiError(429, "too many requests wait", kind="rate_limit_error", code="rate_limit_exceeded")
        generation = Generation(job)
        with self._lock:
            self._generations.add(generation)
        generation.future = self._workers.submit(generation.run)
        generation.future.add_done_callback(lambda _: self._remove(generation))
        return generation

    def close(self) -> None:
        """Cancel all generations, without waiting for them."""
        self._closed = True
        with self._lock:
            generations = list(self._generations)
        for generation in generations:
            generation.cancel()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _remove(self, generation: Generation) -> None:
        with self._lock:
            self._generations.discard(generation)
