"""The paper's Tables 1 to 3 with this study's scores, and the findings: the paper's claims and its numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tabulate import tabulate

from danet_core import MODALITIES
from danet_study.config import Study
from danet_study.files import StudyError, atomic_write_text
from danet_study.results import (
    CONTRASTS,
    METRICS,
    NOT_RUN,
    Estimate,
    Results,
    contrasts,
    differences,
    estimate,
    factorial,
    load_results,
    score,
)

PAPER = Path("results/paper")
INTERVAL = "mean ± half of the 95 % t interval over n seeds"
_SCORES = {"Rank-1": "cmc1", "Rank-10": "cmc10", "Rank-20": "cmc20", "mAP": "mAP", "mINP": "mINP"}
_READING = {  # further columns of the ablation
    "Visible only, Rank-1": ("within_visible", "cmc1"),
    "Infrared only, Rank-1": ("within_infrared", "cmc1"),
    "Final L_id": ("training", "L_id"),
}
_GAP = {
    "Farther than the nearest": ("modality_gap", "nearest"),
    "than the median": ("modality_gap", "median"),
    "than the mean": ("modality_gap", "mean"),
    "Probe, before BN": ("probe", "before_bn"),
    "Probe, after BN": ("probe", "after_bn"),
}
_CLASSIFIERS = {
    "Cosine": ("classifiers", "cosine"),
    **{f"{head}, {side}": ("classifiers", f"{head}_{side}") for head in ("C", "C_v", "C_r") for side in MODALITIES},
    "L_sid / L_id": ("classifiers", "L_sid"),
    "L_M / L_id": ("classifiers", "L_M"),
}
_PAPER_TABLES = {"sysu_mm01": "table1_sysu_mm01.csv", "regdb": "table2_regdb.csv"}
_PAPER_ABLATION = {"baseline": "Baseline", "cc": "B + CC", "ml": "B + ML", "both": "B + ML + CC"}
_RULES = (
    "Holm: p adjusted for all contrasts of a score. Inconclusive: interval includes zero or Holm above 0.05. "
    "Detectable: the smallest effect found with 80 % power. Intervals over test identities, with this gallery: "
    "`differences.csv`. Figure 1 holds above 50 %."
)


# -------------------- texts


def section(caption: str, grid: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """A caption, a table and small notes as GitHub Markdown."""
    texts = grid.map(lambda text: re.sub(r"([|*<>])", r"\\\1", str(text)))
    small = ["", f"<sub>{' '.join(notes)}</sub>"] if notes else []
    return "\n".join([caption, "", grid_text(texts, "pipe"), *small]) + "\n"


def grid_text(texts: pd.DataFrame, style: str) -> str:
    """A table of texts in a format of tabulate, words left and numbers right."""
    words = {"Setting", "Variant", "Claim", "Contrast", "Score", "Verdict", "Group", "Row", "Against", "Condition"}
    align = ["left" if column in words else "right" for column in texts.columns]
    return tabulate(texts, "keys", style, showindex=False, disable_numparse=True, colalign=align)


def to_csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def mean_text(one: Estimate | None, absent: str = NOT_RUN) -> str:
    """Mean and half interval; where n = 1 or nothing can vary between seeds (chance) the mean alone."""
    if one is None:
        return absent
    return f"{one.value:.2f}" if math.isnan(one.half) or one.sd == 0 else f"{one.value:.2f} ± {one.half:.2f}"


def signed(value: float) -> str:
    """Two decimals with a sign and a true minus; zero has no sign."""
    text = f"{value:+.2f}".replace("-", "−")
    return text if text[1:] != "0.00" else "0.00"


def p_text(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def effect_texts(row: Mapping[Any, Any]) -> dict[str, str]:
    """A row of `differences` or of the sensitivity study as it is printed; "–" where there is no number."""
    adjusted = {title: p_text(row[key]) for key, title in {"p": "p", "holm": "Holm", "bh": "BH"}.items() if key in row}
    tested = not math.isnan(row["low"])
    return {
        "Difference": NOT_RUN if math.isnan(row["difference"]) else signed(row["difference"]),
        "95 % interval": f"{signed(row['low'])} to {signed(row['high'])}" if tested else "–",
        "n": "0" if math.isnan(row["n"]) else f"{row['n']:.0f}",
        **adjusted,
        "Detectable": f"{row['detectable']:.2f}" if tested else "–",
        "Verdict": row["verdict"],
    }


# -------------------- Tables 1 to 3


class Table(NamedTuple):
    """A table as it is printed: a row of texts per setting and variant."""

    name: str
    caption: str
    rows: list[dict[str, str]]
    notes: list[str]

    def grid(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def markdown(self) -> str:
        return section(self.caption, self.grid(), self.notes)

    def latex(self) -> str:
        r"""For LaTeX with `\usepackage{booktabs}`; the notes are comments."""
        caption = re.sub(r"([&%$#_{}])", r"\\\1", self.caption)
        lines = [*(f"% {note}" for note in self.notes), "\\begin{table*}", "\\centering", "\\small"]
        lines += [f"\\caption{{{caption}}}", grid_text(self.grid(), "latex_booktabs"), "\\end{table*}\n"]
        return "\n".join(lines).replace("±", "$\\pm$").replace("−", "$-$").replace("–", "--")


def ablation_table(results: Results, paper: Path = PAPER) -> Table:
    """Table 3: a row per variant, with what is needed to read it beside the paper's columns; `ablation` elsewhere."""
    setting = results.protocol.ablation
    printed = paper_table("table3_ablation.csv", paper) if _is_paper(results, "sysu_mm01") else None
    columns = {title: (setting, metric) for title, metric in _SCORES.items()}
    rows = score_rows(results, {**columns, **_READING, "Chance": (setting, "chance_rank1")}, printed)
    name, words = ("table3", "ablation as in the paper's Table 3") if _like_paper(results) else ("ablation", "ablation")
    caption = (
        f"{results.title}: {words}, {results.protocol.settings[setting]}. Percent, {INTERVAL}. "
        "Visible only, infrared only: retrieval within one modality. Final L_id in nats."
    )
    return Table(name, caption, rows, _notes(results, [setting]))


