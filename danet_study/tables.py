"""The paper's Tables 1 to 3 with this study's scores, and the findings: contrasts, the paper's claims, its numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from danet_core import MODALITIES
from danet_study.config import Study
from danet_study.files import StudyError, atomic_write_text
from danet_study.results import (
    METRICS,
    NOT_RUN,
    Contrast,
    Estimate,
    Results,
    contrasts,
    differences,
    effect,
    factorial,
    load_results,
    score,
)

INTERVAL = "mean ± half of the 95 % t interval over n seeds"
_SCORES = {"Rank-1": "cmc1", "Rank-10": "cmc10", "Rank-20": "cmc20", "mAP": "mAP", "mINP": "mINP"}
_ABLATION = {  # column: setting (empty: the ablation's), metric, unit
    **{title: ("", metric, "percent") for title, metric in _SCORES.items()},
    "Visible only, Rank-1": ("within_visible", "cmc1", "percent"),
    "Infrared only, Rank-1": ("within_infrared", "cmc1", "percent"),
    "Final L_id": ("training", "L_id", "nats"),
    "Chance": ("", "chance_rank1", "percent"),
}
# What the paper prints: files by protocol, prefixes of columns by setting, rows of Table 3 by cell of the 2 x 2 design.
_PAPER_FILES = {"sysu_mm01": "table1_sysu_mm01.csv", "regdb": "table2_regdb.csv"}
_PAPER_PREFIX = {"thermal_to_visible": "infrared2visible", "visible_to_thermal": "visible2infrared"}
_PAPER_COLUMNS = {"cmc1": "rank1", "cmc10": "rank10", "cmc20": "rank20", "mAP": "mAP"}
_PAPER_ABLATION = {"baseline": "Baseline", "cc": "B + CC", "ml": "B + ML", "both": "B + ML + CC"}


# -------------------- a table of scores


@dataclass(frozen=True)
class Table:
    """A table as tidy cells (setting, source, variant, label, metric, unit, mean, std, half, n, status, text)."""

    name: str
    caption: str
    cells: pd.DataFrame
    notes: list[str]

    def grid(self) -> pd.DataFrame:
        """What is printed: one row per setting and label, one column per metric."""
        rows = []
        for _, cells in self.cells.groupby(["setting", "source", "variant"], sort=False):
            first = cells.iloc[0]
            texts = dict(zip(cells["metric"], cells["text"], strict=True))
            rows.append({"Setting": first["title"], "Variant": first["label"], **texts, "n": first["seeds"]})
        frame = pd.DataFrame(rows)
        if frame["Setting"].nunique() == 1:
            return frame.drop(columns="Setting")
        return frame.assign(Setting=frame["Setting"].mask(frame["Setting"].duplicated(), ""))

    def markdown(self) -> str:
        return section(self.caption, self.grid(), self.notes)

    def csv(self) -> str:
        """The cells in `unit`; empty where the paper prints none or nothing was run."""
        return to_csv(self.cells.drop(columns=["title", "seeds", "text"]))

    def latex(self) -> str:
        r"""For LaTeX with `\usepackage{booktabs}`; the notes are comments."""
        body = _tabulate(self.grid(), "latex_booktabs")
        lines = [*(f"% {note}" for note in self.notes), "\\begin{table*}", "\\centering", "\\small"]
        label = f"{self.cells['dataset'].iloc[0]}-{self.name}".replace("_", "-")
        lines += [f"\\caption{{{_latex(self.caption)}}}", f"\\label{{tab:{label}}}", body, "\\end{table*}"]
        return "\n".join(lines).replace("±", "$\\pm$").replace("−", "$-$").replace("–", "--") + "\n"


def section(caption: str, grid: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """A caption, a table and small notes as GitHub Markdown."""
    texts = grid.map(lambda text: re.sub(r"([|*<>])", r"\\\1", str(text)))
    small = ["", f"<sub>{' '.join(notes)}</sub>"] if notes else []
    return "\n".join([caption, "", _tabulate(texts, "pipe"), *small]) + "\n"


def _tabulate(texts: pd.DataFrame, style: str) -> str:
    words = {"Setting", "Variant", "Contrast", "Claim", "Score", "Verdict", "Group", "Row", "Against"}
    align = ["left" if column in words else "right" for column in texts.columns]
    return tabulate(texts, "keys", style, showindex=False, disable_numparse=True, colalign=align)


def to_csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def signed(value: float) -> str:
    """Two decimals with a sign and a true minus; zero has no sign."""
    text = f"{value:+.2f}".replace("-", "−")
    return text if text[1:] != "0.00" else "0.00"


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("`", ""))


def _text(one: Estimate | None, absent: str = NOT_RUN) -> str:
    """Mean and half interval; where n = 1 or nothing can vary between seeds (chance) the mean alone."""
    if one is None:
        return absent
    return f"{one.value:.2f}" if math.isnan(one.half) or one.sd == 0 else f"{one.value:.2f} ± {one.half:.2f}"


# -------------------- Tables 1 to 3


def ablation_table(results: Results, paper: Path = Path("results/paper")) -> Table:
    """Table 3: a row per variant, with what is needed to read it beside the paper's columns."""
    setting = results.protocol.ablation
    cells = list(_our_cells(results, setting, _ABLATION))
    if _is_paper(results, "sysu_mm01"):
        rows = paper_table("table3_ablation.csv", paper)
        cells = [*_paper_cells(rows, "", setting, _ABLATION), *cells]
    like = "the paper's Table 3" if results.dataset.protocol == "sysu_mm01" else "as the paper's Table 3 of SYSU-MM01"
    caption = (
        f"{results.dataset.title}: ablation ({like}), {results.protocol.settings[setting]}. Percent, "
        f"{INTERVAL}. Visible only, infrared only: retrieval within one modality. Final L_id in nats."
    )
    return Table("table3", caption, _frame(results, cells), _notes(results, [setting]))


