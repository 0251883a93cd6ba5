"""`make repro` by stage, from the durations that papermill left in the executed notebooks."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.measure import Times, main, page, table
from danet_core.files import read_json
from tools import ROOT

STAGES = ("train", "evaluate", "tables", "figures")


def durations(folder: Path) -> dict[str, list[float]]:
    """Seconds of each executed notebook by its stage, of which the file name begins with the name."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*.ipynb")):
        seconds = read_json(path)["metadata"].get("papermill", {}).get("duration")
        stage = path.name.partition("-")[0]
        if stage in STAGES and seconds is not None:
            found[stage].append(float(seconds))
    return found


def section(tiny: bool, folder: Path = ROOT / "build/executed") -> str:
    del tiny  # it only reads what is there
    found = durations(folder)
    rows = [
        (stage, len(found[stage]), Times(np.array(found[stage])), f"{sum(found[stage]):.0f} s")
        if stage in found
        else (stage, 0, "not run", "not run")
        for stage in STAGES
    ]
    return page(
        "## `make repro` by stage",
        """As the last `make repro` on this machine took, notebook by notebook, kernel included. Rendering and packing
        leave no record; their rates stand above.""",
        table(("stage", "notebooks", "each", "together"), rows),
    )


if __name__ == "__main__":
    main(section)