def settings_table(results: Results, paper: Path = PAPER) -> Table:
    """Table 1 (SYSU-MM01's protocol) or Table 2 (RegDB's): every setting of the protocol; `settings` elsewhere.

    LLCM's quotes the rows that its repository prints.
    """
    protocol, settings = results.dataset.protocol, results.protocol.settings
    files, source = {**_PAPER_TABLES, "llcm": "llcm.csv"}, "ZYK100/LLCM" if protocol == "llcm" else "paper"
    printed = paper_table(files[protocol], paper) if results.dataset.published and protocol in files else None
    rows = []
    for setting, title in settings.items():
        found = score_rows(results, {column: (setting, metric) for column, metric in _SCORES.items()}, printed, source)
        rows += [{"Setting": "" if i else title, **row} for i, row in enumerate(found)]
    name = _PAPER_TABLES[protocol][:6] if _like_paper(results) else "settings"
    words = f"all settings as in the paper's Table {name[-1]}" if _like_paper(results) else "all settings"
    caption = f"{results.title}: {words}. Percent, {INTERVAL}. {results.protocol.caption}".strip()
    return Table(name, caption, rows, _notes(results, list(settings)))


def score_rows(
    results: Results,
    columns: Mapping[str, tuple[str, str]],
    printed: pd.DataFrame | None = None,
    source: str = "paper",
) -> list[dict[str, str]]:
    """Printed rows of `source`, then ours, as texts. columns: title to setting and metric."""
    rows = []
    for method, values in [] if printed is None else printed.iterrows():
        found = {title: values.get("_".join(where), math.nan) for title, where in columns.items()}
        if not all(map(math.isnan, found.values())):  # some methods report no such search
            texts = {title: "–" if math.isnan(value) else f"{value:.2f}" for title, value in found.items()}
            rows.append({"Variant": f"{source}: {method}", **texts, "n": "not stated"})
    listed = len({config.seed for config in results.configs.values()})
    for variant, label in results.variants.items():
        n = len(results.seeds(variant))
        absent = "–" if n else NOT_RUN  # galleries drawn as `random_seed` have no multi-shot search
        found = {title: score(results, variant, *where) for title, where in columns.items()}
        texts = {title: mean_text(one, absent) for title, one in found.items()}
        label = label if printed is None else f"ours: {label}"
        rows.append({"Variant": label, **texts, "n": str(n) if n == listed else f"{n} of {listed}"})
    return rows


