"""Write what each finished run was made with and what it took: results/<data set>/runs.csv.

    python -m tools.runs                            the data sets that params.yaml lists
    python -m tools.runs synth_regdb_paper_scale    some of them

Card, precision, epochs, seconds, images/s and versions, which training keeps in `runs/`, outside git. `make
paper-scale` ends with it. It is no stage of the pipeline: the seconds differ each time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from danet_core.config import Study, load_study
from danet_core.files import StudyError, atomic_write_text
from danet_core.provenance import runs_table
from danet_core.scores import load_results
from tools import ROOT
from tools.command import command


def write(root: Path, study: Study, datasets: Sequence[str]) -> None:
    """Write the table of each of the data sets, and say so.

    Raises StudyError for data sets without a finished run, when those of the others are written.
    """
    if "paper" not in study.recipes:
        raise StudyError("params.yaml has no recipe `paper`, by whose epochs a shorter run is told; restore it")
    tables = {name: runs_table(load_results(study, name, root), study.recipes["paper"].epochs) for name in datasets}
    for name, table in tables.items():
        if not table.empty:
            path = root / "results" / name / "runs.csv"
            atomic_write_text(path, table.to_csv(index=False, lineterminator="\n"))
            print(f"{path.relative_to(root)} is written; runs in it: {len(table)}")
    if missing := [name for name, table in tables.items() if table.empty]:
        raise StudyError(f"{root / 'runs'} has no finished run of {', '.join(missing)}; `dvc repro` makes those listed")


@command("tools.runs")
def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.runs", description="Write results/<data set>/runs.csv.")
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="default: those that params.yaml lists")
    chosen = parser.parse_args(arguments).datasets
    study = load_study(root / "params.yaml")
    write(root, study, chosen or study.study.datasets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
