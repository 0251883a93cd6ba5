"""`make repro` by stage, from the durations that its stages left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.measure import Times, main, page, table
from danet_core.config import Study, load_study
from danet_core.durations import duration
from danet_core.files import read_json
from tools import ROOT

STAGES = ("prepare", "pack", "weights", "train", "evaluate", "tables", "figures", "section", "report")
BY_RUN = ("train", "evaluate")  # the report is of all data sets, the others are by data set


def stages(study: Study) -> Mapping[str, list[str]]:
    """What runs for the study in params.yaml, by stage in the order of dvc.yaml; other runs may lie there too."""
    chosen = study.study
    runs = [
        f"{name}-{study.run(name, variant, trial, seed).name}"
        for name in chosen.datasets
        for trial in ((1,) if name in chosen.sysu else chosen.trials)
        for variant in chosen.variants
        for seed in chosen.seeds
    ]
    named = {stage: [f"{stage}-{item}" for item in (runs if stage in BY_RUN else chosen.datasets)] for stage in STAGES}
    return named | {"report": ["report"]}


def seconds(name: str, root: Path) -> float | None:
    """What papermill noted in the executed notebook of that name, or the command itself; None for what never ran."""
    notebook = root / "build/executed" / f"{name}.ipynb"
    if not notebook.exists():
        return duration(name, root)
    found = read_json(notebook)["metadata"].get("papermill", {}).get("duration")
    return None if found is None else float(found)


def section(tiny: bool, root: Path = ROOT) -> str:
    del tiny  # it only reads what is there
    rows: list[tuple[object, ...]] = []
    for stage, names in stages(load_study(ROOT / "params.yaml")).items():
        found = [took for took in (seconds(name, root) for name in names) if took is not None]
        took = (Times(np.array(found)), f"{sum(found):.0f} s") if found else ("not run", "not run")
        rows.append((stage, f"{len(found)} of {len(names)}", *took))
    return page(
        "## `make repro` by stage",
        """As each run of a stage of the study in params.yaml took when it was last made on this machine, a notebook's
        kernel included; one whose results came with the clone, nothing they depend on having changed, was not run.
        Prepare renders, weights is the pretraining of the stand-in, section and report make the page.
        Left out: setting up, DVC's own work and each interpreter's start between the stages, and the two stages that
        only rewrite text (notebooks, readme).""",
        table(("stage", "runs", "each", "together"), rows),
    )


if __name__ == "__main__":
    main(section)