def scores(results: Results) -> pd.DataFrame:
    """All means over seeds, tidy, with sd and half interval, in percent; those of `training` as they are."""
    rows = []
    for setting, metric in results.frame[["setting", "metric"]].drop_duplicates().itertuples(index=False):
        for variant, label in results.variants.items():
            if one := score(results, variant, setting, metric):
                rows.append((setting, variant, label, metric, one.value, one.sd, one.half, one.n))
    frame = pd.DataFrame(rows, columns=["setting", "variant", "label", "metric", "mean", "sd", "half", "n"])
    return frame.assign(dataset=results.dataset.name, synthetic=results.dataset.synthetic)


def paper_table(name: str, folder: Path = PAPER) -> pd.DataFrame:
    """A table of the paper in percent: a row per method or variant, a column `<setting>_<metric>`; NaN for a dash."""
    if not (folder / name).exists():
        raise StudyError(f"{folder / name} is missing; it is part of the project: restore it from version control")
    frame = pd.read_csv(folder / name, index_col=0)
    words = {"rank": "cmc", "infrared2visible": "thermal_to_visible", "visible2infrared": "visible_to_thermal"}
    frame.columns = frame.columns.to_series().replace(words, regex=True)
    return frame.add_prefix("all_single_") if name.startswith("table3") else frame


def _is_paper(results: Results, protocol: str) -> bool:
    """Whether this is the licensed data set that the paper scored by this protocol."""
    return results.dataset.published and results.dataset.protocol == protocol and protocol in _PAPER_TABLES


def _like_paper(results: Results) -> bool:
    """Whether the tables are the paper's: of its data sets and of the rendered ones, not of a user's own."""
    return (results.dataset.published or results.dataset.synthetic) and results.dataset.protocol in _PAPER_TABLES


def _notes(results: Results, settings: Sequence[str]) -> list[str]:
    """What the scores are made of: sizes and chance, protocol, runs, data."""
    notes, records, protocol = list(results.notes), list(results.records.values()), results.protocol
    for setting in settings:
        if one := next((r["settings"][setting] for r in records if setting in r["settings"]), None):
            query, gallery = (MODALITIES[side] for side in protocol.sides[setting])
            notes.append(
                f"{protocol.settings[setting]}: {one['n_valid']} of {one['n_query']} {query} queries have a "
                f"match among {one['gallery_size']} {gallery} images; {one['cmc_level']}-level CMC; chance "
                f"{100 * one['chance_rank1']:.2f}."
            )
    if protocol.trials > 1:
        trials = sorted({config.trial for config in results.configs.values()})
        notes.append(f"Trials {', '.join(map(str, trials))} of the protocol's {protocol.trials}.")
    if any(len(results.seeds(variant)) == 1 for variant in results.variants):
        notes.append("n = 1: no interval.")
    notes.append(f"{len(records)} of {len(results.configs)} listed runs have a record in results/records.")
    if missing := [run for run in results.configs if run not in results.records]:
        notes.append(f"Not run: {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}.")
    if records:
        data, weights = (str(records[0]["provenance"][key])[:8] for key in ("data_sha256", "weights_sha256"))
        notes.append(f"Data {data}, backbone weights {weights}.")
    code = [[record["versions"].get(key) for key in ("training_code_sha256", "libraries")] for record in records]
    if (versions := len({json.dumps(one, sort_keys=True) for one in code})) > 1:
        notes.append(f"Made with {versions} versions of training code or libraries; see `versions` in the records.")
    return notes


