"""Prepares a copy of the project that has its environment; `make` calls it each time:  python -m tools.setup

A clone gets the git filter that keeps outputs out of committed notebooks. A copy without git (a zip download) gets
DVC's `core.no_scm`, without which DVC refuses to work there. What a killed DVC locked is unlocked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

NBSTRIPOUT = "--keep-id --extra-keys 'metadata.language_info cell.metadata.execution'"
NO_SCM = "[core]\n    no_scm = true\n"


def set_filter(root: Path) -> None:
    """One program and no shell syntax: DVC's git library starts the filter without a shell."""
    strip = f'"{Path(sys.executable).as_posix()}" -m nbstripout {NBSTRIPOUT}'
    settings = {"filter.nbstripout.clean": strip, "filter.nbstripout.smudge": "cat"}
    for key, value in {**settings, "diff.ipynb.textconv": f"{strip} -t"}.items():
        subprocess.run(["git", "-C", str(root), "config", key, value], check=True, capture_output=True)


def remove_stale_lock(path: Path = Path(".dvc/tmp/rwlock")) -> None:
    """Remove DVC's list of files in use if no DVC that it names is running.

    DVC itself refuses a list that a kill has left half-written, or that names a process id given to another program.
    """
    try:
        held = json.loads(path.read_text())
        owners = [*held.get("write", {}).values(), *(one for all in held.get("read", {}).values() for one in all)]
        running = [psutil.Process(owner["pid"]) for owner in owners if psutil.pid_exists(owner["pid"])]
        if any("dvc" in " ".join(process.cmdline()) for process in running):
            return
    except FileNotFoundError:
        return
    except (ValueError, psutil.Error):
        pass
    path.unlink(missing_ok=True)


def main(root: Path = Path()) -> None:
    """All three steps."""
    if (root / ".git").exists():
        try:
            set_filter(root)
        except (OSError, subprocess.CalledProcessError):  # no git here, or a clone of another user
            print("setup: git refuses this folder: `git status`. Do not commit notebooks from here", file=sys.stderr)
    elif not any((folder / ".git").exists() for folder in root.resolve().parents):
        (root / ".dvc/config.local").write_text(NO_SCM, encoding="utf-8")
    remove_stale_lock(root / ".dvc/tmp/rwlock")


if __name__ == "__main__":
    main()
