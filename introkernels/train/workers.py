"""Independent runs in several processes, with progress, none of which outlives this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job, Callable[[int], None]], Result]

_progress: Any = None


class WorkerLostError(RuntimeError):
    """A worker process ended without a result."""


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    work: Work[Job, Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    on_progress: Callable[[int], None],
) -> Iterator[Result]:
    """Yield `work(job, report)` for every job, as they finish.

    `work` may call `report(n)` for n units of progress; `on_progress` is called with the same n in
    this process. One worker means: here, without another process.

    Raises:
        WorkerLostError: a worker was killed from outside.
    """
    if workers == 1:
        for job in jobs:
            yield work(job, on_progress)
        return

    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    # Only this process holds the writing end: however it ends, workers read the end of the pipe.
    alive, lifeline = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, _start_worker, (queue, alive))
    others = multiprocessing.active_children()
    started: list[BaseProcess] = []
    try:
        with _interrupts_are_blocked():
            pending = {executor.submit(_call, work, job) for job in jobs}
            started += [child for child in multiprocessing.active_children() if child not in others]
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                on_progress(queue.get())
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process was killed from outside (out of memory?); "
            "resume to continue, with fewer workers if memory is short"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        # One that has not come as far as to watch the pipe would be waited for at the end.
        for worker in started:
            worker.kill()
        with closing(alive), closing(lifeline):
            pass


@contextmanager
def _interrupts_are_blocked() -> Iterator[None]:
    """Put off Ctrl-C in this process; those started meanwhile never see it, not even at first."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(queue: Any, alive: Connection) -> None:
    global _progress
    _progress = queue
    # Ctrl-C reaches every process of the terminal; the parent decides what it means. Where signals
    # can be blocked, it has started this process with this one blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)


def _call(work: Work[Job, Result], job: Job) -> Result:
    return work(job, _progress.put)
