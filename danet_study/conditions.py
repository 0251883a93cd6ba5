"""The ablation under several conditions, each a data set of params.yaml: `make gaps` and `make learning-rate`.

python -m danet_study.conditions PARAMS FOLDER     writes table.md and differences.csv from FOLDER/records
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from danet_study.config import RunConfig, load_study
from danet_study.files import StudyError, atomic_write_text
from danet_study.results import METRICS, Record, Results, differences, load_results, score
from danet_study.tables import effect_texts, mean_text, section, to_csv

NOTES = {  # by the folder's name
    "gaps": "near_infrared_follows was changed to 0.6 after test scores had been seen.",
    "learning_rate": "A check that chose nothing. Own best lr: that of a variant's highest mean mAP. "
    "It is chosen by the scores that are compared, so the p values there are too small.",
}


def own_best(parts: list[Results]) -> Results:
    """Each variant in the condition where its mAP is highest, as if all had the recipe of the first."""
    found = parts[0]
    configs: dict[str, RunConfig] = {}
    records: dict[str, Record] = {}
    recipe = next(iter(found.configs.values())).recipe
    for name in found.variants:
        means = [score(part, name, part.protocol.ablation, "mAP") for part in parts]
        _, best = max(zip(means, parts, strict=True), key=lambda pair: pair[0].value if pair[0] else -1)
        configs |= {k: c.model_copy(update={"recipe": recipe}) for k, c in best.configs.items() if c.variant == name}
        records |= {run: record for run, record in best.records.items() if record["variant"] == name}
    return replace(found, configs=configs, records=records)


def write_conditions(params: Path, folder: Path) -> list[Path]:
    """Write `folder`/table.md (scores, then gains in Rank-1 and mAP) and differences.csv; the paths."""
    study = load_study(params)
    loaded = [load_results(study, name, folder) for name in study.plan.datasets]
    parts = {part.dataset.title: part for part in loaded}
    if len({str(part.dataset.recipe) for part in loaded}) > 1:
        parts["own best lr"] = own_best(loaded)
    setting = loaded[0].protocol.ablation
    columns = {title: (setting, metric) for metric, title in METRICS.items()}
    columns |= {f"{side} only": (f"within_{side.lower()}", "cmc1") for side in ("Visible", "Infrared")}
    columns["Chance"] = (setting, "chance_rank1")
    scores, gains = [], []
    for condition, part in parts.items():
        for name, label in part.variants.items():
            cells = {title: mean_text(score(part, name, *where)) for title, where in columns.items()}
            scores.append({"Condition": condition, "Variant": label, **cells, "n": len(part.seeds(name))})
        gains.append(differences(part).assign(condition=condition))
    notes = [NOTES.get(folder.name, ""), *loaded[0].notes]
    caption = (
        "Scores in percent, mean ± half of the 95 % t interval over n seeds. "
        "Visible only, infrared only: Rank-1 of retrieval within one modality. Chance: Rank-1."
    )
    texts = [section(caption, pd.DataFrame(scores), notes)]
    for title in METRICS.values():
        rows = [
            {"Contrast": contrast, "Condition": row["condition"], **effect_texts(row)}
            for contrast, lines in pd.concat(gains).query("metric == @title").groupby("contrast", sort=False)
            for row in lines.to_dict("records")
        ]
        caption = f"Differences in {title}, in points, with 95 % t intervals over n seeds. Holm: within a condition."
        texts.append(section(caption, pd.DataFrame(rows), notes))
    atomic_write_text(folder / "table.md", "\n".join(texts))
    atomic_write_text(folder / "differences.csv", to_csv(pd.concat(gains)))
    return [folder / "table.md", folder / "differences.csv"]


if __name__ == "__main__":
    try:
        print(*write_conditions(Path(sys.argv[1]), Path(sys.argv[2])))
    except StudyError as error:
        sys.exit(f"conditions: {error}")
