"""Work in several processes. This module imports little: every worker process loads it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from danet_study.files import StudyError
from danet_study.processes import cores, exit_with_parent


def parallel(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int | None = None) -> Iterator[Any]:
    """Yield `function` of each job, in order, from worker processes that end with this one, also by SIGKILL.

    `workers`: one per core by default. Raises StudyError if a worker dies.
    """
    workers = min(cores() if workers is None else workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    # spawn: a forked worker would hold the locks of this process, and may hang where a library has threads
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield from pool.map(function, jobs, chunksize=max(1, min(32, len(jobs) // (8 * workers))))
    except BrokenProcessPool:
        raise StudyError("a worker process ended unexpectedly, perhaps for lack of memory; use --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent()
