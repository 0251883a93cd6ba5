"""Files that are either whole or absent, locks, and hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class StudyError(ValueError):
    """An error that a user can act on: one sentence with place, finding and remedy."""


def escape_unprintable() -> None:
    """For a command: print characters that the terminal's encoding lacks as escapes, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` if the block succeeds and is removed if it fails.

    The content is flushed to disk first, so that a crash leaves the old file or the new one. Only one process may write
    a file at a time: `exclusive`. Raises StudyError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StudyError(f"{path} cannot be written ({error.strerror}); check the disk and access rights") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write `content`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, one line per key, sorted: equal values give equal bytes. NaN is refused."""
    dump = functools.partial(json.dumps, sort_keys=True, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join(f"{dump(key)}: {dump(value[key])}" for key in sorted(value))
    atomic_write_text(path, f"{{\n{lines}\n}}\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises StudyError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; `dvc repro` makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise StudyError(f"{path} is not valid JSON; remove it and run `dvc repro`") from None


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the operating system frees it when the process ends.

    Raises StudyError if another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(blocking=False)
    except Timeout:
        raise StudyError(f"{what} is in use by another process; wait for it, or stop it") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be locked ({error.strerror}); check access rights") from None
    try:
        yield
    finally:
        lock.release()


def replace_folder(new: Path, final: Path) -> None:
    """Rename folder `new` to `final` and remove an older `final`; `final` is never partial."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