def settings_table(results: Results, paper: Path = Path("results/paper")) -> Table:
    """Table 1 (SYSU-MM01's protocol) or Table 2 (RegDB's): every setting of the protocol; `settings` elsewhere."""
    columns = {title: ("", metric, "percent") for title, metric in _SCORES.items()}
    protocol = results.dataset.protocol
    names = {"sysu_mm01": ("table1", "the paper's Table 1"), "regdb": ("table2", "the paper's Table 2")}
    name, words = names.get(protocol, ("settings", "all settings"))
    cells: list[dict[str, Any]] = []
    for setting in results.protocol.settings:
        if _is_paper(results, protocol):
            rows = paper_table(_PAPER_FILES[protocol], paper)
            cells += _paper_cells(rows, _prefix(setting), setting, columns)
        cells += _our_cells(results, setting, columns)
    caption = f"{results.dataset.title}: {words}. Percent, {INTERVAL}."
    return Table(name, caption, _frame(results, cells), _notes(results, list(results.protocol.settings)))


def paper_table(name: str, folder: Path = Path("results/paper")) -> pd.DataFrame:
    """A table of the paper, percent as printed, by method or variant; NaN where the paper has a dash."""
    if not (folder / name).exists():
        raise StudyError(f"{folder / name} is missing; it is part of the project: restore it from version control")
    return pd.read_csv(folder / name, index_col=0)


def _prefix(setting: str) -> str:
    return f"{_PAPER_PREFIX.get(setting, setting)}_"


def _is_paper(results: Results, protocol: str) -> bool:
    """Whether this is the licensed data set that the paper scored by this protocol."""
    return results.dataset.published and results.dataset.protocol == protocol and protocol in _PAPER_FILES


