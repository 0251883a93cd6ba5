"""Packing: data/prepared/<dataset> -> data/packed/<dataset>, every image decoded and resized once, in parallel.

The store is that of danet_core.store. A killed pack resumes where it stopped, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL

from danet_core.files import StudyError, exclusive, read_json, sha256_file, sha256_json
from danet_core.store import GALLERIES, MANIFEST, lock_path, read_galleries, read_manifest
from data_prep.images import INTERPOLATION, Job, Outcome, default_workers, run_jobs
from data_prep.prepare import FOLDERS, INVENTORY, Folders
from data_prep.reading import Reading
from data_prep.store_writer import StoreWriter

if TYPE_CHECKING:
    from danet_core.parameters import Dataset

_CHUNK_BYTES = 8 * 2**20  # of packed images: small enough for many workers, large enough that journalling costs nothing


def pack(
    dataset: Dataset, *, workers: int | None = None, folders: Folders = FOLDERS, chunk: int | None = None
) -> dict[str, Any]:
    """Decode and resize a prepared data set into data/packed/<dataset>; returns the store's meta.

    Args:
        workers: processes; the cores this process may use when None, at most 12.
        chunk: images per journalled piece; 8 MiB of pixels when None.

    A killed pack resumes: finished pieces are checked against the journal and kept. The result does not depend on that,
    nor on `workers`.

    Raises StudyError when the set is not prepared, is being packed by another process, the disk lacks room (before and
    while writing), or an image cannot be decoded; what is finished by then is kept for the next attempt.
    """

    prepared, final = folders.prepared / dataset.name, folders.packed / dataset.name
    if not (prepared / INVENTORY).is_file():
        raise StudyError(
            f"{prepared} is missing; prepare the data set first: python -m data_prep prepare {dataset.name}"
        )
    with exclusive(lock_path(final), f"the pack of {dataset.name}"):
        inventory = read_json(prepared / INVENTORY)
        manifest = read_manifest(prepared / MANIFEST)
        galleries = read_galleries(prepared / GALLERIES) if dataset.layout == "sysu" else {}
        root, height, width = dataset.raw_root(), dataset.image.height, dataset.image.width
        if chunk is None:
            chunk = max(1, _CHUNK_BYTES // (3 * height * width))
        # pillow's version: another decoder may give other pixels, so its chunks are not mixed with ours
        fingerprint = sha256_json([sha256_file(prepared / MANIFEST), INTERPOLATION, PIL.__version__])
        paths = [root / path for path in manifest["path"]]
        try:
            writer = StoreWriter(final, (len(manifest), 3, height, width), fingerprint, chunk)
            try:
                _write_chunks(writer, paths, (height, width), workers or default_workers(), dataset.name)
            finally:
                writer.close()
            meta = {key: inventory[key] for key in ("dataset", "layout", "synthetic", "partial", "counts")}
            return writer.commit(manifest, galleries, {**meta, "interpolation": INTERPOLATION})
        except OSError as error:
            raise StudyError(
                f"{final} cannot be written ({error.strerror or error}); make room on the disk and start again, "
                "finished images are kept"
            ) from None


def check_images(reading: Reading, *, workers: int | None = None) -> None:
    """Decode every image (`verify --deep`); each that fails is added to `reading.problems`."""
    paths = [reading.root / path for path in reading.files]
    size = 64
    jobs = (Job(i, paths[start : start + size], None, None, 0) for i, start in enumerate(range(0, len(paths), size)))
    count = {i: len(paths[start : start + size]) for i, start in enumerate(range(0, len(paths), size))}
    failures: dict[int, list[str]] = {}
    with contextlib.closing(run_jobs(jobs, workers or default_workers())) as outcomes:
        for outcome in _progress(outcomes, count, len(paths), 0, "decoding"):
            failures[outcome.number] = outcome.failures
    found = [sentence for i in sorted(failures) for sentence in failures[i]]
    reading.problems += found
    reading.check("images that cannot be decoded", 0, len(found), reading.root, "copy them again from the archive")


def _write_chunks(writer: StoreWriter, paths: list[Path], size: tuple[int, int], workers: int, name: str) -> None:
    sources, jobs = {}, []
    done = 0
    for chunk in range(writer.n_chunks):
        rows = writer.rows(chunk)
        piece = paths[rows.start : rows.stop]
        sources[chunk] = _source(piece)
        if writer.done(chunk, sources[chunk]):
            done += len(piece)
        else:
            jobs.append(Job(chunk, piece, size, writer.images_path, writer.offset_of(chunk)))
    if not jobs:
        return
    count = {job.number: len(job.paths) for job in jobs}
    with contextlib.closing(run_jobs(jobs, min(workers, len(jobs)))) as outcomes:
        for outcome in _progress(outcomes, count, len(paths), done, f"packing {name}"):
            if outcome.failures:
                raise StudyError(outcome.failures[0])
            writer.finish_chunk(outcome.number, sources[outcome.number], outcome.sha256)


def _source(paths: list[Path]) -> str:
    """What a chunk is made from: names, sizes and times, so that an image replaced after a kill is decoded again."""
    description = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise StudyError(
                f"{path} cannot be read ({error.strerror}); restore it, or prepare the data set again"
            ) from None
        description.append([path.name, status.st_size, status.st_mtime_ns])
    return sha256_json(description)


def _progress(
    outcomes: Iterable[Outcome], count: dict[int, int], total: int, done: int, title: str
) -> Iterator[Outcome]:
    """Pass outcomes on, with a bar of images per second and time left where stderr is a terminal."""
    from tqdm import tqdm

    # only where nobody watches: an explicit `disable` would override the user's TQDM_DISABLE
    make_bar = tqdm if sys.stderr.isatty() else functools.partial(tqdm, disable=True)
    with make_bar(total=total, initial=done, desc=title, unit="img", file=sys.stderr) as bar:
        for outcome in outcomes:
            bar.update(count[outcome.number])
            yield outcome
