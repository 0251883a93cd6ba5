"""The sensitivity study: how far each choice that the paper leaves open moves Rank-1 and mAP.

Scores are of test identities: they tell what matters, and nothing is chosen by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from danet_study.config import RunConfig, Study
from danet_study.files import atomic_path, atomic_write_text
from danet_study.results import (
    METRICS,
    NOT_RUN,
    SYNTHETIC,
    Results,
    adjust,
    estimate,
    load_records,
    score,
)
from danet_study.tables import classifiers_section, effect_texts, score_rows, section, to_csv

RULE = (
    "Difference: row less the one it is compared with, with a 95 % t interval over n seeds, variance pooled over all "
    "trainings. A row that only changes the test is paired by seed, because it scores the same weights. Holm, BH: p "
    "adjusted for the number of rows (Holm-Bonferroni, Benjamini-Hochberg). Detectable: found with 80 % power. "
    "Verdict: by Holm's p at 0.05."
)


def load_sensitivity(study: Study, results_dir: Path | str = "results") -> Results:
    """The records of the sensitivity study's runs that exist; only a damaged one raises StudyError.

    A changed parameter leaves old records of rows that `make repro` does not train: they count as not run.
    """
    plan, own = study.sensitivity, {run.name for run in study.runs()}
    configs = [study.run(plan.split, row, seed) for row in plan.run for seed in plan.seeds]
    own_first = sorted(configs, key=lambda config: config.name not in own)  # the others must fit to these
    records = load_records(own_first, Path(results_dir) / "records", skip_stale=True)
    return Results(configs[0].dataset, {config.name: config for config in configs}, records, study.bootstrap)


def sensitivity_table(study: Study, results: Results) -> pd.DataFrame:
    """A line per row and score, in percent and points; what was not run is NaN and says so in `verdict`.

    Columns: group, row, label, against, metric, test, mean, sd, difference, low, high, n, df, p, holm, bh, detectable,
    verdict, final_L_id.
    """
    configs = {config.variant: config for config in results.configs.values()}
    setting, lines = results.protocol.ablation, []
    for metric, title in METRICS.items():
        points = {
            name: dict(zip(results.seeds(name), [100 * x for x in results.values(name, setting, metric)], strict=True))
            for name in configs
        }
        for name, row in study.sensitivity.rows.items():
            line: dict[str, Any] = {"group": row.group, "row": name, "label": row.label, "against": row.against}
            line |= {"metric": title, "test": "pooled", "verdict": NOT_RUN, "n": len(results.seeds(name))}
            if own := score(results, name, setting, metric):
                line |= {"mean": own.value, "sd": own.sd}
            if loss := score(results, name, "training", "L_id"):
                line["final_L_id"] = loss.value
            ours, theirs = points[name], points[row.against]
            if same_weights(configs[name], configs[row.against]):
                line["test"] = "paired"
                one = estimate([[ours[seed] - theirs[seed] for seed in ours if seed in theirs]])
            else:
                pool = trained_apart([configs[each] for each in (name, row.against, *filter(points.get, points))])
                groups = [[*points[config.variant].values()] for config in pool]
                one = estimate(groups, [1, -1, *[0] * (len(pool) - 2)])
            if one:
                line |= one.row("raises", "lowers")
            lines.append(line)
    order = (
        "group row label against metric test mean sd difference low high n df p holm bh detectable verdict final_L_id"
    )
    table = adjust(pd.DataFrame(lines, columns=order.split()))
    for _, rows in table[table["p"].notna()].groupby("metric"):
        table.loc[rows.index, "bh"] = stats.false_discovery_control(rows["p"].to_numpy(float))
    return table


def trained_apart(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Without the rows that score the weights of an earlier one: they are no further training."""
    found: list[RunConfig] = []
    for config in configs:
        if not any(same_weights(config, other) for other in found):
            found.append(config)
    return found


def same_weights(a: RunConfig, b: RunConfig) -> bool:
    """Whether two rows train alike and differ in how they are tested only."""
    one, other = (config.model.model_copy(update={"test_feature": "after_bn"}) for config in (a, b))
    return (a.losses, a.recipe, one) == (b.losses, b.recipe, other)


