"""Writing a packed store chunk by chunk: a killed pack resumes, a half-written store is never taken for a whole one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from danet_core.files import atomic_write_json, replace_folder, sha256_json
from danet_core.store import (
    GALLERIES,
    IMAGES,
    MANIFEST,
    META,
    META_KEYS,
    StoreError,
    content_names,
    content_sha256,
    galleries_bytes,
    manifest_text,
    partial_path,
)

JOURNAL = "journal.jsonl"


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
        if complete.keys() != META_KEYS:
            raise StoreError(f"{META}: expected the keys {sorted(META_KEYS)}, found {sorted(complete)}")
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


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: io.BufferedWriter | io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())
