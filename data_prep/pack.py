"""data/prepared/<dataset> -> data/packed/<dataset>: every image is decoded and resized once, in several processes.

The store is that of danet_study.store. It is written as `<dataset>.partial` and renamed when complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from danet_core import MODALITIES
from danet_study.files import StudyError, atomic_write_json, exclusive, read_json, replace_folder
from danet_study.store import GALLERIES, IMAGES, MANIFEST, META, content_sha256, decode, printable, read_manifest
from data_prep.parallel import parallel

if TYPE_CHECKING:
    from danet_study.config import Dataset

PACKED = Path("data/packed")
EIGHT_BITS = {".jpg", ".jpeg", ".bmp"}  # formats that Pillow only reads with 8 bits per channel
CHUNK = 128  # images per job
SHOWN = 10  # findings in one message


class Chunk(NamedTuple):
    """Images for one job: `ranges` as `intensity` of store.decode; rows from `start` of the array file `target`."""

    paths: Sequence[Path]
    ranges: Sequence[tuple[float, float] | None]
    height: int
    width: int
    target: Path | None
    start: int


def pack(
    dataset: Dataset, *, workers: int | None = None, prepared: Path = Path("data/prepared"), packed: Path = PACKED
) -> dict[str, Any]:
    """Decode and resize a prepared data set into `packed`/<dataset>; returns the store's meta.

    `workers`: processes, one per core by default; the bytes do not depend on it. Raises StudyError if the set is not
    prepared or has changed since, the disk is too small, or an image cannot be decoded; nothing is left behind then.
    """
    from data_prep.index import INVENTORY, inventory, raw_root  # here: worker processes need no pandas

    source, final = prepared / dataset.name, packed / dataset.name
    about = read_json(source / INVENTORY)
    root, height, width = raw_root(dataset), dataset.image.height, dataset.image.width
    with exclusive(packed / f".{dataset.name}.lock", str(final)):
        if not dataset.synthetic and inventory(dataset) != about["raw"]:
            raise StudyError(
                f"{printable(root)} has changed since it was prepared; run `python -m data_prep prepare {dataset.name}`"
            )
        manifest = read_manifest(source / MANIFEST)
        paths = [root / path for path in manifest["path"]]
        intensity = intensity_ranges(paths, manifest["modality"], workers)
        ranges = [None if intensity is None else intensity.get(modality) for modality in manifest["modality"]]
        partial = packed / f"{dataset.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _reserve(partial / IMAGES, (len(paths), 3, height, width))
            jobs = _chunks(paths, ranges, height, width, partial / IMAGES)
            refuse([line for found in parallel(_decode, jobs, workers) for line in found[0]], printable(root))
            names = [name for name in (MANIFEST, GALLERIES) if (source / name).exists()]
            for name in names:
                shutil.copyfile(source / name, partial / name)
            meta = {
                **{key: about[key] for key in ("dataset", "layout", "protocol", "synthetic", "partial", "counts")},
                **{"n": len(paths), "height": height, "width": width, "interpolation": "bilinear"},
                **{"intensity": intensity, "files": [IMAGES, *names]},
                "content_sha256": content_sha256(partial, [IMAGES, *names]),
            }
            atomic_write_json(partial / META, meta)
            replace_folder(partial, final)
        except OSError as error:
            raise StudyError(f"{final} cannot be written ({error.strerror}); make room on the disk") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return meta


def intensity_ranges(
    paths: Sequence[Path], modalities: Iterable[str], workers: int | None = None
) -> dict[str, tuple[float, float]] | None:
    """Lowest and highest value, by modality, of images with more than 8 bits per pixel; None without such images.

    Raises StudyError for color images with more than 8 bits per channel, which Pillow would cut.
    """
    deep = [(path, modality) for path, modality in zip(paths, modalities, strict=True) if _may_be_deep(path)]
    found = list(parallel(_extremes, [path for path, _ in deep], workers, chunksize=CHUNK))
    refuse([line for line in found if isinstance(line, str)], "images")
    by_modality = {
        name: [extremes for extremes, (_, modality) in zip(found, deep, strict=True) if extremes and modality == name]
        for name in MODALITIES
    }
    result = {
        name: (min(low for low, _ in values), max(high for _, high in values))
        for name, values in by_modality.items()
        if values
    }
    return result or None


def inspect_images(
    paths: Sequence[Path], modalities: Sequence[str], height: int, width: int, workers: int | None = None
) -> tuple[list[str], list[str]]:
    """Decode all images: a sentence for each that fails, and the paths of those of nearly one gray value."""
    intensity = intensity_ranges(paths, modalities, workers) or {}
    jobs = _chunks(paths, [intensity.get(modality) for modality in modalities], height, width)
    failures, flat = [], []
    for some_failures, some_flat in parallel(_decode, jobs, workers):
        failures += some_failures
        flat += some_flat
    return failures, flat


def refuse(findings: Sequence[str], where: str, remedy: str = "") -> None:
    """Raise StudyError with the findings, at most ten of them, if there are any."""
    if len(findings) == 1:
        raise StudyError(f"{where}: {findings[0]}{remedy}")
    if findings:
        more = [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
        lines = "\n  ".join([*findings[:SHOWN], *more])
        raise StudyError(f"{where}: {len(findings)} findings{remedy}\n  {lines}")


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Create the array file with all its blocks: writing to a memory map on a full disk would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    del array
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def _chunks(
    paths: Sequence[Path],
    ranges: Sequence[tuple[float, float] | None],
    height: int,
    width: int,
    target: Path | None = None,
) -> list[Chunk]:
    return [
        Chunk(paths[start : start + CHUNK], ranges[start : start + CHUNK], height, width, target, start)
        for start in range(0, len(paths), CHUNK)
    ]


def _decode(job: Chunk) -> tuple[list[str], list[str]]:
    """Decode a chunk, into its rows if it has a target; sentences of failures, and paths of flat images."""
    images = None if job.target is None else np.load(job.target, mmap_mode="r+")
    failures, flat = [], []
    for row, (path, extremes) in enumerate(zip(job.paths, job.ranges, strict=True), job.start):
        try:
            pixels = decode(path, job.height, job.width, extremes)
        except StudyError as error:
            failures.append(str(error))
        except Exception as error:  # decoders raise anything on damaged files
            failures.append(f"{printable(path)} cannot be decoded ({type(error).__name__}); replace the file")
        else:
            if images is not None:
                images[row] = pixels
            elif pixels.std() < 2:
                flat.append(printable(path))
    return failures, flat


def _may_be_deep(path: Path) -> bool:
    return path.suffix.lower() not in EIGHT_BITS


def _extremes(path: Path) -> tuple[float, float] | str | None:
    """Lowest and highest value of a gray image with more than 8 bits, None for 8 bits, a sentence if it is refused."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                low, high = np.asarray(image.getextrema(), dtype=float)
                return float(low), float(high)
            if any(";16" in str(tile) for tile in image.tile):
                return f"{printable(path)} has 16 bits per color channel; convert the images to 8 bits"
    except Exception:  # decoding will say what is wrong with the file
        return None
    return None
