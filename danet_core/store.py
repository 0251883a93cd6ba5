"""A packed store: the images of a data set as one memory-mapped array, with its manifest, galleries and content hash.

    images.npy      uint8 (N, 3, H, W), RGB, C-contiguous
    manifest.csv    one line per image in the array's order: row, path, pid, camid, modality, split_1 [.. split_10]
    galleries.npz   SYSU-MM01's layout only: all_single, all_multi, indoor_single, indoor_multi, each (10, G) int32 rows
    meta.json       data set, layout, size, interpolation, counts, content hash; no time stamp

A store is written below `<name>.partial` and renamed when complete, so that under its own name it is whole or absent.
The content hash covers the other three files; `PackedStore.open` recomputes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt8

from danet_core.files import StudyError, atomic_write_json, sha256_file, sha256_json

IMAGES, MANIFEST, GALLERIES, META, JOURNAL = "images.npy", "manifest.csv", "galleries.npz", "meta.json", "journal.jsonl"
MODALITIES = ("visible", "infrared")  # index = integer code
COLUMNS = ("row", "path", "pid", "camid", "modality")  # and split_<trial>
_META_KEYS = frozenset(
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
        self.modalities = (manifest["modality"] == MODALITIES[1]).to_numpy(dtype=np.int64)

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


class StoreWriter:
    """Writes a store chunk by chunk below `<root>.partial`, so that a killed pack resumes.

    The journal's first line is the fingerprint of what is packed; each further line is a finished chunk: its number,
    the `source` it was made from and the hash of its bytes. A chunk counts as done when all three still hold, so
    neither a torn line, nor bytes that never reached the disk, nor an image replaced in the meantime can get into a
    store.
    """

    def __init__(self, root: Path, shape: tuple[int, int, int, int], fingerprint: str, chunk: int) -> None:
        """Open or resume the partial store. `shape` (N, 3, H, W); `chunk` images are written and journalled at a time.

        Raises StoreError when the disk lacks room for what is still to be written.
        """
        self.root, self.shape, self.chunk = root, shape, chunk
        self.partial = partial_path(root)
        self.images_path = self.partial / IMAGES
        self.n_chunks = -(-shape[0] // chunk)
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        self.offset = header.tell()
        self.image_bytes = int(np.prod(shape[1:]))
        self._fingerprint = sha256_json({"what": fingerprint, "shape": list(shape), "chunk": chunk})
        journal = self._read_journal()
        if not journal or journal[0].get("fingerprint") != self._fingerprint:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.partial)
            journal = []
        self._check_room()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._finished = {line["chunk"]: line for line in journal[1:] if "chunk" in line}
        if not journal:
            with self.images_path.open("wb") as file:
                file.write(header.getvalue())
                file.truncate(self.offset + shape[0] * self.image_bytes)
                _sync(file)
        # rewritten rather than appended to: a torn last line is dropped
        self._journal = (self.partial / JOURNAL).open("w", encoding="utf-8", newline="\n")
        for line in [{"fingerprint": self._fingerprint}, *self._finished.values()]:
            self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()

    def rows(self, chunk: int) -> range:
        """The rows of one chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.shape[0]))

    def offset_of(self, chunk: int) -> int:
        """Byte of `images_path` at which a chunk begins."""
        return self.offset + self.rows(chunk).start * self.image_bytes

    def done(self, chunk: int, source: str) -> bool:
        """Whether this chunk was finished by an earlier attempt, from the same source, and its bytes are on disk."""
        line = self._finished.get(chunk)
        if line is None or line["source"] != source:
            return False
        rows = self.rows(chunk)
        with self.images_path.open("rb") as file:
            file.seek(self.offset_of(chunk))
            return hashlib.sha256(file.read(len(rows) * self.image_bytes)).hexdigest() == line["sha256"]

    def finish_chunk(self, chunk: int, source: str, sha256: str) -> None:
        """Journal a chunk whose bytes, with this hash, are in the array's file at `offset_of(chunk)`."""
        self._journal.write(json.dumps({"chunk": chunk, "source": source, "sha256": sha256}) + "\n")
        self._journal.flush()

    def close(self) -> None:
        """Keep what is written for a later attempt."""
        self._journal.close()

    def commit(
        self, manifest: pd.DataFrame, galleries: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write manifest, galleries and meta, and rename the whole store into place. Returns the complete meta."""
        self._journal.close()
        _write_synced(self.partial / MANIFEST, manifest_text(manifest).encode())
        if galleries:
            _write_synced(self.partial / GALLERIES, galleries_bytes(galleries))
        with self.images_path.open("rb+") as file:
            _sync(file)
        n, _, height, width = self.shape
        names = content_names(meta["layout"])
        sha256 = content_sha256(self.partial, names)
        complete = {**meta, "n": n, "height": height, "width": width, "content_sha256": sha256}
        if complete.keys() != _META_KEYS:
            raise StoreError(f"{META}: expected the keys {sorted(_META_KEYS)}, found {sorted(complete)}")
        atomic_write_json(self.partial / META, complete)
        (self.partial / JOURNAL).unlink()
        replace_folder(self.partial, self.root)
        return complete

    def _read_journal(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError):
            for text in (self.partial / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break  # torn by the kill
                if not isinstance(line, dict) or (lines and line.keys() != {"chunk", "source", "sha256"}):
                    break
                lines.append(line)
            size = self.images_path.stat().st_size
            if size != self.offset + self.shape[0] * self.image_bytes:
                return []
        return lines

    def _check_room(self) -> None:
        allocated = 0
        with contextlib.suppress(FileNotFoundError):
            status = self.images_path.stat()
            allocated = getattr(status, "st_blocks", 0) * 512  # the file is sparse: its size says nothing
        needed = (
            self.offset + self.shape[0] * self.image_bytes + 400 * self.shape[0] + 2**20
        )  # manifest, galleries, slack
        check_room(self.root, needed - allocated)


def check_room(root: Path, needed: int) -> None:
    """Raise StoreError when the disk that will hold `root` has less than `needed` bytes free."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{root}: packing needs {needed:,} bytes ({needed / 2**30:.2f} GiB), the disk has {free:,} free "
            f"({free / 2**30:.2f} GiB); make room, or lower image.height and image.width in params.yaml"
        )


def replace_folder(new: Path, final: Path) -> None:
    """Rename folder `new` to `final`, replacing an older one; under the final name there is never a part of either."""
    old = final.with_name(f".{final.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    new.rename(final)
    if os.name == "posix":
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if old.exists():
        shutil.rmtree(old)


def _read_meta(root: Path, remedy: str) -> dict[str, Any]:
    path = root / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, so {root} is not a whole store; {remedy}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(meta, dict) or meta.keys() != _META_KEYS:
        found = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
        raise StoreError(f"{path}: expected the keys {sorted(_META_KEYS)}, found {found}; {remedy}")
    return meta


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: io.BufferedWriter | io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())
