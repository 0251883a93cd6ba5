"""What each finished run was made with and what it took, as a table to commit: the runs' records stay out of git.

No torch: everything stands in the records.
"""

from __future__ import annotations

import statistics

import pandas as pd

from danet_core.scores import Record, Results, load_training


def runs_table(results: Results, full_epochs: int) -> pd.DataFrame:
    """One line per listed run that is trained on this machine, in table order; none where there is none.

    full_epochs: the paper's, before a variant's factor; a run of fewer is labelled "N of M epochs".
    `train_seconds` is the sum over all epochs, those before an interruption too, without start-up and checkpoints;
    `images_per_s` their median, of all `processes` together. Device and versions are those that finished the run.
    """
    return pd.DataFrame([_line(results, record, full_epochs) for record in load_training(results)])


def _line(results: Results, record: Record, full_epochs: int) -> dict[str, object]:
    history, recipe, versions = record["history"], record["config"]["dataset"]["recipe"], record["versions"]
    full = full_epochs * record["config"]["variant"]["epochs_factor"]
    return {
        "dataset": results.dataset,
        "synthetic": str(results.synthetic).lower(),
        **{key: record[key] for key in ("variant", "label", "trial", "seed")},
        "device": versions["device"]["name"],
        "processes": ", ".join(map(str, record["provenance"].get("processes", [1]))),
        "precision": recipe["precision"],
        "epochs": f"{len(history)} of {full} epochs" if len(history) < full else str(len(history)),
        "steps": len(history) * recipe["steps_per_epoch"],
        "batch_size": 2 * recipe["ids_per_batch"] * recipe["imgs_per_modality"],
        "train_seconds": f"{sum(row['seconds'] for row in history):.1f}",
        "images_per_s": f"{statistics.median(row['images_per_s'] for row in history):.1f}",
        "final_L_id": f"{history[-1]['L_id']:.4f}",
        "model_sha256": record["provenance"]["model_sha256"],
        "code": versions["code"],
        "python": versions["python"],
        **versions["libraries"],
    }
