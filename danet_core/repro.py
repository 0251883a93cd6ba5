"""Seeds, determinism and the stamps that say where a result comes from."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from danet_core.files import StudyError

LIBRARIES = ("torch", "torchvision", "numpy", "pandas", "pillow", "safetensors")


def derived_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose in one epoch.

    Every random number of a run comes from a generator seeded here, afresh for each epoch, so that a run resumed at an
    epoch's start needs no generator state and draws what the uninterrupted run drew.
    """
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


@contextlib.contextmanager
def deterministic(seed: int, *, tf32: bool = False) -> Iterator[None]:
    """Deterministic algorithms and a seeded global torch generator; the caller's settings come back after the block.

    The global generator only initialises layers; training draws from generators of its own. Without `tf32` float32 is
    float32 on a GPU too, where torch would round the products of convolutions to TF32.

    New memory is not filled first, as torch does for whoever looks for code that reads what nothing wrote: it costs a
    pass over each new tensor.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    rounding = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch_checks = torch.utils.deterministic  # its attribute is made at import, where type checkers do not see it
    filled = torch_checks.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        torch_checks.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.set_num_threads(_threads())
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch_checks.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = before[1]
            torch.set_num_threads(before[2])
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = rounding


def _threads() -> int:
    """OMP_NUM_THREADS where it is set, else one thread for each core, but one of four or more is left to the system.

    OpenMP's threads wait for each other by spinning: when another program needs a moment of a core that all of them
    count on, a step takes tens of times as long; with one core to spare it takes a tenth longer and no more.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - 1 if cores >= 4 else cores


def resolve_device(name: str) -> torch.device:
    """`auto` is a CUDA GPU where there is one, else the CPU. Raises StudyError for a CUDA device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"device {name}: no CUDA GPU is usable here; use `auto` or `cpu`")
    return device


def stamp(device: torch.device) -> dict[str, object]:
    """Library versions, device and code version, for a run's record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "libraries": {library: metadata.version(library) for library in LIBRARIES},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "code": _code_version(),
    }


def _code_version() -> str:
    """The commit of the checkout, with `+changes` when files differ from it; `unversioned` in a copy without git.

    What the pipeline itself rewrites is no change of the code.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        written = [f":(exclude){path}" for path in ("dvc.lock", "README.md", "results")]
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return commit + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
