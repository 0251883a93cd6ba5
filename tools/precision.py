"""What the precision of training costs: the Baseline of the tuning data set in each precision that the device has.

`python -m tools.precision` writes results/precision/<dataset>-<cpu or cuda>.csv: final loss, scores and speed for each
precision and seed of `tuning` in params.yaml. Scores are of the validation identities, because a choice may follow from
them; test identities are never read. Evaluation is in float32 throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from danet_core.config import RunConfig, Study, load_study
from danet_core.files import atomic_path, read_json
from danet_core.parameters import Precision
from danet_core.precision import lacks
from danet_core.repro import resolve_device
from tools import ROOT
from tools.command import command
from tools.tune import folder_of, score


def candidates(study: Study, device: torch.device) -> list[RunConfig]:
    """Baseline runs of the tuning data set, one for each precision that the device computes in and each seed."""
    runs = []
    for precision in typing.get_args(Precision):
        if lacks(precision, device) or (precision, device.type) == ("float16", "cpu"):  # emulated, 20 times slower
            continue
        for seed in study.tuning.seeds:
            config = study.run(study.tuning.dataset, "baseline", 1, seed)
            recipe = dataclasses.replace(config.dataset.recipe, precision=precision)
            runs.append(dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, recipe=recipe)))
    return runs


def measure(config: RunConfig, build: Path) -> dict[str, Any]:
    """One row of the table: train the run (or take it up where it was), score it, and read its speed off its record."""
    scores = score(config, build)
    record = read_json(folder_of(config, build).record)
    return {
        "precision": config.dataset.recipe.precision,
        "seed": config.seed,
        **scores,
        "images_per_s": statistics.median(row["images_per_s"] for row in record["history"]),
        "device": record["versions"]["device"]["name"],
        "torch": record["versions"]["libraries"]["torch"],
    }


@command("tools.precision")
def main(arguments: Sequence[str] = (), root: Path = ROOT) -> int:
    """Command line; returns the exit status. The table is written when all of its rows are there."""
    argparse.ArgumentParser(prog="python -m tools.precision", description=__doc__).parse_args(arguments)
    with contextlib.chdir(root):
        study, device = load_study(), resolve_device("auto")
        rows: list[dict[str, Any]] = []
        for config in candidates(study, device):
            rows.append(measure(config, Path("build/precision") / device.type))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        with atomic_path(Path("results/precision") / f"{study.tuning.dataset}-{device.type}.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
