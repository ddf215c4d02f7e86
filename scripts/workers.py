"""Stages side by side, each in a process of its own.

Small matrices keep one core busy and two cores waiting for each other, so on a CPU several processes with one thread
each do more than one process with several (docs/performance.md). A GPU is one worker.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, TypeVar

from scripts.processes import end_with
from scripts.stages import Bars, Callback, Stage

Result = TypeVar("Result")

EVERY = 0.5  # seconds between two reports of progress

_reports: Any = None  # in a worker: the queue to the main process


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    stages: Sequence[Stage], jobs: int, make: Callable[[Stage], None], stop: Callable[[], None] | None = None
) -> None:
    """make(stage) for every stage once those that it needs are made, at most `jobs` at a time, in the given order.

    But a stage that another one waits for comes first, so that no long chain is left for the end.

    The first error calls `stop`, which ends what is under way, and is raised.
    """
    waiting = list(stages)
    unmade = {stage.name for stage in stages}
    running: dict[Future[None], Stage] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                needed = {name for stage in waiting for name in stage.needs}
                ready = [stage for stage in waiting if unmade.isdisjoint(stage.needs)]
                for stage in sorted(ready, key=lambda stage: stage.name not in needed)[: jobs - len(running)]:
                    waiting.remove(stage)
                    running[pool.submit(make, stage)] = stage
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    future.result()
                    unmade.remove(stage.name)
        except BaseException:
            if stop is not None:
                stop()
            raise


class Workers:
    """Processes that work for this one; call(key, function, *args, bars) runs function(*args, bars) in one of them."""

    def __init__(self, jobs: int, threads: int) -> None:
        context = get_context("spawn")
        self._queue: Any = context.Queue()
        self._bars: dict[str, Bars] = {}
        self._cpu_seconds: dict[str, float] = {}
        self._pool = ProcessPoolExecutor(jobs, context, _begin, (self._queue, threads, os.getpid()))
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def call(self, key: str, bars: Bars, function: Callable[..., Result], *args: Any) -> Result:
        """The result of function(*args, bars) in a worker; its errors are raised here, its progress reaches `bars`."""
        self._bars[key] = bars
        result, cpu_seconds = self._pool.submit(_work, key, function, args).result()
        self._cpu_seconds[key] = cpu_seconds
        return result

    def cpu_seconds(self, key: str) -> float:
        """CPU seconds of the call of that key; 0 before it has ended."""
        return self._cpu_seconds.get(key, 0.0)

    def kill(self) -> None:
        """Stop the workers at once; what they were doing raises BrokenProcessPool where it was called.

        The listener is left waiting: a worker may have died with the queue in its hands.
        """
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Let the workers end."""
        self._pool.shutdown()
        self._queue.put(None)
        self._listener.join()

    def _listen(self) -> None:
        """Pass the workers' reports on to their bars."""
        shown: dict[str, tuple[str, Callback]] = {}
        while (report := self._queue.get()) is not None:
            key, label, done, total = report
            if key not in shown or shown[key][0] != label:
                shown[key] = (label, self._bars[key](label))
            shown[key][1](done, total)


def _begin(queue: Any, threads: int, parent: int) -> None:
    """First act of a worker. It ends with its parent, even one that was killed and could not say so."""
    global _reports
    _reports = queue
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops its workers
    end_with(parent)


def _work(key: str, function: Callable[..., Result], args: tuple[Any, ...]) -> tuple[Result, float]:
    begun = time.process_time()
    return function(*args, lambda label: _reporter(key, label)), time.process_time() - begun


def _reporter(key: str, label: str) -> Callback:
    told = 0.0

    def report(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > EVERY or done == total:
            told = time.monotonic()
            _reports.put((key, label, done, total))

    return report
