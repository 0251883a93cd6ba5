"""data/prepared/<dataset> -> data/packed/<dataset>: every image is decoded and resized once, in several processes.

The store is that of danet_study.store.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from danet_study.config import Dataset
from danet_study.files import StudyError, atomic_write_json, read_json
from danet_study.store import GALLERIES, IMAGES, MANIFEST, META, content_sha256, decode, printable, read_manifest
from data_prep.folders import new_folder
from data_prep.index import INVENTORY, PREPARED, inventory, raw_root, refuse
from data_prep.parallel import parallel

PACKED = Path("data/packed")
EIGHT_BITS = {".jpg", ".jpeg", ".bmp"}  # formats that Pillow only reads with 8 bits per channel
Range = tuple[float, float]  # lowest and highest value


def pack(
    dataset: Dataset, *, workers: int | None = None, prepared: Path = PREPARED, packed: Path = PACKED
) -> dict[str, Any]:
    """Decode and resize a prepared data set into `packed`/<dataset>; returns the store's meta.

    `workers`: processes, one per core by default; the bytes do not depend on it. Raises StudyError if the set is not
    prepared or has changed since, the disk is too small, or an image cannot be decoded; nothing is left behind then.
    """
    source = prepared / dataset.name
    about = read_json(source / INVENTORY)
    root, height, width = raw_root(dataset), dataset.image.height, dataset.image.width
    if not dataset.synthetic and inventory(dataset) != about["raw"]:
        raise StudyError(
            f"{printable(root)} has changed since it was prepared; run `python -m data_prep prepare {dataset.name}`"
        )
    manifest = read_manifest(source / MANIFEST)
    paths = [root / path for path in manifest["path"]]
    intensity = intensity_ranges(paths, manifest["modality"], workers)
    with new_folder(packed / dataset.name) as folder:
        _reserve(folder / IMAGES, (len(paths), 3, height, width))
        jobs = _jobs(paths, manifest["modality"], intensity)
        results = parallel(functools.partial(_decode, (height, width), folder / IMAGES), jobs, workers)
        refuse([failure for failure in results if isinstance(failure, str)], root)
        names = [IMAGES, MANIFEST, *[GALLERIES] * (source / GALLERIES).exists()]
        for name in names[1:]:
            shutil.copyfile(source / name, folder / name)
        meta = {key: about[key] for key in ("dataset", "layout", "protocol", "synthetic", "partial", "counts")} | {
            "n": len(paths),
            "height": height,
            "width": width,
            "interpolation": "bilinear",
            "intensity": intensity or None,
            "files": names,
            "content_sha256": content_sha256(folder, names),
        }
        atomic_write_json(folder / META, meta)
    return meta


def intensity_ranges(paths: Sequence[Path], modalities: Iterable[str], workers: int | None = None) -> dict[str, Range]:
    """Lowest and highest value, by modality, of images with more than 8 bits per pixel; empty without such images.

    Raises StudyError for color images with more than 8 bits per channel, which Pillow would cut, and for a modality
    with both integers and floating-point numbers, which have no common range.
    """
    deep = [(p, m) for p, m in zip(paths, modalities, strict=True) if p.suffix.lower() not in EIGHT_BITS]
    found = list(parallel(_extremes, [path for path, _ in deep], workers))
    refuse([line for line in found if isinstance(line, str)], Path("images"))
    ranges: dict[str, Range] = {}
    kinds: dict[str, str] = {}
    for extremes, (path, modality) in zip(found, deep, strict=True):
        if extremes:
            kind, least, most = extremes
            if kinds.setdefault(modality, kind) != kind:
                raise StudyError(
                    f"{printable(path)}: {modality} images are integers and floats; convert them to one kind"
                )
            low, high = ranges.get(modality, (least, most))
            ranges[modality] = min(low, least), max(high, most)
    return ranges


def inspect_images(
    paths: Sequence[Path], modalities: Sequence[str], height: int, width: int, workers: int | None = None
) -> tuple[list[str], list[str]]:
    """Decode all images: a sentence for each that fails, and the paths of those that are nearly constant."""
    jobs = _jobs(paths, modalities, intensity_ranges(paths, modalities, workers))
    results = list(parallel(functools.partial(_decode, (height, width), None), jobs, workers))
    flat = [printable(path) for path, result in zip(paths, results, strict=True) if result is True]
    return [result for result in results if isinstance(result, str)], flat


def _jobs(paths: Sequence[Path], modalities: Iterable[str], intensity: dict[str, Range]) -> list[Any]:
    """Row, path and range of each image, for `_decode`."""
    return [
        (row, path, intensity.get(modality)) for row, (path, modality) in enumerate(zip(paths, modalities, strict=True))
    ]


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Create the array file with all its blocks: writing to a memory map on a full disk would kill the process."""
    np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def _decode(size: tuple[int, int], target: Path | None, job: tuple[int, Path, Range | None]) -> str | bool:
    """Decode an image into its row of the array file `target`; a sentence if that fails.

    Without `target`: whether the image is nearly constant.
    """
    row, path, extremes = job
    try:
        pixels = decode(path, *size, extremes)
    except StudyError as error:
        return str(error)
    if target is None:
        return bool(pixels.std(axis=(1, 2)).max() < 2)
    np.load(target, mmap_mode="r+")[row] = pixels
    return False


def _extremes(path: Path) -> tuple[str, float, float] | str | None:
    """I or F, lowest and highest value of a gray image with over 8 bits; None for 8 bits; a sentence if refused."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                pixels = np.asarray(image, dtype=float)
                return image.mode[0], float(pixels.min()), float(pixels.max())
            if any(";16" in str(tile) for tile in image.tile):
                return f"{printable(path)} has 16 bits per color channel; convert the images to 8 bits"
    except Exception:  # decoding will say what is wrong with the file
        return None
    return None
