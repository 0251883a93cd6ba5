"""Where a run keeps its files: the finished model with its record, and the checkpoint it can be resumed from."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from danet_core.config import RunConfig
from danet_core.files import StudyError, atomic_path, atomic_write_json, read_json, sha256_file, sha256_json


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. `root` holds what is finished, `checkpoint` what is under way."""

    root: Path
    checkpoint: Path

    @classmethod
    def of(cls, config: RunConfig, runs: Path = Path("runs"), build: Path = Path("build")) -> RunFolder:
        return cls(
            runs / config.dataset.name / config.name, build / "checkpoints" / config.dataset.name / f"{config.name}.pt"
        )

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
    with atomic_path(folder.model) as temporary:
        save_file(tensors, temporary, metadata=identity)
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


def save_checkpoint(folder: RunFolder, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint; the previous one stands until the new one is whole on disk."""
    with atomic_path(folder.checkpoint) as temporary:
        torch.save(state, temporary)


def load_checkpoint(folder: RunFolder, expected: str, device: torch.device) -> dict[str, Any] | None:
    """The run's checkpoint, or None where there is none.

    Raises StudyError for a damaged file and for one of another configuration, data set or backbone weights: neither is
    trained on, and neither is silently thrown away.
    """
    path = folder.checkpoint
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise StudyError(f"checkpoint {path} is damaged ({error}); remove it to train from the start") from None
    found = state.get("fingerprint") if isinstance(state, dict) else None
    if found != expected:
        raise StudyError(
            f"checkpoint {path} belongs to another configuration, data or backbone weights "
            f"(expected fingerprint {expected[:12]}, found {str(found)[:12]}); remove it to train from the start"
        )
    return state


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
