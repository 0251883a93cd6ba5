"""Where a run keeps its files: the finished model with its record, and the checkpoints it can be resumed from.

Two checkpoints are kept, so that one is whole on disk at any moment: the last one, and the one before it. A run goes on
from a checkpoint only if everything but the device is what it was made with: numbers, data, code and libraries.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from danet_core.config import RunConfig
from danet_core.files import StudyError, atomic_write_bytes, atomic_write_json, read_json, sha256_file, sha256_json

CODE = (
    *(
        "augment",
        "backbone",
        "config",
        "losses",
        "model",
        "parallel",
    ),  # what parameters.py reads is compared as numbers
    *("precision", "record", "repro", "sampler", "store", "train"),
)
"""The modules that training runs, the same that its stage in dvc.yaml names."""
# Read when this module is imported, as the others are: it is that code which runs, whatever is edited meanwhile.
SOURCES = {f"{name}.py": sha256_file(Path(__file__).with_name(f"{name}.py")) for name in CODE}
"""SHA-256 of each of them."""
SAME_NOTICE = 2.0
"""Seconds within which a second SIGTERM says nothing new."""
_CHECKPOINT_KEYS = {"made_with", "model", "optimiser", "history"}


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. `root` holds what is finished, `checkpoint` what is under way."""

    root: Path
    checkpoint: Path

    @classmethod
    def of(cls, config: RunConfig, runs: Path = Path("runs"), build: Path = Path("build")) -> RunFolder:
        return cls(runs / config.place, build / "checkpoints" / f"{config.place}.pt")

    @property
    def model(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def record(self) -> Path:
        return self.root / "record.json"

    @property
    def features(self) -> Path:
        return self.root / "features.npz"

    @property
    def previous(self) -> Path:
        """The checkpoint before the last one."""
        return self.checkpoint.with_suffix(".previous.pt")

    @property
    def lock(self) -> Path:
        return self.checkpoint.with_suffix(".lock")


def fingerprint(config: RunConfig, data_sha256: str, weights_sha256: str) -> str:
    """One hash of everything a run's weights depend on besides libraries and device."""
    return sha256_json({"config": config.resolved(), "data": data_sha256, "weights": weights_sha256})


def save_finished(folder: RunFolder, model: nn.Module, record: dict[str, Any]) -> dict[str, Any]:
    """Write the model and its record, each whole or not at all; the record comes last and names the model's hash.

    The model file carries what identifies the run, and nothing that differs between two equal runs.
    """
    names = {key: record[key] for key in ("dataset", "variant", "trial", "seed", "config")}
    # One entry only: safetensors writes several in the order of a hash table, another one in each process.
    identity = {"run": json.dumps({**names, "fingerprint": record["provenance"]["fingerprint"]}, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    atomic_write_bytes(folder.model, safetensors.torch.save(tensors, metadata=identity))
    record = {**record, "provenance": {**record["provenance"], "model_sha256": sha256_file(folder.model)}}
    atomic_write_json(folder.record, record)
    return record


def load_finished(folder: RunFolder, config: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and record of a finished run.

    Raises StudyError when the run is missing, of another configuration, or its model is not the recorded one.
    """
    record = read_json(folder.record)
    if record["config"] != config.resolved():
        keys = ", ".join(differing_keys(record["config"], config.resolved()))
        raise StudyError(f"{folder.record} was made with another configuration (it differs in {keys}); run `dvc repro`")
    found = sha256_file(folder.model) if folder.model.exists() else "no file"
    if found != record["provenance"]["model_sha256"]:
        expected = record["provenance"]["model_sha256"]
        raise StudyError(
            f"{folder.model}: expected SHA-256 {expected}, found {found}; remove the folder and run `dvc repro`"
        )
    with safe_open(folder.model, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, record  # noqa: SIM118 (not a mapping)


def made_with(config: RunConfig, data_sha256: str, weights_sha256: str) -> dict[str, Any]:
    """What a checkpoint has to share with the run that goes on from it: all that weights depend on but the device."""
    return {
        "configuration": config.resolved(),
        "data": data_sha256,
        "backbone weights": weights_sha256,
        "code": SOURCES,
        "libraries": {"torch": str(torch.__version__), "numpy": np.__version__},
    }


def save_checkpoint(folder: RunFolder, state: dict[str, Any]) -> None:
    """Make `state` the run's checkpoint; the one before it is kept, and both are whole on disk.

    Keys of `state`: made_with (see there), model, optimiser (state_dicts) and history. Raises StudyError when it cannot
    be written, on a full disk for one; the checkpoint of before then still stands.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(folder.checkpoint, buffer.getbuffer(), keep=folder.previous)


def load_checkpoint(
    folder: RunFolder, expected: dict[str, Any], device: torch.device, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The run's last checkpoint, or the one before where that is damaged (which `log` is told); None if there is none.

    Raises StudyError when each one is damaged, and for one that was not made with what is `expected` (see `made_with`):
    neither is trained on, and neither is silently thrown away.
    """
    damage = []
    for path in (folder.checkpoint, folder.previous):
        if not path.exists():
            continue
        try:
            state = _read_checkpoint(path, device)
        except _Damaged as error:
            damage.append(f"checkpoint {path} is damaged ({error})")
            continue
        if keys := differing_keys(state["made_with"], expected):
            raise StudyError(
                f"checkpoint {path} was made with another {', '.join(keys)}, and a run of two kinds is no result; undo "
                f"the change, or remove {_names(folder)} to train from the start"
            )
        if damage:
            log(f"{damage[0]}; going on from the one before it, {path.name}")
        return state
    if damage:
        raise StudyError(f"{' and '.join(damage)}; remove {_names(folder)} to train from the start")
    return None


def remove_checkpoints(folder: RunFolder) -> None:
    """Remove both checkpoints, the older one first: a run killed in between goes on from the newer."""
    folder.previous.unlink(missing_ok=True)
    folder.checkpoint.unlink(missing_ok=True)


class _Damaged(Exception):
    """A file is no whole checkpoint; the text says what is wrong with it."""


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # which is what torch.save writes, without looking at its check sums
            if broken := archive.testzip():
                raise _Damaged(f"{broken} in it has another check sum")
        state = torch.load(path, map_location=device, weights_only=True)
    # A turned bit can meet a length, a name (UnicodeDecodeError) or a method (NotImplementedError, a RuntimeError).
    except (
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise _Damaged(str(error).partition("\n")[0]) from None
    if not isinstance(state, dict) or state.keys() != _CHECKPOINT_KEYS:
        raise _Damaged("it is no checkpoint of this version of the study")
    return state


def _names(folder: RunFolder) -> str:
    found = [path for path in (folder.checkpoint, folder.previous) if path.exists()]
    return " and ".join(map(str, found))


@contextlib.contextmanager
def sigterm_heeded() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM has come, which ends the process only when it comes again later.

    Batch schedulers send it some time before they kill, to every process of a job, and a notebook's runner passes it
    on: within two seconds it is the same notice. Outside the main thread, where no signal can be caught, it ends the
    process as ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[float] = []

    def note(number: int, _frame: object) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > SAME_NOTICE:
            signal.signal(number, before)
            signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, note) or signal.SIG_DFL  # None: a handler that is not Python's
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def differing_keys(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two JSON values differ, sorted."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        return [
            key
            for name in names
            for key in differing_keys(left.get(name), right.get(name), f"{prefix}.{name}".lstrip("."))
        ]
    return [] if left == right else [prefix]
