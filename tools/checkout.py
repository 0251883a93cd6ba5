"""Prepare this copy of the project; `make` does it at each call, conda users call it once: `python -m tools.checkout`.

A clone gets the git filter that keeps outputs out of committed notebooks. A copy without git (a zip download) gets
DVC's `core.no_scm`, without which DVC refuses to work there; it goes into `.dvc/config.local`, which git ignores. What
a killed DVC locked is unlocked.
"""

from __future__ import annotations

import configparser
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from danet_core.files import atomic_write_text
from tools import ROOT
from tools.command import command

NBSTRIPOUT = "-m nbstripout --keep-id --extra-keys 'metadata.language_info cell.metadata.execution'"


def has_git(root: Path) -> bool:
    """Whether `root` lies in a git work tree, as DVC looks for it: here or in any folder above."""
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def set_no_scm(root: Path) -> None:
    """Make `.dvc/config.local` say `no_scm` exactly when there is no git; other settings in it are kept."""
    path = root / ".dvc" / "config.local"
    config = configparser.ConfigParser(interpolation=None)
    if path.exists():
        config.read(path, encoding="utf-8")
    if config.has_option("core", "no_scm") != has_git(root):
        return
    if has_git(root):  # `git init` or `git clone` happened after the first set-up
        config.remove_option("core", "no_scm")
    else:
        if not config.has_section("core"):
            config.add_section("core")
        config.set("core", "no_scm", "true")
    text = io.StringIO()
    config.write(text)
    atomic_write_text(path, text.getvalue().strip() + "\n")


def filter_settings(python: str) -> dict[str, str]:
    """Git settings of the notebook filter. Where the interpreter has gone, files pass through unchanged."""
    quoted = f'"{python}"'
    return {
        "filter.nbstripout.clean": f"if test -x {quoted}; then {quoted} {NBSTRIPOUT}; else cat; fi",
        "filter.nbstripout.smudge": "cat",
        "filter.nbstripout.required": "false",
        "diff.ipynb.textconv": f'f() {{ {quoted} {NBSTRIPOUT} -t "$1" 2>/dev/null || cat "$1"; }}; f',
    }


def set_filter(root: Path) -> None:
    """Configure the notebook filter for this clone, once; does nothing without git or where git refuses."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return
    python = Path(sys.executable).as_posix()
    for key, value in filter_settings(python).items():
        command = ["git", "-C", os.fspath(root), "config", "--local"]
        found = subprocess.run([*command, "--get", key], capture_output=True, text=True, check=False)
        if found.returncode > 1:
            return
        if found.stdout.rstrip("\n") != value:
            subprocess.run([*command, key, value], capture_output=True, check=False)


def unlock(root: Path) -> None:
    """Remove DVC's list of locked paths when no DVC that it names is running, or when a kill left it half-written.

    DVC itself passes over a process that has gone, but not over a half-written list, nor over another program that has
    the number of a killed DVC by now, as happens in containers.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        owners = [*held.get("write", {}).values(), *itertools.chain(*held.get("read", {}).values())]
        in_use = any(_runs_dvc(owner["pid"]) for owner in owners)
    except (ValueError, AttributeError, TypeError, KeyError):
        in_use = False
    if not in_use:
        path.unlink(missing_ok=True)


def _runs_dvc(pid: int) -> bool:
    import psutil

    try:
        return any("dvc" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


@command("tools.checkout")
def main(root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    set_no_scm(root)
    set_filter(root)
    unlock(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