def markdown(study: Study, results: Results) -> str:
    """The table as GitHub Markdown: the rows that others are compared with, then all rows by score."""
    setting, table = results.protocol.ablation, sensitivity_table(study, results)
    # Notes on the protocol are those of the rows that others are compared with: a row may be about the protocol itself.
    compared = replace(
        results,
        configs={run: config for run, config in results.configs.items() if config.variant in set(table["against"])},
        records={run: record for run, record in results.records.items() if record["variant"] in set(table["against"])},
    )
    columns = {title: (setting, metric) for metric, title in METRICS.items()} | {"Final L_id": ("training", "L_id")}
    words = f"{results.title}, {results.protocol.settings[setting]}"
    caption = f"**Compared with** ({words}): percent, mean ± half of the 95 % t interval; final L_id in nats."
    parts = [section(caption, pd.DataFrame(score_rows(compared, columns)))]
    for title, rows in table.groupby("metric", sort=False):
        grid = rows[["group", "label"]].set_axis(["Group", "Row"], axis=1)
        grid["Against"] = [study.rows[name].label for name in rows["against"]]
        grid["Mean"] = ["–" if pd.isna(mean) else f"{mean:.2f}" for mean in rows["mean"]]
        grid = grid.join(pd.DataFrame(map(effect_texts, rows.to_dict("records")), grid.index))
        parts.append(section(f"**{title}** ({words}): one choice at a time.", grid))
    parts.append(classifiers_section(results))
    made = f"{len(results.records)} of {len(results.configs)} runs have a record of these parameters."
    return "\n".join([*parts, f"<sub>{' '.join([RULE, *compared.notes, made])}</sub>"]) + "\n"


def forest(study: Study, results: Results) -> Figure:
    """Differences with 95 % intervals, in points, a panel per score; a mark is filled if Holm's p is at most 0.05."""
    table = sensitivity_table(study, results)
    labels: list[str] = []
    heights: dict[str, int] = {}
    for group, rows in table.drop_duplicates("row").groupby("group", sort=False):
        labels.append(str(group))
        heights |= {row: len(labels) + i for i, row in enumerate(rows["row"])}
        labels += list(rows["label"])
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(labels)), layout="constrained")
    axes: Any = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, rows) in zip(axes, table.groupby("metric", sort=False), strict=True):
        y, run = rows["row"].map(heights), rows["difference"].notna()
        axis.hlines(y, rows["low"], rows["high"], color="#4D4D4D", linewidth=1)
        faces = np.where(rows["verdict"].isin(["raises", "lowers"]), "#0072B2", "white")
        axis.scatter(rows["difference"][run], y[run], s=20, c=faces[run], edgecolors="#0072B2", zorder=2)
        for height in y[~run]:
            axis.text(0, height, f" {NOT_RUN}", fontsize=7, verticalalignment="center")
        axis.axvline(0, color="#4D4D4D", linewidth=0.8)
        axis.set_xlabel(f"{metric}, difference in points")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    for height in set(range(len(labels))) - set(heights.values()):
        axes[0].get_yticklabels()[height].set_fontweight("bold")
    note = f"\n{SYNTHETIC}" if results.dataset.synthetic else ""
    figure.suptitle(f"Open choices of the paper on {results.title}; filled: Holm's p at most 0.05{note}", fontsize=10)
    return figure


def write_sensitivity(study: Study, results_dir: Path | str = "results") -> list[Path]:
    """Write table.csv, table.md and forest.png to `<results_dir>/sensitivity`; the paths."""
    results, folder = load_sensitivity(study, results_dir), Path(results_dir) / "sensitivity"
    atomic_write_text(folder / "table.csv", to_csv(sensitivity_table(study, results)))
    atomic_write_text(folder / "table.md", markdown(study, results))
    with atomic_path(folder / "forest.png") as path:
        forest(study, results).savefig(path, dpi=150, metadata={"Software": None})
    return [folder / name for name in ("table.csv", "table.md", "forest.png")]