# -------------------- findings


def findings(results: Results, paper: Path = PAPER) -> str:
    """The paper's claims, the modality gap and, for the paper's data sets, its numbers, as Markdown."""
    claims = (
        f"**The paper's claims** on {results.title}: differences in points, 95 % t intervals over n seeds, variance "
        "pooled over variants. Paper: on SYSU-MM01, no spread. Figure 1: share of test identities."
    )
    gap = (
        f"**Figure 1 and the modality probe** on {results.title}: percent of test identities whose other-modality "
        "center is farther than others of the same modality; balanced accuracy of telling a feature's modality."
    )
    numbers = (
        f"**The paper's numbers** on {results.title}: consistent if inside the 95 % prediction interval of one "
        "further run. Where the paper contradicts itself: results/paper/README.md."
    )
    notes = [_RULES, *_notes(results, [results.protocol.ablation])]
    parts = [section(claims, claim_grid(results, paper), notes), section(gap, gap_grid(results), results.notes)]
    if _is_paper(results, results.dataset.protocol):
        parts.append(section(numbers, paper_grid(results, paper), results.notes))
    return "\n".join(parts)


def claim_grid(results: Results, paper: Path = PAPER) -> pd.DataFrame:
    """A row per contrast and score, then Figure 1's claim: the paper's number, ours, its test and a verdict."""
    printed, rows = paper_table("table3_ablation.csv", paper), []
    found = {(row["contrast"], row["metric"]): row for row in differences(results).to_dict("records")}
    absent = dict.fromkeys(("difference", "low", "high", "n", "p", "holm", "detectable"), math.nan) | {
        "verdict": NOT_RUN
    }
    for name in dict.fromkeys([*CONTRASTS, *contrasts(results)]):
        weights, claim = CONTRASTS.get(name, ({}, "–"))
        for metric, title in METRICS.items():
            theirs = sum(printed[f"all_single_{metric}"][_PAPER_ABLATION[cell]] * w for cell, w in weights.items())
            start = {"Claim": claim, "Contrast": name, "Score": title, "Paper": signed(theirs) if weights else "–"}
            rows.append({**start, **effect_texts(found.get((name, title), absent))})
    baseline = factorial(results).get("baseline", "")
    for kind in ("nearest", "median", "mean"):
        for when, setting in (("before training", "modality_gap_pretrained"), ("after the Baseline", "modality_gap")):
            start = {"Claim": "Figure 1", "Contrast": f"farther than the {kind} other, {when}", "Score": "share"}
            texts = _share_texts(results.values(baseline, setting, kind))
            rows.append({**start, "Paper": "claimed", **texts, **({"n": "–"} if when == "before training" else {})})
    return pd.DataFrame(rows).rename(columns={"Difference": "Here"}).fillna("–")


def _share_texts(shares: Sequence[float]) -> dict[str, str]:
    """A share of the test identities, one value for each seed, against one half; no test where all seeds agree."""
    one = estimate([[100 * share - 50 for share in shares]])
    if one is None:
        return {"Difference": NOT_RUN, "n": "0", "Verdict": NOT_RUN}
    texts = {"n": str(one.n), "Verdict": f"{'holds' if one.value > 0 else 'fails'}, not tested"}
    if one.sd > 0:
        low, high = max(0, 50 + one.value - one.half), min(100, 50 + one.value + one.half)
        texts = {**effect_texts(one.row("holds", "fails")), "95 % interval": f"{low:.2f} to {high:.2f}"}
    return {**texts, "Difference": f"{50 + one.value:.2f} %"}


