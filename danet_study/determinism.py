"""Seeds, deterministic algorithms, precision, and the versions that a record names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danet_study.files import StudyError

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "torchvision", "numpy", "pandas", "pillow", "safetensors")
TRAINING_CODE = (  # the files that a run's weights depend on
    *("danet_core/__init__.py", "danet_core/backbone.py", "danet_core/model.py", "danet_core/losses.py"),
    *("danet_study/data.py", "danet_study/determinism.py", "danet_study/train.py"),
)
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def derived_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose in one epoch, so that a resumed run draws what an uninterrupted one draws."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


@contextlib.contextmanager
def deterministic(seed: int, *, tf32: bool = False) -> Iterator[None]:
    """Deterministic algorithms, one CPU thread and a seeded torch generator; restores the settings afterwards.

    One thread: results then do not depend on the number of cores, and several runs share a machine without
    busy waiting. The torch generator only initializes layers; training draws from its own generators.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    algorithms, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    benchmark, rounding = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    products = torch.backends.cuda.matmul.allow_tf32
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):  # without `devices` it would initialize every GPU
        torch.default_generator.manual_seed(seed)
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True) imports torch.compile: 5 s
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a slow debugging aid
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(algorithms)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = benchmark
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = rounding, products
            torch.set_num_threads(threads)


def resolve_device(name: str, precision: str = "float32") -> torch.device:
    """`auto` is a CUDA GPU where there is one, else the CPU.

    Raises StudyError if the device is absent or lacks the precision.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise StudyError(f"device {name!r} is unknown; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StudyError(f"device {name}: no such CUDA GPU is usable; use auto or cpu")
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not ampere and (precision == "tf32" or (precision == "bfloat16" and device.type == "cuda")):
        raise StudyError(f"recipe.precision {precision} needs a GPU of compute capability 8.0; use float32 or float16")
    return device


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of the forward pass; weights, pooled features, classifiers and losses stay float32."""
    return torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


def code_sha256() -> str:
    """SHA-256 of all files of TRAINING_CODE."""
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in TRAINING_CODE)).hexdigest()


def versions(device: torch.device) -> dict[str, Any]:
    """Versions of Python, libraries and code, and the device, for a run's record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "libraries": {library: metadata.version(library) for library in LIBRARIES},
        "device": {"type": device.type, "name": name},
        "commit": _commit(),
        "training_code_sha256": code_sha256(),
    }


def _commit() -> str:
    """The commit of this project's repository, `+changes` if files differ from it; "" without such a repository.

    A copy below the project (build/published) counts as long as its training code is the project's.
    """

    def git(folder: Path, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        top = Path(git(ROOT, "rev-parse", "--show-toplevel"))
        if any((top / name).read_bytes() != (ROOT / name).read_bytes() for name in TRAINING_CODE):
            return ""
        changed = git(top, "status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.ipynb", "*.yaml")
        return git(top, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or another repository
        return ""
