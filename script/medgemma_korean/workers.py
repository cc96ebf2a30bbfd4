"""Worker processes for independent tasks: any number of them gives the same results, in whatever order they come.

    with Workers(2, prepare, (settings,)) as workers:
        for position, result in workers.map(function, items):
            ...

`prepare` runs once in every worker, `function` once per item. With one worker all runs in this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medgemma_korean.cli import PipelineError

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
POLL = 0.5  # seconds between looks at whether the parent still wants the worker


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_each() -> None:
    """Have libraries start no threads in the processes to come: nested ones only fight for the processors."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_NUM_THREADS"):
        os.environ.setdefault(name, "1")


class Workers:
    """A pool of spawned processes that end with their parent, however that ends."""

    def __init__(self, number: int, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.number, self._pool = number, None
        if number == 1:
            prepare(*arguments)
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import resource_tracker

        one_thread_each()
        # Python's own helper process outlives the other two signals to a group, but not the end of a terminal.
        with _held_back():
            resource_tracker.ensure_running()
        context = multiprocessing.get_context("spawn")  # fork after threads have started may hang
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(number, context, _begin, (self._stop, os.getpid(), prepare, arguments))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool:
            if kind:
                self._stop.set()  # what they are at would be thrown away or done again
            # Also of those that have just been started: they need what this process has given them.
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(position, result) of every item, as they come. Raises what the function raises.

        Raises PipelineError when a worker was killed, most likely for lack of memory, or found none left.
        """
        from concurrent.futures.process import BrokenProcessPool

        try:
            yield from self._results(function, items)
        except (BrokenProcessPool, MemoryError) as error:
            full = isinstance(error, MemoryError)
            what = "out of memory" if full else "a worker process was killed, perhaps for lack of memory"
            raise PipelineError(f"{what}: run again with fewer --workers; what was finished is kept") from None

    def _results(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            yield from ((i, function(item)) for i, item in enumerate(items))
            return
        from concurrent.futures import as_completed

        with _held_back():  # submitting starts the processes
            futures = {self._pool.submit(function, item): i for i, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until the end of the block; processes started in it let them wait until they say otherwise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(stop: Any, parent: int, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C, the end of a terminal, and a stop reach every process of the group; the parent alone answers them.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    threading.Thread(target=_end_with_parent, args=(stop, parent), daemon=True).start()
    prepare(*arguments)


def _end_with_parent(stop: Any, parent: int) -> None:
    while os.getppid() == parent and not stop.is_set():
        time.sleep(POLL)
    os._exit(1)
