"""`make repro` by stage, from the durations that papermill left in the study's executed notebooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.measure import Times, main, page, table
from danet_core.config import Study, load_study
from danet_core.files import read_json
from tools import ROOT


def notebooks(study: Study) -> dict[str, list[str]]:
    """The executed notebooks of the study in params.yaml by stage, as dvc.yaml names them; others may lie there too."""
    chosen = study.study
    runs = [
        f"{name}-{study.run(name, variant, trial, seed).name}"
        for name in chosen.datasets
        for trial in ((1,) if name in chosen.sysu else chosen.trials)
        for variant in chosen.variants
        for seed in chosen.seeds
    ]
    stages = {"train": runs, "evaluate": runs, "tables": chosen.datasets, "figures": chosen.datasets}
    return {stage: [f"{stage}-{name}.ipynb" for name in names] for stage, names in stages.items()}


def durations(paths: list[Path]) -> list[float]:
    """Seconds of those notebooks that are there and were executed to the end."""
    seconds = [read_json(path)["metadata"].get("papermill", {}).get("duration") for path in paths if path.exists()]
    return [float(value) for value in seconds if value is not None]


def section(tiny: bool, folder: Path = ROOT / "build/executed") -> str:
    del tiny  # it only reads what is there
    rows: list[tuple[object, ...]] = []
    for stage, names in notebooks(load_study(ROOT / "params.yaml")).items():
        found = durations([folder / name for name in names])
        took = (Times(np.array(found)), f"{sum(found):.0f} s") if found else ("not run", "not run")
        rows.append((stage, f"{len(found)} of {len(names)}", *took))
    return page(
        "## `make repro` by stage",
        """As each notebook of the study in params.yaml took when it was last run on this machine, kernel included. The
        stages that are no notebook leave no record and are left out, above all prepare (rendering) and pack, whose
        rates stand above, weights (the pretraining of the stand-in) and the report's.""",
        table(("stage", "notebooks", "each", "together"), rows),
    )


if __name__ == "__main__":
    main(section)
