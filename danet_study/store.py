"""A packed store: the images of a data set as one memory-mapped array, with manifest, galleries and content hash.

    images.npy      uint8 (N, 3, H, W), RGB
    manifest.csv    one line per image, in the array's order: row, path, pid, camid, modality, split_1 [.. split_10]
    galleries.npz   only for protocols with fixed galleries, SYSU-MM01: one (T, G) int32 array of rows per setting
    meta.json       data set, protocol, image size, counts, content hash; no time stamp

data_prep.pack writes a store under a temporary name and renames it when complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from danet_core import INFRARED, MODALITIES
from danet_study.files import StudyError, sha256_file, sha256_json

IMAGES, MANIFEST, GALLERIES, META = "images.npy", "manifest.csv", "galleries.npz", "meta.json"
COLUMNS = ("row", "path", "pid", "camid", "modality")  # and split_<trial>


@dataclass(frozen=True)
class PackedStore:
    """A data set's images, read-only. `galleries` is empty for protocols without fixed galleries."""

    root: Path
    images: UInt8[np.ndarray, "N 3 H W"]
    manifest: pd.DataFrame
    meta: dict[str, Any]
    galleries: dict[str, Int[np.ndarray, "T G"]]

    @classmethod
    def open(cls, root: str | Path, *, verify: bool = True) -> PackedStore:
        """Open the store in folder `root`; `verify` recomputes the content hash, about a second per gigabyte.

        Raises StudyError if the store is missing, incomplete or changed.
        """
        root = Path(root)
        remedy = f"remove {root} and run `dvc repro`"
        try:
            meta = json.loads((root / META).read_text(encoding="utf-8"))
            if verify and content_sha256(root, meta["files"]) != meta["content_sha256"]:
                raise StudyError(f"{root} is not what was packed: its content hash differs; {remedy}")
            images = np.load(root / IMAGES, mmap_mode="r", allow_pickle=False)
            manifest = read_manifest(root / MANIFEST)
            galleries = {}
            if GALLERIES in meta["files"]:
                with np.load(root / GALLERIES, allow_pickle=False) as archive:
                    galleries = dict(archive)
        except FileNotFoundError as error:
            raise StudyError(f"{error.filename} is missing; `dvc repro` makes it") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"{root} is damaged ({type(error).__name__}); {remedy}") from None
        if images.shape != (len(manifest), 3, meta["height"], meta["width"]) or images.dtype != np.uint8:
            raise StudyError(f"{root / IMAGES}: found {images.dtype} {images.shape}, not as in {META}; {remedy}")
        return cls(root, images, manifest, meta, galleries)

    @cached_property
    def pids(self) -> Int[np.ndarray, " N"]:
        return self.manifest["pid"].to_numpy(dtype=np.int64)

    @cached_property
    def camids(self) -> Int[np.ndarray, " N"]:
        return self.manifest["camid"].to_numpy(dtype=np.int64)

    @cached_property
    def modalities(self) -> Int[np.ndarray, " N"]:
        """0 visible, 1 infrared."""
        return (self.manifest["modality"] == MODALITIES[INFRARED]).to_numpy(dtype=np.int64)

    def rows(self, splits: str | Sequence[str], trial: int = 1) -> Int[np.ndarray, " n"]:
        """Rows of these splits in a trial, ascending. Raises StudyError for a trial or split without images."""
        column, splits = f"split_{trial}", [splits] if isinstance(splits, str) else list(splits)
        if column not in self.manifest:
            raise StudyError(f"{self.root} has no trial {trial}; correct study.splits in params.yaml")
        for split in splits:
            if not (self.manifest[column] == split).any():
                raise StudyError(f"{self.root}: split {split!r} of trial {trial} has no image; check train_splits")
        return np.flatnonzero(self.manifest[column].isin(splits).to_numpy())


def content_sha256(root: Path, names: Iterable[str]) -> str:
    """One hash of the named files."""
    return sha256_json({name: sha256_file(root / name) for name in names})


def read_manifest(path: Path) -> pd.DataFrame:
    """Read and check a manifest.csv. Raises StudyError for missing columns or values that cannot be."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    absent = [name for name in (*COLUMNS, "split_1") if name not in table]
    if absent:
        raise StudyError(f"{path} lacks the columns {', '.join(absent)}; run `dvc repro`")
    table = table.astype({name: np.int64 for name in ("row", "pid", "camid")})
    if not np.array_equal(table["row"], np.arange(len(table))) or set(table["modality"]) - set(MODALITIES):
        raise StudyError(f"{path} has other rows or modalities than expected; run `dvc repro`")
    return table


def decode(
    path: str | Path, height: int, width: int, intensity: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "3 H W"]:
    """One image file as RGB of the given size; a gray image has three equal channels.

    EXIF orientation is applied. A 16-bit image is mapped linearly from `intensity` (low, high) to 0..255.
    Raises StudyError if the file cannot be decoded, or is 16-bit and `intensity` is None.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise anything on damaged files
        raise StudyError(f"{printable(path)} cannot be decoded ({type(error).__name__}); replace the file") from None
    if upright.mode.startswith(("I", "F")):
        if intensity is None:
            raise StudyError(f"{printable(path)} has over 8 bits per pixel and no known range; convert it to 8 bits")
        low, high = intensity
        counts = (np.asarray(upright, dtype=np.float64) - low) * (255 / max(high - low, 1))
        upright = Image.fromarray(counts.clip(0, 255).round().astype(np.uint8))
    resized = upright.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)


def printable(path: str | Path) -> str:
    """A path as text that can be printed and stored, also if its bytes are not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()
