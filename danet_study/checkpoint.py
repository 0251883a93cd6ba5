"""Files of a run: its checkpoint while it trains, its model and record when it is finished."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from danet_core.model import DANet
from danet_study.config import RunConfig
from danet_study.files import StudyError, atomic_write_bytes, atomic_write_json, read_json, sha256_file

MODEL, RECORD = "model.safetensors", "record.json"
CHECKPOINTS = Path("build/checkpoints")  # outside runs/, which DVC clears before it trains again


def build_model(resolved: dict[str, Any], n_classes: int, weights: Path | None) -> DANet:
    """The network of a resolved configuration (`RunConfig.resolved`)."""
    recipe = resolved["recipe"]
    options = {key: value for key, value in resolved["model"].items() if key != "test_feature"}
    try:
        model = DANet(n_classes, recipe["backbone"], weights, width=recipe["width"], **options)
    except ValueError as error:
        raise StudyError(str(error)) from None
    return model.to(memory_format=torch.channels_last) if recipe["channels_last"] else model


def save_run(run_dir: Path, model: DANet, record: dict[str, Any]) -> dict[str, Any]:
    """Write model, then record, each whole or not at all. The record names the model's hash and is returned."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"run": json.dumps({"run": record["run"], "config": record["config"]}, sort_keys=True)}  # one entry:
    atomic_write_bytes(run_dir / MODEL, safetensors.torch.save(tensors, metadata))  # several have no fixed order
    provenance = {**record["provenance"], "model_sha256": sha256_file(run_dir / MODEL)}
    record = {**record, "provenance": provenance}
    atomic_write_json(run_dir / RECORD, record)
    return record


def load_run(run_dir: str | Path, config: RunConfig | None = None) -> tuple[DANet, dict[str, Any]]:
    """A finished run's model, in evaluation mode on the CPU, and its training record.

    With `config` the run must have this configuration. Raises StudyError if the run is missing, damaged, or different.
    """
    run_dir = Path(run_dir)
    record = read_json(run_dir / RECORD)
    if config is not None and (keys := differing_keys(record["config"], config.resolved())):
        raise StudyError(f"{run_dir} has another configuration ({', '.join(keys)}); run `dvc repro`")
    path = run_dir / MODEL
    if not path.exists() or sha256_file(path) != record["provenance"]["model_sha256"]:
        raise StudyError(f"{path} is missing or not the recorded model; remove {run_dir} and run `dvc repro`")
    with safe_open(path, "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    model = build_model(record["config"], len(tensors["classifier.weight"]), None)
    model.load_state_dict(tensors)
    return model.eval(), record


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (fingerprint, model, optimizer, scaler, history), whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(path, buffer.getbuffer())


def load_checkpoint(path: Path, fingerprint: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The run's checkpoint, or None if there is none.

    Raises StudyError if it is damaged, or if configuration, data, weights, code or libraries differ: `fingerprint`.
    """
    if not path.exists():
        return None
    remedy = "remove it to train from the start"
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["fingerprint"]
    except (RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError, zipfile.error, pickle.PickleError):
        raise StudyError(f"checkpoint {path} is damaged; {remedy}") from None
    if keys := differing_keys(found, fingerprint):
        raise StudyError(
            f"checkpoint {path} is of another run ({', '.join(keys)} differ); undo the change, or {remedy}"
        )
    return state


def differing_keys(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two JSON values differ, sorted."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        below: Callable[[str], str] = lambda name: f"{prefix}.{name}".lstrip(".")  # noqa: E731
        return [key for name in names for key in differing_keys(left.get(name), right.get(name), below(name))]
    return [] if left == right else [prefix]
