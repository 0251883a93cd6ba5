"""Write the report, one self-contained page of everything the study made: results/report.html.

python -m tools.report                      from what lies in results/ and runs/; --open shows it in a browser
python -m tools.report section synth_sysu   one data set's part, to build/report/ (a stage of the pipeline)
python -m tools.report page                 the page of the parts in build/report/ (the pipeline's last but one)
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from danet_core.config import load_study
from danet_core.durations import timed
from danet_core.files import StudyError, atomic_write_text
from danet_core.page import page, section
from tools import ROOT
from tools.command import command


def write_section(root: Path, dataset: str) -> Path:
    """Write one data set's part of the report; the path written."""
    path = _section_path(root, dataset)
    with timed(f"section-{dataset}", root):
        atomic_write_text(path, section(load_study(root / "params.yaml"), dataset, root))
    return path


def write_page(root: Path) -> Path:
    """Write the report from the parts of all data sets that params.yaml lists; the path written.

    Raises StudyError for a part that is missing.
    """
    study = load_study(root / "params.yaml")
    sections = {}
    for dataset in study.study.datasets:
        path = _section_path(root, dataset)
        if not path.exists():
            raise StudyError(f"{path} is missing; `python -m tools.report section {dataset}` makes it")
        sections[dataset] = path.read_text(encoding="utf-8")
    target = root / "results" / "report.html"
    with timed("report", root):
        atomic_write_text(target, page(study, sections))
    return target


def has_screen() -> bool:
    """Whether a browser that is started here would be seen; one in a terminal would block the command."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@command("tools.report")
def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description="Write results/report.html.")
    parser.add_argument("--open", action="store_true", help="show the page in a browser, where there is a screen")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("section", help="write one data set's part").add_argument("dataset")
    commands.add_parser("page", help="put the parts together")
    given = parser.parse_args(arguments)
    if given.command == "section":
        print(write_section(root, given.dataset).relative_to(root))
        return 0
    if given.command is None:
        for dataset in load_study(root / "params.yaml").study.datasets:
            write_section(root, dataset)
    path = write_page(root)
    print(f"the report: {path.relative_to(root)}")
    if given.open and has_screen():
        webbrowser.open(path.as_uri())
    return 0


def _section_path(root: Path, dataset: str) -> Path:
    return root / "build" / "report" / f"{dataset}.html"


if __name__ == "__main__":
    sys.exit(main())
