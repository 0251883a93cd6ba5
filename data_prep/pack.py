"""Preparing and packing: raw tree -> data/prepared/<dataset> -> data/packed/<dataset>.

    prepare   reads and verifies the raw tree: manifest.csv, inventory.json, and galleries.npz in SYSU-MM01's layout
    pack      decodes and resizes every image once, in parallel, into the store of danet_core.store

Both write below a temporary name and rename when complete. A killed pack resumes where it stopped, with the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL

from danet_core.files import StudyError, atomic_write_json, exclusive, read_json, sha256_file, sha256_json
from danet_core.store import (
    GALLERIES,
    MANIFEST,
    StoreWriter,
    galleries_bytes,
    manifest_text,
    read_galleries,
    read_manifest,
    replace_folder,
)
from data_prep.images import INTERPOLATION, Job, Outcome, decode, default_workers, run_jobs
from data_prep.reading import Reading

if TYPE_CHECKING:
    from danet_core.config import Dataset

__all__ = ["FOLDERS", "Folders", "check_images", "decode", "pack", "prepare", "read", "render"]

INVENTORY = "inventory.json"
_CHUNK_BYTES = 8 * 2**20  # of packed images: small enough for many workers, large enough that journalling costs nothing


@dataclass(frozen=True)
class Folders:
    """Where the two stages write, relative to the working directory as in dvc.yaml."""

    prepared: Path = Path("data/prepared")
    packed: Path = Path("data/packed")


FOLDERS = Folders()


def render(dataset: Dataset) -> None:
    """Draw an embedded data set's raw tree; nothing to do for a distributed one."""
    if dataset.render is None:
        return
    from data_prep import synthetic

    draw: Callable[..., Any] = synthetic.render_sysu if dataset.layout == "sysu" else synthetic.render_regdb
    draw(dataset.raw_root(), dataset.render)


def read(
    dataset: Dataset, *, root: Path | None = None, allow_partial: bool = False, expected: Any = "published"
) -> Reading:
    """Read a raw tree with the reader of its layout.

    `expected`: the counts that must be met exactly; "published" takes the facts of the real set, and none for a
    rendered one.
    Raises StudyError when the tree is absent or cannot be read.
    """
    from data_prep import regdb, sysu_mm01

    module, reader = (sysu_mm01, sysu_mm01.read_sysu) if dataset.layout == "sysu" else (regdb, regdb.read_regdb)
    if expected == "published":
        expected = None if dataset.synthetic else module.EXPECTED
    root = dataset.raw_root() if root is None else root
    if dataset.synthetic and not root.is_dir():
        raise StudyError(f"{root} is missing; render it: python -m data_prep prepare {dataset.name}")
    if not dataset.synthetic and not root.is_dir():
        variable = {"sysu": "SYSU_MM01_ROOT", "regdb": "REGDB_ROOT"}[dataset.layout]
        raise StudyError(
            f"{dataset.title} is switched on but its images are not at {root}: expected the tree {module.TREE}; get "
            f"them through "
            f"{module.LICENCE}, put them there, set {variable}, or take {dataset.name} out of `study` in params.yaml"
        )
    reading = reader(root, expected=expected, train_splits=dataset.train_splits, allow_partial=allow_partial)
    if dataset.synthetic:
        _check_against_render(reading)
    return reading


def prepare(
    dataset: Dataset, *, allow_partial: bool = False, expected: Any = "published", folders: Folders = FOLDERS
) -> Reading:
    """Render if embedded, read and verify a data set, and write data/prepared/<dataset>, whole or not at all.

    Raises StudyError for the first finding that is neither accepted as documented nor, with `allow_partial`, a
    difference in counts.
    """
    final = folders.prepared / dataset.name
    with exclusive(lock_path(final), f"the preparation of {dataset.name}"):
        render(dataset)
        reading = read(dataset, allow_partial=allow_partial, expected=expected)
        partial = reading.settle(allow_partial, f"python -m data_prep verify {dataset.name}")
        with _temporary_folder(final) as folder:
            (folder / MANIFEST).write_bytes(manifest_text(reading.manifest).encode())
            if reading.galleries:
                (folder / GALLERIES).write_bytes(galleries_bytes(reading.galleries))
            atomic_write_json(folder / INVENTORY, reading.inventory(dataset.name, dataset.synthetic, partial))
            replace_folder(folder, final)
    return reading


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


def _check_against_render(reading: Reading) -> None:
    """Compare with the counts that the renderer left in render.json, where it did."""
    path = reading.root / "render.json"
    if not path.is_file():
        return
    wanted, found = read_json(path).get("counts", {}), reading.counts
    remedy = f"remove {reading.root} and prepare again, which renders it anew"
    if reading.layout == "sysu":
        pairs = [
            (
                f"cam {cam}: identities / images",
                (row["ids"], row["images"]),
                (found["cameras"][cam]["ids"], found["cameras"][cam]["images"]),
            )
            for cam, row in wanted.get("cameras", {}).items()
        ]
        pairs += [(f"{split} identities", n, found["ids"][split]) for split, n in wanted.get("ids", {}).items()]
    else:
        names = {"visible": "visible", "thermal": "infrared"}
        pairs = [(f"{name} images", n, found["images"][names[name]]) for name, n in wanted.get("images", {}).items()]
        pairs += [(f"{m} identities", wanted["ids"], n) for m, n in found["identities"].items() if "ids" in wanted]
    for name, a, b in pairs:
        reading.check(name, a, b, reading.root, remedy)


def lock_path(final: Path) -> Path:
    """The lock file that keeps one stage from running twice at once."""
    return final.with_name(f".{final.name}.lock")


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


@contextlib.contextmanager
def _temporary_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, removed on leaving unless renamed by then; the caller holds its lock."""
    folder = final.with_name(f".{final.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
