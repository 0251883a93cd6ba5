"""Kills parts of a running study with SIGKILL at random moments:  python -m tools.kill_test [--rounds N] [--seed N]

Each round begins without runs and results, kills a kernel, papermill, DVC, the batch, or all of them, waits until no
process is left, and calls the batch again: models, records and tables must have the bytes of an undisturbed study.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from tools.variation import copy_project, merge

FOLDER = Path("build/kill-test")
STUDY = {"datasets": ["synth_sysu"], "splits": ["synth_sysu-1"], "variants": ["baseline", "b_ml_cc"], "seeds": [0]}
VICTIMS = {"kernel": "ipykernel_launcher", "papermill": "papermill", "dvc": "dvc", "batch": "tools.batch"}
COMPARED = ("runs/*/model.safetensors", "results/records/*.json", "results/*/tables/*")
PATIENCE = 20.0  # seconds for the processes to notice


def batch() -> subprocess.Popen[bytes]:
    """Start the batch in the copy; its output goes to batch.log there."""
    with (FOLDER / "batch.log").open("ab") as log:
        command = [sys.executable, "-m", "tools.batch"]
        return subprocess.Popen(command, cwd=FOLDER, stdout=log, stderr=log)


def processes() -> list[psutil.Process]:
    """All that runs in the copy."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == FOLDER.resolve() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def kill(victim: str) -> bool:
    """Kill one process of this kind, or all processes; returns whether there was one."""
    words = VICTIMS.get(victim, "")
    found = [process for process in processes() if any(words in word for word in process.cmdline())]
    for process in found if victim == "all" else found[:1]:
        process.kill()
    return bool(found)


def clear(*, data: bool) -> None:
    """Remove what the stages have made, with `data` also their data."""
    for part in ("runs", "results/records", "results/synth_sysu", "build", ".dvc/cache", "dvc.lock", *["data"] * data):
        path = FOLDER / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (FOLDER / "data/inventory").mkdir(parents=True, exist_ok=True)


def hashes() -> dict[str, str]:
    """SHA-256 by path of everything that has to be the same."""
    paths = [path for pattern in COMPARED for path in sorted(FOLDER.glob(pattern))]
    return {str(path.relative_to(FOLDER)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def one_round(chance: random.Random, seconds: float, expected: dict[str, str]) -> str:
    """Kill once and finish; returns what happened. Raises RuntimeError if something is left or differs."""
    clear(data=chance.random() < 0.25)
    process, delay, victim = batch(), chance.uniform(1, seconds), chance.choice([*VICTIMS, "all"])
    time.sleep(delay)
    while not kill(victim) and process.poll() is None:
        time.sleep(0.05)
    process.wait()  # the batch finishes the other runs, or is dead
    deadline = time.monotonic() + PATIENCE
    while left := processes():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{victim} killed after {delay:.1f} s: still running: {left}")
        time.sleep(0.2)
    if batch().wait() != 0:
        raise RuntimeError(f"{victim} killed after {delay:.1f} s: the second call failed; see {FOLDER}/batch.log")
    found = hashes()
    if differing := {path for path in expected | found if expected.get(path) != found.get(path)}:
        raise RuntimeError(f"{victim} killed after {delay:.1f} s: other bytes in {', '.join(sorted(differing))}")
    return f"{victim} killed after {delay:.1f} s: same bytes, no process left"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kill_test", description="Kill runs, and compare the results."
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    overrides = YAML(typ="safe").load(Path("studies/demo.yaml"))
    longer = {"epochs": 12, "milestones": [8]}
    merge(overrides, {"study": STUDY, "datasets": {"synth_sysu": {"recipe": longer}}})
    shutil.rmtree(FOLDER, ignore_errors=True)
    copy_project(FOLDER, overrides)
    started = time.monotonic()
    if batch().wait() != 0:
        sys.exit(f"kill_test: the undisturbed study failed; see {FOLDER}/batch.log")
    seconds, expected = time.monotonic() - started, hashes()
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} files", flush=True)
    chance = random.Random(options.seed)
    for number in range(1, options.rounds + 1):
        try:
            print(f"round {number}: {one_round(chance, seconds, expected)}", flush=True)
        except RuntimeError as error:
            sys.exit(f"kill_test: round {number}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
