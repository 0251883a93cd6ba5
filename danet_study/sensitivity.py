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
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import stats

from danet_study.config import RunConfig, Study
from danet_study.files import atomic_path, atomic_write_text
from danet_study.results import (
    METRICS,
    NOT_RUN,
    SYNTHETIC,
    Contrast,
    Estimate,
    Results,
    collect,
    effect,
    estimate,
    score,
)
from danet_study.tables import p_text, section, signed, to_csv

LEVEL = 0.05  # of Holm's adjusted p
RULE = (
    "Difference: row less the one it is compared with, with a 95 % t interval over n seeds, variance pooled over all "
    "rows. A row that only changes the test is paired by seed, because it scores the same weights. Holm, BH: p "
    "adjusted for the number of rows (Holm-Bonferroni, Benjamini-Hochberg). Verdict: by Holm's p at 0.05."
)


def load_sensitivity(study: Study, results_dir: Path | str = "results") -> Results:
    """The records of the sensitivity study's runs that exist. Raises StudyError as `results.load_records` does."""
    plan = study.sensitivity
    return collect(study, [study.run(plan.split, row, seed) for row in plan.run for seed in plan.seeds], results_dir)


def sensitivity_table(study: Study, results: Results) -> pd.DataFrame:
    """A line per row and score, in percent and points; what was not run is NaN and says so in `verdict`.

    Columns: group, row, label, against, metric, n, mean, sd, difference, low, high, test, p, holm, bh, verdict,
    final_L_id.
    """
    configs = {config.variant: config for config in results.configs.values()}
    setting, lines = results.protocol.ablation, []
    for metric, title in METRICS.items():
        for name, row in study.sensitivity.rows.items():
            own = score(results, name, setting, metric)
            loss = score(results, name, "training", "L_id", 1.0)
            paired = row.against in configs and same_weights(configs[name], configs[row.against])
            line: dict[str, Any] = {"group": row.group, "row": name, "label": row.label, "against": row.against}
            line |= {"metric": title, "n": len(results.seeds(name)), "test": "paired" if paired else "pooled"}
            line |= {"mean": own.value, "sd": own.sd} if own else {}
            line |= {"final_L_id": loss.value} if loss else {}
            line["verdict"] = NOT_RUN
            contrast = Contrast(name, {name: 1.0, row.against: -1.0})
            one = _paired(results, name, row.against, metric) if paired else effect(results, contrast, metric)
            if one:
                line |= {"n": one.n, "difference": one.value, "low": one.value - one.half, "high": one.value + one.half}
                line |= {"p": one.p, "verdict": one.verdict("raises", "lowers")}
            lines.append(line)
    order = "group row label against metric n mean sd difference low high test p holm bh verdict final_L_id"
    table = pd.DataFrame(lines, columns=order.split())
    for _, rows in table[table["p"].notna()].groupby("metric"):
        p = rows["p"].to_numpy(float)
        table.loc[rows.index, "holm"], table.loc[rows.index, "bh"] = holm(p), stats.false_discovery_control(p)
    table["verdict"] = table["verdict"].mask(table["holm"] > LEVEL, "inconclusive")
    return table


def same_weights(a: RunConfig, b: RunConfig) -> bool:
    """Whether two rows train alike and differ in how they are tested only."""
    one, other = (config.model.model_copy(update={"test_feature": "after_bn"}) for config in (a, b))
    return (a.losses, a.recipe, one) == (b.losses, b.recipe, other)


def _paired(results: Results, row: str, against: str, metric: str) -> Estimate | None:
    """The mean difference of the seeds that both have."""
    setting = results.protocol.ablation
    ours, theirs = (
        dict(zip(results.seeds(name), results.values(name, setting, metric), strict=True)) for name in (row, against)
    )
    return estimate([[100 * (value - theirs[seed]) for seed, value in ours.items() if seed in theirs]])


