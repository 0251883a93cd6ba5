"""Rewrite the generated section of README.md from `results/`: `python -m tools.readme`, the pipeline's last stage.

It shows the embedded benchmark, which everybody can run, as its tables stand in `results/` whatever params.yaml lists.
"""

from __future__ import annotations

import sys
from pathlib import Path

from danet_core.files import StudyError, atomic_write_text
from danet_core.findings import insert_block, readme_block
from tools import ROOT

DATASETS = ("synth_sysu", "synth_regdb")


def update(root: Path) -> bool:
    """Bring the README of the project in `root` up to date; whether it had to be changed. Prose is left alone.

    Raises StudyError when the README, one of its marks or a table is missing.
    """
    path = root / "README.md"
    try:
        old = path.read_bytes().decode("utf-8")  # not read_text, which would turn the line ends of the prose into \n
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; restore it from version control") from None
    new = insert_block(old, readme_block(DATASETS, root))
    if new == old:
        return False
    atomic_write_text(path, new)
    return True


def main(root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    try:
        changed = update(root)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("README.md: results rewritten" if changed else "README.md: results are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
