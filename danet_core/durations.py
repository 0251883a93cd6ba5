"""How long a stage that is no notebook took when it last ran here, below build/durations: no stage's output, for `make
bench` alone. papermill notes it in an executed notebook by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from danet_core.files import atomic_write_json, read_json

FOLDER = Path("build/durations")


@contextlib.contextmanager
def timed(stage: str, root: Path) -> Iterator[None]:
    """Note the seconds of the block, if it is left without an error, as those of `stage`, e.g. "pack-synth_sysu"."""
    started = time.perf_counter()
    yield
    atomic_write_json(root / FOLDER / f"{stage}.json", {"seconds": round(time.perf_counter() - started, 2)})


def duration(stage: str, root: Path) -> float | None:
    """Seconds that `stage` took, None where it never ran. Raises StudyError for a broken note."""
    path = root / FOLDER / f"{stage}.json"
    return float(read_json(path)["seconds"]) if path.exists() else None
