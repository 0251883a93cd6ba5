"""What a finished run left on disk, read and checked without torch: its training record and its test features."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from danet_core.files import StudyError, read_json

_REQUIRED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dataset", "variant", "label", "trial", "seed", "command", "seconds", "history"), ()),
    "config": ("dataset", "variant", "trial", "seed"),
    "provenance": ("data_sha256", "weights_sha256", "fingerprint", "model_sha256"),
    "versions": ("code", "python", "device", "libraries", "train_code_sha256"),
}


def read_training_record(path: Path) -> dict[str, Any]:
    """A run's `record.json` as training wrote it, with at least one epoch.

    Raises StudyError, naming the file and the key, for one that is missing, damaged or no such record.
    """
    record = read_json(path)
    for key, inner in _REQUIRED.items():
        lacks = [] if isinstance(record, dict) and key in record else [key]
        if not lacks:
            part = record[key]
            lacks = [f"{key}.{name}" for name in inner if not isinstance(part, dict) or name not in part]
        if lacks:
            raise StudyError(f"{path} is no record of a run (it has no {lacks[0]}); remove it and train again")
    if not record["history"]:
        raise StudyError(f"{path} is the record of a run without an epoch; remove it and train again")
    return record


def read_features(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of a run's `features.npz`, see evaluate.Features. StudyError for a missing or damaged file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; the evaluate stage of that run writes it: run `dvc repro`") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StudyError(f"{path} is damaged ({error}); remove it and run `dvc repro`") from None
