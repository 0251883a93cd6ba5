"""How the embedded recipe was chosen: the Baseline over the grid of params.yaml, scored on validation identities.

`python -m tools.tune` writes results/tuning/<dataset>.csv. Test identities are never read, no other variant is trained;
the chosen numbers are then typed into `recipes.embedded`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from danet_core import INFRARED, VISIBLE
from danet_core.config import RunConfig, Study, load_study
from danet_core.evaluate import extract
from danet_core.files import atomic_path, sha256_json
from danet_core.protocols import evaluate_sysu, within_modality
from danet_core.record import RunFolder, load_finished
from danet_core.store import PackedStore
from danet_core.train import build_model, train
from tools import ROOT
from tools.command import command


def candidates(study: Study) -> list[RunConfig]:
    """Baseline runs of the tuning data set, one for each point of the grid and seed."""
    grid = dataclasses.asdict(study.tuning.grid)
    runs = []
    for values in itertools.product(*grid.values()):
        for seed in study.tuning.seeds:
            config = study.run(study.tuning.dataset, "baseline", 1, seed)
            recipe = dataclasses.replace(config.dataset.recipe, **dict(zip(grid, values, strict=True)))
            runs.append(dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, recipe=recipe)))
    return runs


def folder_of(config: RunConfig, build: Path) -> RunFolder:
    """Where a candidate's run lies: by its configuration, so that a changed number is another run."""
    name = sha256_json(config.resolved())[:16]
    return RunFolder(build / name, build / f"{name}.pt")


def score(config: RunConfig, build: Path = Path("build/tuning")) -> dict[str, Any]:
    """Train one candidate (or take it up where it was) and score it on the validation identities."""
    store = PackedStore.open(Path("data/packed") / config.dataset.name, verify=False)
    folder = folder_of(config, build)
    if not folder.record.exists():
        train(config, folder)
    tensors, record = load_finished(folder, config)
    model = build_model(config.dataset, tensors["classifier.weight"].shape[0], None)
    model.load_state_dict(tensors)
    features = extract(model, store, store.rows("val"), config)
    feat = features.retrieval(config.dataset.recipe.test_feature)
    query, gallery = features.modalities == INFRARED, features.modalities == VISIBLE
    pids, camids, everyone = features.pids, features.camids, np.arange(gallery.sum())[None]
    cross = evaluate_sysu(
        feat[query], pids[query], camids[query], feat[gallery], pids[gallery], camids[gallery], everyone
    )
    within = within_modality(feat[gallery], features.pids[gallery], features.camids[gallery])
    return {
        "final_L_id": record["history"][-1]["L_id"],
        "rank1": cross.mean["cmc1"],
        "mAP": cross.mean["mAP"],
        "visible_rank1": within.mean["cmc1"],
        "queries": int(query.sum()),
        "gallery": int(gallery.sum()),
    }


@command("tools.tune")
def main(arguments: Sequence[str] = (), root: Path = ROOT) -> int:
    """Command line; returns the exit status. The table is written when all of its rows are there."""
    argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__).parse_args(arguments)
    with contextlib.chdir(root):
        study = load_study()
        rows = []
        for config in candidates(study):
            recipe = config.dataset.recipe
            row = (
                {field.name: getattr(recipe, field.name) for field in dataclasses.fields(study.tuning.grid)}
                | {"seed": config.seed}
                | score(config)
            )
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
        with atomic_path(Path("results/tuning") / f"{study.tuning.dataset}.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