def _our_cells(results: Results, setting: str, columns: dict[str, tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    listed = len({config.seed for config in results.configs.values()})
    ours = "ours: " if results.dataset.published else ""
    for variant, label in results.variants.items():
        n = len(results.seeds(variant))
        absent = "–" if n else NOT_RUN  # galleries drawn as `random_seed` have no multi-shot search
        start = {"setting": setting, "source": "ours", "variant": variant, "label": ours + label, "n": n}
        start["seeds"] = str(n) if n == listed else f"{n} of {listed}"
        for title, (where, metric, unit) in columns.items():
            one = score(results, variant, where or setting, metric, 100.0 if unit == "percent" else 1.0)
            numbers = {"mean": one.value, "std": one.sd, "half": one.half} if one else {}
            texts = {"status": "run" if one else absent, "text": _text(one, absent)}
            yield {**start, "metric": title, "unit": unit, **numbers, **texts}


def _paper_cells(
    rows: pd.DataFrame, prefix: str, setting: str, columns: dict[str, tuple[str, str, str]]
) -> Iterator[dict[str, Any]]:
    rows = rows.loc[rows.filter(regex=f"^{prefix}").notna().any(axis=1)]  # some methods report no such search
    for method, printed in rows.iterrows():
        start = {"setting": setting, "source": "paper", "variant": method, "label": f"paper: {method}"}
        for title, (where, metric, unit) in columns.items():
            value = float(printed.get("" if where else prefix + _PAPER_COLUMNS.get(metric, ""), math.nan))
            status, text = ("–", "–") if math.isnan(value) else ("printed", f"{value:.2f}")
            cell = {"metric": title, "unit": unit, "mean": value, "status": status, "text": text}
            yield {**start, **cell, "seeds": "not stated"}


def _frame(results: Results, cells: Sequence[dict[str, Any]]) -> pd.DataFrame:
    order = "dataset synthetic setting source variant label metric unit status mean std half n title seeds text"
    frame = pd.DataFrame(cells, columns=order.split())
    frame["dataset"], frame["synthetic"] = results.dataset.name, results.dataset.synthetic
    return frame.assign(title=frame["setting"].map(results.protocol.settings), n=frame["n"].astype("Int64"))


def _notes(results: Results, settings: Sequence[str]) -> list[str]:
    """What the scores are made of: sizes and chance, protocol, runs, data."""
    notes = list(results.notes)
    records = list(results.records.values())
    for setting in settings:
        if one := next((r["settings"][setting] for r in records if setting in r["settings"]), None):
            query, gallery = (MODALITIES[side] for side in results.protocol.sides[setting])
            notes.append(
                f"{results.protocol.settings[setting]}: {one['n_valid']} of {one['n_query']} {query} queries have a "
                f"match among {one['gallery_size']} {gallery} images; {one['cmc_level']}-level CMC; chance "
                f"{100 * one['chance_rank1']:.2f}."
            )
    trials = sorted({config.trial for config in results.configs.values()})
    if results.protocol.trials > 1:
        notes.append(f"Trials {', '.join(map(str, trials))} of the protocol's {results.protocol.trials}.")
    if any(len(results.seeds(variant)) == 1 for variant in results.variants):
        notes.append("n = 1: no interval.")
    notes.append(f"{len(records)} of {len(results.configs)} listed runs have a record in results/records.")
    if missing := results.missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        notes.append(f"Not run: {', '.join(missing[:6])}{more}.")
    if records:
        data, weights = (str(records[0]["provenance"][key])[:8] for key in ("data_sha256", "weights_sha256"))
        notes.append(f"Data {data}, backbone weights {weights}.")
    code = [[record["versions"].get(key) for key in ("training_code_sha256", "libraries")] for record in records]
    if (versions := len({json.dumps(one, sort_keys=True) for one in code})) > 1:
        notes.append(f"Made with {versions} versions of training code or libraries; see `versions` in the records.")
    return notes


# -------------------- findings


def findings(results: Results, paper: Path = Path("results/paper")) -> str:
    """The contrasts, the paper's claims, the modality gap and, for the paper's data sets, its numbers, as Markdown."""
    power = "p is not corrected for the number of contrasts. Detectable: the smallest effect found with 80 % power."
    parts = [
        section(
            f"**Contrasts** ({results.dataset.title}): differences in points, 95 % t intervals over n seeds, "
            "variance pooled over the variants. Intervals over test identities, with this gallery: `differences.csv`.",
            contrast_grid(results),
            [power, *_notes(results, [results.protocol.ablation])],
        ),
        section(
            "**The paper's claims**: what it printed for SYSU-MM01 (one number, no spread) and what was found here.",
            claim_grid(results, paper),
            results.notes,
        ),
        section(
            "**Figure 1 and the modality probe**: percent of test identities whose other-modality center is farther "
            "than other identities of the same modality, and balanced accuracy of telling the modality of a feature.",
            gap_grid(results),
            results.notes,
        ),
    ]
    if _is_paper(results, results.dataset.protocol):
        parts.append(
            section(
                "**The paper's numbers**: consistent if inside the 95 % prediction interval of one further run.",
                paper_grid(results, paper),
                [*results.notes, "Where the paper contradicts itself: results/paper/README.md."],
            )
        )
    return "\n".join(parts)


def contrast_grid(results: Results) -> pd.DataFrame:
    """A row per contrast and score: difference, interval, n, p, smallest detectable effect, verdict."""
    rows = [
        {"Contrast": contrast.name, "Score": title, **_effect_texts(effect(results, contrast, metric), contrast)}
        for contrast in contrasts(results)
        for metric, title in METRICS.items()
    ]
    return pd.DataFrame(rows)


def _effect_texts(one: Estimate | None, contrast: Contrast) -> dict[str, str]:
    texts = {"Difference": NOT_RUN, "95 % interval": "–", "n": "0", "p": "–", "Detectable": "–", "Verdict": NOT_RUN}
    if one is None:
        return texts
    texts |= {"Difference": signed(one.value), "n": str(one.n)}
    if one.n > 1:
        texts["95 % interval"] = f"{signed(one.value - one.half)} to {signed(one.value + one.half)}"
        texts |= {"p": p_text(one.p), "Detectable": f"{one.detectable:.2f}"}
    return texts | {"Verdict": one.verdict(contrast.above, contrast.below)}


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def claim_grid(results: Results, paper: Path = Path("results/paper")) -> pd.DataFrame:
    """CC helps, ML helps, both add up, and Figure 1's claim: the paper's number beside ours."""
    printed = paper_table("table3_ablation.csv", paper)
    cells, rows = factorial(results), []
    claims = {
        "CC helps: B + CC − Baseline": {"cc": 1, "baseline": -1},
        "ML helps: B + ML − Baseline": {"ml": 1, "baseline": -1},
        "Both help: B + ML + CC − Baseline": {"both": 1, "baseline": -1},
        "Both add up: interaction": {"both": 1, "cc": -1, "ml": -1, "baseline": 1},
    }
    for claim, weights in claims.items():
        words = ("more than additive", "less than additive") if len(weights) == 4 else ("helps", "hurts")
        listed = weights.keys() <= cells.keys()
        contrast = Contrast(claim, {cells[cell]: float(weights[cell]) for cell in weights} if listed else {}, *words)
        for metric, title in METRICS.items():
            theirs = sum(printed[_PAPER_COLUMNS[metric]][_PAPER_ABLATION[cell]] * w for cell, w in weights.items())
            texts = _effect_texts(effect(results, contrast, metric) if listed else None, contrast)
            here = {"Here": texts.pop("Difference"), **texts}
            rows.append({"Claim": claim, "Score": title, "Paper": signed(theirs), **here})
    for kind in ("nearest", "median", "mean"):
        for when, setting in (("before training", "modality_gap_pretrained"), ("after the Baseline", "modality_gap")):
            row = {"Claim": f"Figure 1: farther than the {kind} other, {when}", "Score": "share", "Paper": "claimed"}
            one = score(results, cells["baseline"], setting, kind) if cells else None
            rows.append(row | _share_texts(one, trained=setting == "modality_gap"))
    return pd.DataFrame(rows).reindex(columns=["Claim", "Score", "Paper", "Here", "95 % interval", "n", "p", "Verdict"])


def _share_texts(one: Estimate | None, *, trained: bool) -> dict[str, str]:
    """A share of identities against one half; before training nothing depends on the seed."""
    texts = {"95 % interval": "–", "n": "–", "p": "–"}
    if one is None:
        return {"Here": NOT_RUN, **texts, "Verdict": NOT_RUN}
    texts["Here"] = f"{one.value:.2f} %"
    verdict = "holds for most identities" if one.value > 50 else "fails for most identities"
    if trained:
        texts["n"] = str(one.n)
        if one.n > 1:
            texts["95 % interval"] = f"{max(0, one.value - one.half):.2f} to {min(100, one.value + one.half):.2f}"
        if one.n > 1 and abs(one.value - 50) <= one.half:
            verdict = "inconclusive: the interval includes 50 %"
    return texts | {"Verdict": verdict}


def gap_grid(results: Results) -> pd.DataFrame:
    """Figure 1's shares and the modality probe for every variant, after the pretrained backbone's."""
    columns = {
        "Farther than the nearest": ("modality_gap", "nearest"),
        "than the median": ("modality_gap", "median"),
        "than the mean": ("modality_gap", "mean"),
        "Probe, before BN": ("probe", "before_bn"),
        "Probe, after BN": ("probe", "after_bn"),
    }
    rows = [{"Variant": "before training", "n": "–"}]
    for variant, label in results.variants.items():
        texts = {title: _text(score(results, variant, *where)) for title, where in columns.items()}
        rows.append({"Variant": label, **texts, "n": str(len(results.seeds(variant)))})
        if "Probe, before BN" not in rows[0] and results.seeds(variant):  # the backbone is the same for all
            for title, (setting, metric) in columns.items():
                where = ("probe", "pretrained") if setting == "probe" else (f"{setting}_pretrained", metric)
                rows[0][title] = _text(score(results, variant, *where))
    return pd.DataFrame(rows, columns=["Variant", *columns, "n"]).fillna(NOT_RUN)


def paper_grid(results: Results, paper: Path = Path("results/paper")) -> pd.DataFrame:
    """Every number that the paper printed for DANet or its ablation against the prediction interval of our runs."""
    cells, protocol, settings = factorial(results), results.dataset.protocol, results.protocol.settings
    printed: list[tuple[str, str, Any, str]] = []  # cell, setting, the paper's row, prefix of its columns
    if protocol == "sysu_mm01":
        rows = paper_table("table3_ablation.csv", paper)
        printed += [(cell, "all_single", rows.loc[_PAPER_ABLATION[cell]], "") for cell in ("baseline", "cc", "ml")]
    danet = paper_table(_PAPER_FILES[protocol], paper).loc["DANet"]
    printed += [("both", setting, danet, _prefix(setting)) for setting in settings]
    found = []
    for cell, setting, row, prefix in printed:
        for title, metric in _SCORES.items():
            theirs = float(row.get(prefix + _PAPER_COLUMNS.get(metric, "-"), math.nan))
            if math.isnan(theirs):
                continue
            one = score(results, cells[cell], setting, metric) if cell in cells else None
            start = {"Variant": _PAPER_ABLATION[cell], "Setting": settings[setting], "Score": title}
            found.append(start | {"Paper": f"{theirs:.2f}", **_judged(results, one, theirs)})
    return pd.DataFrame(found)


def _judged(results: Results, one: Estimate | None, theirs: float) -> dict[str, str]:
    if one is None:
        return {"Ours": NOT_RUN, "Prediction interval": "–", "n": "0", "Verdict": NOT_RUN}
    low, high = one.value - one.prediction_half, one.value + one.prediction_half
    verdict = "consistent" if low <= theirs <= high else "not reproduced"
    if one.n == 1:
        verdict = "not tested (n = 1)"
    elif results.notes:
        verdict = "not tested: not the published protocol"
    interval = "–" if one.n == 1 else f"{low:.2f} to {high:.2f}"
    return {"Ours": f"{one.value:.2f}", "Prediction interval": interval, "n": str(one.n), "Verdict": verdict}


# -------------------- files


def write_tables(study: Study, dataset: str, results_dir: Path | str = "results") -> list[Path]:
    """Write a data set's tables, `differences.csv` and `findings.md` below `<results_dir>/<dataset>/tables`; the paths.

    Raises StudyError as `load_results` does.
    """
    root = Path(results_dir)
    results = load_results(study, dataset, root)
    texts = {"differences.csv": to_csv(differences(results)), "findings.md": findings(results, root / "paper")}
    for table in (ablation_table(results, root / "paper"), settings_table(results, root / "paper")):
        for suffix, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            texts[f"{table.name}.{suffix}"] = text
    folder = root / dataset / "tables"
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return [folder / name for name in texts]
