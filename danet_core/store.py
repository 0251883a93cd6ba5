"""A packed store: the images of a data set as one memory-mapped array, with its manifest, galleries and content hash.

    images.npy      uint8 (N, 3, H, W), RGB, C-contiguous
    manifest.csv    one line per image in the array's order: row, path, pid, camid, modality, split_1 [.. split_10]
    galleries.npz   SYSU-MM01's layout only: all_single, all_multi, indoor_single, indoor_multi, each (10, G) int32 rows
    meta.json       data set, layout, size, interpolation, counts, content hash; no time stamp

A store is written below `<name>.partial` and renamed when complete, so that under its own name it is whole or absent.
The content hash covers the other three files; `PackedStore.open` recomputes it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt8

from danet_core import INFRARED, MODALITIES
from danet_core.files import StudyError, sha256_file, sha256_json

IMAGES, MANIFEST, GALLERIES, META = "images.npy", "manifest.csv", "galleries.npz", "meta.json"
COLUMNS = ("row", "path", "pid", "camid", "modality")  # and split_<trial>
META_KEYS = frozenset(
    ("dataset", "layout", "synthetic", "partial", "height", "width", "interpolation", "n", "counts", "content_sha256")
)


class StoreError(StudyError):
    """A store, or a file of it, is missing, incomplete or not what was written."""


class PackedStore:
    """A data set's images in memory order, read-only.

    Attributes: root; images (N, 3, H, W) uint8 memory map; manifest, one line per image; meta; galleries, empty for
    RegDB's layout; pids, camids, modalities (N,) int64, modality 0 visible, 1 infrared.
    """

    root: Path
    images: UInt8[np.ndarray, "N 3 H W"]
    manifest: pd.DataFrame
    meta: dict[str, Any]
    galleries: dict[str, Int[np.ndarray, "T _"]]
    pids: Int[np.ndarray, " N"]
    camids: Int[np.ndarray, " N"]
    modalities: Int[np.ndarray, " N"]

    def __init__(
        self,
        root: Path,
        images: np.ndarray,
        manifest: pd.DataFrame,
        meta: dict[str, Any],
        galleries: dict[str, np.ndarray],
    ) -> None:
        self.root, self.images, self.manifest, self.meta, self.galleries = root, images, manifest, meta, galleries
        self.pids = manifest["pid"].to_numpy(dtype=np.int64)
        self.camids = manifest["camid"].to_numpy(dtype=np.int64)
        self.modalities = (manifest["modality"] == MODALITIES[INFRARED]).to_numpy(dtype=np.int64)

    @classmethod
    def open(cls, root: str | Path, *, verify: bool = True) -> PackedStore:
        """Open the store in folder `root`.

        Args:
            verify: also recompute the content hash, about a second per gigabyte. Without it only sizes are compared.

        Raises StoreError, saying path, expected, found and remedy, when the store is missing, incomplete or altered.
        """
        root = Path(root)
        remedy = f"remove the folder and pack again: python -m data_prep pack {root.name}"
        if not root.is_dir():
            begun = " (a pack was begun and not finished)" if partial_path(root).is_dir() else ""
            raise StoreError(
                f"{root} is missing{begun}; `dvc repro` or `python -m data_prep pack {root.name}` makes it"
            )
        meta = _read_meta(root, remedy)
        names = content_names(meta["layout"])
        for name in names:
            if not (root / name).is_file():
                raise StoreError(f"{root / name} is missing; {remedy}")
        if verify:
            found = content_sha256(root, names)
            if found != meta["content_sha256"]:
                raise StoreError(
                    f"{root}: content differs from what was packed: expected sha256 {meta['content_sha256'][:16]}..., "
                    f"found {found[:16]}...; {remedy}"
                )
        try:
            images = np.load(root / IMAGES, mmap_mode="r", allow_pickle=False)
            manifest = read_manifest(root / MANIFEST)
            galleries = read_galleries(root / GALLERIES) if GALLERIES in names else {}
        except StudyError as error:
            raise StoreError(f"{error}; {remedy}") from None
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{root / IMAGES} is not a whole array ({error}); {remedy}") from None
        shape = (meta["n"], 3, meta["height"], meta["width"])
        if images.shape != shape or images.dtype != np.uint8 or not images.flags.c_contiguous:
            raise StoreError(f"{root / IMAGES}: expected uint8 {shape}, found {images.dtype} {images.shape}; {remedy}")
        if len(manifest) != meta["n"]:
            raise StoreError(
                f"{root / MANIFEST}: expected {meta['n']} lines of images, found {len(manifest)}; {remedy}"
            )
        return cls(root, images, manifest, meta, galleries)

    def rows(self, splits: str | Sequence[str], trial: int = 1) -> Int[np.ndarray, " N"]:
        """Rows of these splits in training trial `trial`, ascending.

        Raises StoreError for a trial without a split column, or a split that names no image.
        """
        splits = [splits] if isinstance(splits, str) else list(splits)
        column = f"split_{trial}"
        if column not in self.manifest:
            known = ", ".join(
                name.removeprefix("split_") for name in map(str, self.manifest) if name.startswith("split_")
            )
            raise StoreError(f"{self.root}: no split of trial {trial}; this store has trial {known}")
        values = self.manifest[column]
        for split in splits:
            if not (values == split).any():
                known = ", ".join(sorted(set(values) - {""}))
                raise StoreError(f"{self.root}: split {split!r} of trial {trial} has no image; this store has {known}")
        return np.flatnonzero(values.isin(splits).to_numpy()).astype(np.int64)


def partial_path(root: Path) -> Path:
    """Where the store of `root` is written until it is complete."""
    return root.with_name(root.name + ".partial")


def lock_path(folder: Path) -> Path:
    """The lock file that keeps a prepared or packed folder from being made twice at once."""
    return folder.with_name(f".{folder.name}.lock")


def content_names(layout: str) -> tuple[str, ...]:
    """Names of the files that the content hash covers."""
    return (IMAGES, MANIFEST, GALLERIES) if layout == "sysu" else (IMAGES, MANIFEST)


def content_sha256(root: Path, names: Iterable[str]) -> str:
    """One hash of the named files: sha256 of {name: sha256 of the file}."""
    return sha256_json({name: sha256_file(root / name) for name in names})


def manifest_text(manifest: pd.DataFrame) -> str:
    """A manifest as CSV with `\\n` line ends."""
    return manifest.to_csv(index=False, lineterminator="\n")


def read_manifest(path: Path) -> pd.DataFrame:
    """Read and check a manifest.csv.

    Raises StoreError naming the file for missing columns, numbers that are none, an unknown modality, or rows that are
    not 0..N-1.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; `dvc repro` makes it") from None
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise StoreError(f"{path} is not a manifest ({' '.join(str(error).split())})") from None
    absent = [name for name in COLUMNS if name not in table]
    if not any(str(name).startswith("split_") for name in table):
        absent.append("split_1")
    if absent:
        raise StoreError(
            f"{path}: expected the columns {', '.join(COLUMNS)} and split_<trial>, missing {', '.join(absent)}"
        )
    for name in ("row", "pid", "camid"):
        try:
            table[name] = table[name].astype(np.int64)
        except ValueError:
            raise StoreError(f"{path}: expected whole numbers in column {name}, found something else") from None
    if not np.array_equal(table["row"], np.arange(len(table))):
        raise StoreError(f"{path}: expected rows 0 to {len(table) - 1} in order, found another numbering")
    if unknown := sorted(set(table["modality"]) - set(MODALITIES)):
        raise StoreError(f"{path}: expected modality visible or infrared, found {unknown[0]!r}")
    return table


def galleries_bytes(galleries: Mapping[str, Int[np.ndarray, "T _"]]) -> bytes:
    """Galleries as an uncompressed .npz; equal galleries give equal bytes (numpy stamps every member 1980)."""
    buffer = io.BytesIO()
    members: dict[str, Any] = {name: np.ascontiguousarray(galleries[name], dtype="<i4") for name in sorted(galleries)}
    np.savez(buffer, **members)
    return buffer.getvalue()


def read_galleries(path: Path) -> dict[str, Int[np.ndarray, "T _"]]:
    """Read galleries.npz. Raises StoreError naming the file when it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; `dvc repro` makes it") from None
    except Exception as error:  # zipfile and numpy raise whatever a damaged file leads them to
        raise StoreError(f"{path} cannot be read ({type(error).__name__})") from None


def _read_meta(root: Path, remedy: str) -> dict[str, Any]:
    path = root / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, so {root} is not a whole store; {remedy}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(meta, dict) or meta.keys() != META_KEYS:
        found = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
        raise StoreError(f"{path}: expected the keys {sorted(META_KEYS)}, found {found}; {remedy}")
    return meta
