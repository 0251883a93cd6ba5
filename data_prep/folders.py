"""Folders that are either whole or absent."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from danet_study.files import StudyError, exclusive, replace_folder


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder. It replaces `final` if the block succeeds and is removed if the block fails.

    Raises StudyError if another process makes `final`, or if the disk is full.
    """
    partial = final.with_name(f".{final.name}.partial")
    with exclusive(final.with_name(f".{final.name}.lock"), str(final)):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            replace_folder(partial, final)
        except OSError as error:
            raise StudyError(f"{final} cannot be written ({error.strerror}); make room on the disk") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
