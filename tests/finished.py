"""A finished study made by code: packed stores, training records and test features, without training."""

import json
from pathlib import Path

import numpy as np
from records import record
from stores import make_store

from danet_study.store import PackedStore

ROOT = Path(__file__).resolve().parent.parent
GAPS = {"baseline": 1.5, "b_cc": 0.8, "b_ml": 1.1, "b_ml_cc": 0.5}  # shift between the modalities
RUNS = (
    *("synth_sysu-1-baseline-0", "synth_sysu-1-b_cc-0", "synth_sysu-1-b_ml_cc-0"),
    *("synth_regdb-2-baseline-0", "synth_regdb-10-baseline-0", "synth_regdb-10-b_ml_cc-0", "synth_regdb-10-b_ml_cc-1"),
)


def training_record(run, data_sha256="0" * 64, epochs=14):
    """A run's record.json."""
    made = record(run)
    history = []
    for epoch in range(1, epochs + 1):
        terms = {term: round((2 + i) * 0.8**epoch, 6) for i, term in enumerate(made["config"]["losses"])}
        lr = 0.002 * 0.1 ** ((epoch > 8) + (epoch > 12))
        row = {"epoch": epoch, "lr": lr, **terms, "total": sum(terms.values()), "images_per_s": 200.0, "seconds": 20.0}
        history.append(row)
    known = {key: made[key] for key in ("run", "dataset", "trial", "variant", "seed", "config", "versions")}
    return {**known, "history": history, "provenance": {**made["provenance"], "data_sha256": data_sha256}}


def write_finished(root, dim=16, runs=RUNS, **store):
    """A project below `root`; an identity is a direction, a modality a shift. `store`: arguments of make_store."""
    root = Path(root)
    for run in runs:
        dataset, trial, variant, seed = run.rsplit("-", 3)
        packed = root / "data/packed" / dataset
        if not packed.exists():
            make_store(packed, "regdb" if "regdb" in dataset else "sysu_mm01", **store)
        found = PackedStore.open(packed)
        rows = found.rows("test")
        rng = np.random.default_rng([len(variant), int(trial), int(seed)])
        feat = 2 * rng.normal(size=(found.pids.max() + 1, dim))[found.pids[rows]]
        feat += rng.normal(size=feat.shape) + GAPS[variant] * np.outer(found.modalities[rows], rng.normal(size=dim))
        scaled = ((feat - feat.mean(0)) / feat.std(0)).astype(np.float32)  # as a BN neck does
        folder = root / "runs" / run
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(training_record(run, found.meta["content_sha256"])))
        arrays = {name: getattr(found, name)[rows] for name in ("pids", "camids", "modalities")}
        np.savez(folder / "features.npz", rows=rows, feat=feat.astype(np.float32), feat_bn=scaled, **arrays)
    return root


def run_notebook(name, **parameters):
    """Execute a notebook's code cells in the current folder; returns its variables."""
    values = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
            if "parameters" in cell["metadata"].get("tags", []):
                assert parameters.keys() <= values.keys()
                values |= parameters
    return values