def gap_grid(results: Results) -> pd.DataFrame:
    """Figure 1's shares and the modality probe for every variant, after the pretrained backbone's."""
    run = next((name for name in results.variants if results.seeds(name)), "")  # the backbone is the same for all
    before = {
        title: ("probe", "pretrained") if setting == "probe" else (f"{setting}_pretrained", metric)
        for title, (setting, metric) in _GAP.items()
    }
    first = {title: mean_text(score(results, run, *where)) for title, where in before.items()}
    return pd.DataFrame([{"Variant": "before training", **first, "n": "–"}, *score_rows(results, _GAP)])


def classifiers_section(results: Results) -> str:
    """C_v and C_r of the variants that train them (`classifiers.classifier_agreement`), as Markdown; "" without one."""
    using = {config.label for config in results.configs.values() if config.losses.keys() & {"L_sid", "L_M"}}
    rows = [row for row in score_rows(results, _CLASSIFIERS) if row["Variant"] in using]
    caption = (
        f"**Classifiers** on {results.title}: cosine of C_v's and C_r's weights, accuracy on training images, gradient "
        f"norms at the feature over L_id's. Times 100, {INTERVAL}."
    )
    return section(caption, pd.DataFrame(rows).replace("–", "not measured"), results.notes) if rows else ""


def paper_grid(results: Results, paper: Path = PAPER) -> pd.DataFrame:
    """Every number that the paper printed for DANet or its ablation against the prediction interval of our runs."""
    printed = {"both": paper_table(_PAPER_TABLES[results.dataset.protocol], paper).loc["DANet"]}
    if results.dataset.protocol == "sysu_mm01":
        ablation = paper_table("table3_ablation.csv", paper)
        printed = {cell: ablation.loc[_PAPER_ABLATION[cell]] for cell in ("baseline", "cc", "ml")} | printed
    cells, titles, rows = factorial(results), {metric: title for title, metric in _SCORES.items()}, []
    for cell, values in printed.items():
        for key, theirs in values.dropna().to_dict().items():
            setting, _, metric = str(key).rpartition("_")
            row = {"Variant": _PAPER_ABLATION[cell], "Setting": results.protocol.settings[setting]}
            row |= {"Score": titles[metric], "Paper": f"{theirs:.2f}"}
            row |= {"Ours": NOT_RUN, "Prediction interval": "–", "n": "0", "Verdict": NOT_RUN}
            if one := score(results, cells.get(cell, ""), setting, metric):
                row |= {"Ours": f"{one.value:.2f}", "n": str(one.n), "Verdict": one.verdict()}
                if one.n > 1:
                    low, high = one.value - one.prediction_half, one.value + one.prediction_half
                    verdict = "consistent" if low <= theirs <= high else "not reproduced"
                    row |= {"Prediction interval": f"{low:.2f} to {high:.2f}"}
                    row["Verdict"] = "not tested: not the published protocol" if results.notes else verdict
            rows.append(row)
    return pd.DataFrame(rows)


# -------------------- files


def write_tables(study: Study, dataset: str, results_dir: Path | str = "results") -> list[Path]:
    """Write a data set's tables and findings below `<results_dir>/<dataset>/tables`; the paths.

    Raises StudyError as `load_results` does.
    """
    root = Path(results_dir)
    results, paper = load_results(study, dataset, root), root / "paper"
    texts = {"differences.csv": to_csv(differences(results)), "scores.csv": to_csv(scores(results))}
    texts["findings.md"] = findings(results, paper)
    if text := classifiers_section(results):
        texts["classifiers.md"] = text
    for table in (ablation_table(results, paper), settings_table(results, paper)):
        texts |= {f"{table.name}.md": table.markdown(), f"{table.name}.tex": table.latex()}
    folder = root / dataset / "tables"
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return [folder / name for name in texts]