def holm(p: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Holm-Bonferroni adjusted p values: the k-th smallest of N times N - k + 1, made monotone, at most 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def markdown(study: Study, results: Results) -> str:
    """The table as GitHub Markdown: the rows that others are compared with, then all rows by score."""
    setting, title = results.protocol.ablation, results.dataset.title
    references = dict.fromkeys(row.against for row in study.sensitivity.rows.values())
    grid = [
        {
            "Variant": study.rows[name].label,
            **{metric: _value(score(results, name, setting, key)) for key, metric in METRICS.items()},
            "Final L_id": _value(score(results, name, "training", "L_id", 1.0)),
            "n": str(len(results.seeds(name))),
        }
        for name in references
    ]
    words = f"{title}, {results.protocol.settings[setting]}"
    parts = [section(f"**Compared with** ({words}): mean in percent; final L_id in nats.", pd.DataFrame(grid))]
    table = sensitivity_table(study, results)
    for metric in METRICS.values():
        rows = [_texts(line, study) for line in table[table["metric"] == metric].to_dict("records")]
        parts.append(section(f"**{metric}**: one choice at a time.", pd.DataFrame(rows)))
    # Notes on the protocol are those of the reference rows: a row may be about the protocol itself.
    notes = replace(results, records={k: r for k, r in results.records.items() if r["variant"] in references}).notes
    made = f"{len(results.records)} of {len(results.configs)} runs have a record in results/records."
    return "\n".join([*parts, f"<sub>{' '.join([RULE, *notes, made])}</sub>"]) + "\n"


def _value(one: Estimate | None) -> str:
    return NOT_RUN if one is None else f"{one.value:.2f}"


def _texts(line: dict[Any, Any], study: Study) -> dict[str, str]:
    texts = {"Group": line["group"], "Row": line["label"], "Against": study.rows[line["against"]].label}
    numbers = dict.fromkeys(("Mean", "Difference", "95 % interval", "n", "p", "Holm", "BH"), "–")
    numbers["n"] = str(line["n"])
    if pd.notna(line["mean"]):
        numbers["Mean"] = f"{line['mean']:.2f}"
    if pd.notna(line["difference"]):
        numbers["Difference"] = signed(line["difference"])
    if pd.notna(line["p"]):
        numbers["95 % interval"] = f"{signed(line['low'])} to {signed(line['high'])}"
        numbers |= {name: p_text(line[name.lower()]) for name in ("p", "Holm", "BH")}
    return {**texts, **numbers, "Verdict": line["verdict"]}


def forest(study: Study, results: Results) -> Figure:
    """Differences with 95 % intervals, in points, a panel per score; a mark is filled if Holm's p is at most 0.05."""
    table = sensitivity_table(study, results)
    labels: list[tuple[str, str]] = []  # group or row, and what is written
    for group, rows in table[table["metric"] == "mAP"].groupby("group", sort=False):
        labels += [("", str(group)), *((row["row"], row["label"]) for row in rows.to_dict("records"))]
    heights = {row: y for y, (row, _) in enumerate(labels) if row}
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(labels)), layout="constrained")
    axes: Sequence[Any] = figure.subplots(1, len(METRICS), sharey=True)
    for axis, metric in zip(axes, METRICS.values(), strict=True):
        for line in table[(table["metric"] == metric) & table["difference"].notna()].to_dict("records"):
            y, decided = heights[line["row"]], line["verdict"] in ("raises", "lowers")
            axis.plot([line["low"], line["high"]], [y, y], color="#4D4D4D", linewidth=1)
            face = "#0072B2" if decided else "white"
            axis.plot(line["difference"], y, marker="o", markersize=4.5, color="#0072B2", markerfacecolor=face)
        for row in table[(table["metric"] == metric) & table["difference"].isna()]["row"]:
            axis.text(0, heights[row], f" {NOT_RUN}", fontsize=7, verticalalignment="center")
        axis.axvline(0, color="#4D4D4D", linewidth=0.8)
        axis.set_xlabel(f"{metric}, difference in points")
    axes[0].set_yticks(range(len(labels)), [text for _, text in labels])
    for (row, _), text in zip(labels, axes[0].get_yticklabels(), strict=True):
        text.set_fontweight("normal" if row else "bold")
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    note = f"\n{SYNTHETIC}" if results.dataset.synthetic else ""
    figure.suptitle(
        f"Open choices of the paper on {results.dataset.title}; filled: Holm's p at most 0.05{note}", fontsize=10
    )
    return figure


def write_sensitivity(study: Study, results_dir: Path | str = "results") -> list[Path]:
    """Write table.csv, table.md and forest.png to `<results_dir>/sensitivity`; the paths."""
    results, folder = load_sensitivity(study, results_dir), Path(results_dir) / "sensitivity"
    atomic_write_text(folder / "table.csv", to_csv(sensitivity_table(study, results)))
    atomic_write_text(folder / "table.md", markdown(study, results))
    with atomic_path(folder / "forest.png") as path:
        forest(study, results).savefig(path, dpi=150, metadata={"Software": None})
    return [folder / name for name in ("table.csv", "table.md", "forest.png")]
