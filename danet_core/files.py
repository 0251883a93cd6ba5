"""Files that are either whole or absent, and the hashes that name their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class StudyError(ValueError):
    """An error a user can act on: one sentence with what, where, expected, found and remedy."""


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, the same for equal values whatever their key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, remove it when it fails.

    What stands at `path` is renamed to `keep`, where that is given, once the new content is whole.

    The content is flushed to disk before the rename, so that a crash leaves the old file or the new one, never a part.
    The temporary name is always the same: what a killed process leaves there, the next attempt overwrites. Whoever
    may write a file from two processes at once holds a lock (`exclusive`) around it.
    Raises StudyError when the folder cannot be written to and when the disk is full.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        remedy = "make room on its disk" if error.errno in _FULL else "give yourself write access to its folder"
        raise StudyError(f"{path} cannot be written ({error.strerror}); {remedy}") from None
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StudyError(
            f"{path} cannot be written ({error.strerror}); make room on its disk and run again: what stood there "
            "before still stands"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write `content`, whole or not at all; `keep` as in `atomic_path`."""
    with atomic_path(path, keep) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys, so that equal values give equal bytes. NaN is refused."""
    atomic_write_text(path, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is a StudyError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; the stage that writes it has not run: `dvc repro` makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not valid JSON ({error}); remove it and run `dvc repro` again") from None


def read_entry(path: Path, *keys: str) -> Any:
    """The value below `keys`, one inside the other, in a JSON file; StudyError where it is not there."""
    value = read_json(path)
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise StudyError(f"{path} has no entry {'.'.join(keys)}, so it is damaged; remove it and make it again")
        value = value[key]
    return value


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for the block; the operating system frees it when the process dies, however it dies.

    Raises StudyError at once when another process holds it: the same `what` is never made twice at the same time.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:  # an OSError too
        raise StudyError(
            f"{what} is being made by another process ({path} is locked); wait for it or stop it"
        ) from None
    except OSError as error:
        raise StudyError(
            f"{path} cannot be locked ({error.strerror}); give yourself write access to its folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def replace_folder(new: Path, final: Path) -> None:
    """Rename folder `new` to `final`, replacing an older one; under the final name there is never a part of either."""
    old = final.with_name(f".{final.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    new.rename(final)
    _fsync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _fsync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a rename in it outlives a loss of power."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
