"""Decoding in parallel: the worker processes that turn image files into blocks of a store.

How one file is decoded is in danet_core.images, so that a trained model sees any other picture in the same way. This
module imports neither pandas nor torch: each worker process loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from jaxtyping import UInt8

from danet_core.files import StudyError
from danet_core.images import INTERPOLATION as INTERPOLATION
from danet_core.images import decode, load_rgb

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_WORKERS_AT_MOST = 12  # about 60 MB each, so that packing stays below 1 GB on any machine


class Job(NamedTuple):
    """One chunk for a worker: decode `paths`, and write them at `offset` of `target` where there is a target."""

    number: int
    paths: list[Path]
    size: tuple[int, int] | None
    target: Path | None
    offset: int


class Outcome(NamedTuple):
    """What became of a job: the sha256 of the written bytes, or the sentences of the files that failed."""

    number: int
    sha256: str
    failures: list[str]


def run_job(job: Job) -> Outcome:
    """Do one job in this process. With a target the first failure ends it, without one all failures are collected."""
    failures: list[str] = []
    digest = ""
    if job.size is not None and job.target is not None:
        height, width = job.size
        block = np.empty((len(job.paths), 3, height, width), dtype=np.uint8)
        for i, path in enumerate(job.paths):
            try:
                block[i] = decode(path, height, width)
            except StudyError as error:
                return Outcome(job.number, "", [str(error)])
        try:
            digest = write_block(job.target, job.offset, block)
        except OSError as error:
            return Outcome(
                job.number,
                "",
                [f"{job.target} cannot be written ({error.strerror}); make room on the disk and start again"],
            )
    else:
        for path in job.paths:
            try:
                load_rgb(path)
            except StudyError as error:
                failures.append(str(error))
    return Outcome(job.number, digest, failures)


def run_jobs(jobs: Iterable[Job], workers: int) -> Generator[Outcome, None, None]:
    """Do all jobs on `workers` processes and yield their outcomes as they finish, in any order.

    Processes are spawned, not forked, and each has its own pipe: when this process is killed, the workers read an end
    of file and end too. With one worker everything runs in this process.

    Raises StudyError when a worker dies.
    """
    if workers <= 1:
        yield from map(run_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    remaining = iter(jobs)
    processes: dict[Connection[Any, Any], SpawnProcess] = {}
    try:
        for job in remaining:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            with contextlib.suppress(ConnectionError):  # it died: recv will say so
                ours.send(job)
            if len(processes) == workers:
                break
        busy = set(processes)
        while busy:
            for connection in cast("list[Connection[Any, Any]]", wait(list(busy))):
                try:
                    outcome: Outcome = connection.recv()
                except (EOFError, ConnectionError):
                    processes[connection].join()
                    raise StudyError(
                        f"a decoding process ended unexpectedly (exit code {processes[connection].exitcode}), perhaps "
                        "for want of memory; start again with fewer, --workers 1"
                    ) from None
                following = next(remaining, None)
                if following is None:
                    busy.discard(connection)
                else:
                    with contextlib.suppress(ConnectionError):
                        connection.send(following)
                yield outcome
    finally:
        for connection in processes:
            connection.close()
        for process in processes.values():
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def default_workers() -> int:
    """The cores this process may use, at most 12."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _WORKERS_AT_MOST)


def write_block(path: Path, offset: int, block: UInt8[np.ndarray, "B 3 H W"]) -> str:
    """Write `block` at byte `offset` of an existing file; returns the sha256 of its bytes.

    Ordinary writes, not a memory map: a full disk is then an OSError and not a killed process.
    """
    data = memoryview(np.ascontiguousarray(block).reshape(-1).data)
    with path.open("rb+", buffering=0) as file:
        file.seek(offset)
        written = 0
        while written < len(data):
            written += file.write(data[written:])
    return hashlib.sha256(data).hexdigest()


def _serve(connection: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the pipe
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(run_job(connection.recv()))
