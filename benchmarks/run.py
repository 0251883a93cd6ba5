"""Measure what the study claims to be fast: `make bench`, or some parts: python -m benchmarks.run step losses.

All parts together are written to benchmarks/RESULTS.md; some are printed. Each part is a process of its own, because
threads and memory are settled when one starts. A part that fails ends the run, and the page stays as it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from benchmarks.measure import page, table
from danet_core.files import StudyError, atomic_write_text
from danet_core.repro import resolve_device, stamp
from tools import ROOT

PARTS = ("step", "losses", "evaluation", "galleries", "data", "startup", "explorer", "pipeline")
ONE_THREAD = ("losses", "evaluation", "galleries", "data", "startup", "explorer")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# glibc then keeps what is freed, as torch does on a GPU; else small products would be compared with page faults.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def measured(part: str, tiny: bool) -> str:
    """The section that a part prints, from a process of its own. Raises StudyError when it fails."""
    threads = dict.fromkeys(_THREADS, "1") if part in ONE_THREAD else {}
    command = [sys.executable, "-m", f"benchmarks.{part}", *["--tiny"] * tiny]
    environment = {**os.environ, **_MEMORY, **threads}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StudyError(f"benchmark {part} ended with status {done.returncode}; its message stands above")
    return done.stdout.strip()


def processor() -> str:
    """The processor's name, which Linux keeps where `platform` does not look."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(seconds: float) -> str:
    """Hardware, versions and how to read the page."""
    device = resolve_device("auto")
    record = stamp(device)
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "scipy", "pillow")}
    rows = [
        ("processor", f"{processor()}, {os.cpu_count()} logical cores"),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("GPU", stamp(device)["device"]["name"] if device.type == "cuda" else "none"),  # type: ignore[index]
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("code", record["code"]),
        ("load when it ended", f"{psutil.getloadavg()[0]:.1f} processes wanting a core"),
        ("took", f"{seconds / 60:.1f} min"),
    ]
    return page(
        "# Benchmarks",
        """Written by `make bench`. Each figure is a median ± half the distance between the quartiles; what a ratio
        compares was measured in turns in one process, and the ratio is taken turn by turn. A GPU's rows say "not run"
        where there is none. All parts run with glibc told to keep freed memory (MALLOC_MMAP_THRESHOLD_ and
        MALLOC_TRIM_THRESHOLD_), ours and what it is compared with alike; `make repro` and the stages do without.""",
        table(("", ""), rows),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure what is claimed to be fast.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all, into a file")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures mean nothing, for the tests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/RESULTS.md", metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; the parts are {', '.join(PARTS)}")
    started, sections = time.perf_counter(), []
    try:
        for part in options.parts or PARTS:
            print(f"measuring {part}", file=sys.stderr, flush=True)
            sections.append(measured(part, options.tiny))
        if options.parts:
            print("\n\n".join(sections))
        else:
            text = "\n\n".join([header(time.perf_counter() - started), *sections]) + "\n"
            atomic_write_text(options.out, text)
            print(f"{options.out.name} written")
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
