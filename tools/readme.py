"""Rewrite the generated sections of the pages from `results/`; their prose is left alone.

    python -m tools.readme                README.md, the pipeline's last stage
    python -m tools.readme --readings     docs/READINGS.md

They show the embedded benchmark, which everybody can run, as its tables stand in `results/` whatever params.yaml lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from danet_core.files import StudyError, atomic_write_text
from danet_core.findings import insert_block, readme_block
from tools import ROOT
from tools.command import command

DATASETS = ("synth_sysu", "synth_regdb")


def readings_block(root: Path) -> str:
    """The table of docs/READINGS.md."""
    from danet_core.readings import page_block  # brings matplotlib, for which `make repro` would wait at README.md

    return page_block(DATASETS[0], root)


PAGES = {"README.md": lambda root: readme_block(DATASETS, root), "docs/READINGS.md": readings_block}


def update(root: Path, name: str = "README.md") -> bool:
    """Bring a page of PAGES in the project in `root` up to date; whether it had to be changed. Prose is left alone.

    Raises StudyError when the page, one of its marks or a table that it cannot do without is missing.
    """
    path = root / name
    try:
        old = path.read_bytes().decode("utf-8")  # not read_text, which would turn the line ends of the prose into \n
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; restore it from version control") from None
    new = insert_block(old, PAGES[name](root), name)
    if new == old:
        return False
    atomic_write_text(path, new)
    return True


@command("tools.readme")
def main(root: Path = ROOT, arguments: Sequence[str] = ()) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.readme", description="Rewrite a page's generated section.")
    parser.add_argument("--readings", action="store_true", help="docs/READINGS.md instead of README.md")
    name = "docs/READINGS.md" if parser.parse_args(arguments).readings else "README.md"
    changed = update(root, name)
    print(f"{name}: results rewritten" if changed else f"{name}: results are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(arguments=sys.argv[1:]))
