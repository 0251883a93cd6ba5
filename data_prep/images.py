"""Decoding: any image file to RGB, 8 bits per channel, of one size. Also the worker processes that do it in parallel.

Conversion to RGB, the same as PIL's `convert("RGB")` except for 16 bits, which PIL would clip:
    RGB            as it is
    L, 1, P        grey or palette colour in all three channels
    LA, PA, RGBA   alpha dropped
    CMYK, YCbCr, LAB, HSV   converted (inverted Adobe CMYK is recognised)
    I;16, I        16-bit grey, scaled by 255 / 65535 and rounded, in all three channels
An EXIF orientation is ignored, as public Re-ID code does. Floating-point images are refused.

Resizing is PIL's `Image.resize((W, H), Image.BILINEAR)`, what torchvision's Resize does to a PIL image.

This module imports neither pandas nor torch: each worker process loads it.
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
from PIL import Image

from danet_core.files import StudyError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

INTERPOLATION = "bilinear"
_WORKERS_AT_MOST = 12  # about 60 MB each, so that packing stays below 1 GB on any machine


def load_rgb(path: Path) -> Image.Image:
    """Decode a whole image file to mode RGB.

    Raises StudyError, naming the file, when it is empty, truncated, no image, too large, or in floating point.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; restore it, or prepare the data set again") from None
    except PermissionError:
        raise StudyError(f"{path} cannot be read: no read permission; give yourself read access (chmod u+r)") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StudyError(
            f"{path} ({_size(path)} bytes) cannot be decoded ({reason.replace(str(path), 'the file')}); "
            "expected a whole image; copy it again from the archive, or prepare a rendered set again"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; see the module's docstring. Raises ValueError for floating point or over 16 bits."""
    if image.mode == "RGB":
        return image.copy() if image.readonly else image
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, expected 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def decode(path: Path, height: int, width: int) -> UInt8[np.ndarray, "3 H W"]:
    """An image file as uint8 (3, height, width), RGB, bilinear. Raises StudyError as `load_rgb`."""
    image = load_rgb(path)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
