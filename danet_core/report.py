"""The content of the paper's Tables 1 to 3: the paper's rows, ours, and their differences. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from danet_core.files import StudyError, atomic_write_text
from danet_core.scores import (
    ABLATION_SETTING,
    SETTINGS,
    SYNTHETIC_NOTE,
    Results,
    VariantRow,
    complete_seeds,
    score,
    used_records,
)
from danet_core.statistics import METRICS, compare_variants
from danet_core.tables import NOT_RUN, Block, Column, Row, Score, Table

_PAPER_FILES = {1: "table1_sysu_mm01.csv", 2: "table2_regdb.csv", 3: "table3_ablation.csv"}
# By the variants' names in params.yaml: their rows in the paper's Table 3 and in the other two, which have DANet only.
PAPER_ROWS = {
    "baseline": ("Baseline",),
    "b_cc": ("B + CC",),
    "b_ml": ("B + ML",),
    "b_ml_cc": ("B + ML + CC", "DANet"),
}
_PAPER_DIRECTIONS = {"thermal_to_visible": "infrared2visible", "visible_to_thermal": "visible2infrared"}

SPLITS = 10  # of RegDB's protocol, one model each

# A table's columns, each with the setting (empty where the block decides) and the metric it shows.
Columns = Mapping[Column, tuple[str, str]]

_CROSS: Columns = {
    Column("rank1", "Rank-1"): ("", "cmc1"),
    Column("rank10", "Rank-10"): ("", "cmc10"),
    Column("rank20", "Rank-20"): ("", "cmc20"),
    Column("mAP", "mAP"): ("", "mAP"),
    Column("mINP", "mINP"): ("", "mINP"),
}
_ABLATION: Columns = {
    **_CROSS,
    Column("visible_rank1", "Visible only, Rank-1"): ("within_visible", "cmc1"),
    Column("infrared_rank1", "Infrared only, Rank-1"): ("within_infrared", "cmc1"),
    Column("L_id", "Final L_id", "nats"): ("training", "L_id"),
    Column("figure1_share", "Figure 1 share"): ("figure1", "share"),
}


def table1(results: Results) -> Table:
    """Table 1: all-search and indoor-search, single-shot and multi-shot. For SYSU-MM01's layout.

    Columns: Rank-1, Rank-10, Rank-20, mAP as printed in the paper, and mINP.
    """
    return _comparison(results, 1, "sysu", _CROSS)


def table2(results: Results) -> Table:
    """Table 2: both search directions, each named by its query and its gallery. For RegDB's layout.

    Columns: Rank-1 and mAP as printed in the paper, and Rank-5, Rank-10, Rank-20, mINP. CMC is image-level.
    """
    rank1, *others = _CROSS.items()
    return _comparison(results, 2, "regdb", dict([rank1, (Column("rank5", "Rank-5"), ("", "cmc5")), *others]))


def table3(results: Results) -> Table:
    """Table 3, the ablation: one row per variant, with what helps to read it beside the paper's columns.

    Scores are all-search, single-shot for SYSU-MM01's layout (as in the paper), thermal to visible for RegDB's. Beside
    them: Rank-1 of retrieval within each modality, the identity loss of the last epoch, and the share of identities for
    which Figure 1's claim holds from both sides (`distances.centre_claim`).
    """
    sysu = results.layout == "sysu"
    setting = ABLATION_SETTING[results.layout]
    number = "the paper's Table 3" if sysu else "as in the paper's Table 3, which has SYSU-MM01 only"
    caption = (
        f"{results.title}, ablation ({number}): {SETTINGS[results.layout][setting]} ({_counts(results, setting)}). "
        f"{_cmc_note(results)} Visible only, infrared only: query and gallery of that one modality. Final L_id: "
        "identity loss (nats) in the last epoch. Figure 1 share: identities whose other-modality centre is farther "
        "than the nearest same-modality centre of another identity, seen from both sides."
    )
    return _table(results, 3, caption, _ABLATION, [_block(results, 3 if sysu else None, setting, "", _ABLATION)])


def tables(results: Results) -> list[Table]:
    """The tables of a data set: the ablation, then Table 1 (SYSU-MM01's layout) or Table 2 (RegDB's)."""
    return [table3(results), table1(results) if results.layout == "sysu" else table2(results)]


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.md`, `<name>.csv` and `<name>.tex` into `folder`, each whole or not at all; the paths written."""
    texts = {".md": table.markdown(), ".csv": table.csv(), ".tex": table.latex()}
    for suffix, text in texts.items():
        atomic_write_text(folder / f"{table.name}{suffix}", text)
    return [folder / f"{table.name}{suffix}" for suffix in texts]


def write_differences(results: Results) -> Path:
    """Write `statistics.compare_variants` as `differences.csv` beside the tables, whole or not at all; the path.

    In points with four decimals: each variant less the Baseline, and the interval over resampled test identities with
    the trained models as they are. It is no interval over trainings.
    """
    labels = {row.name: row.label for row in results.variants}
    numbers = results.bootstrap
    columns = ("dataset", "synthetic", "setting", "variant", "label", "metric", "difference", "low", "high")
    measured = ("confidence", "resampled", "resamples", "identities", "queries", "seeds")
    where = results.dataset, str(results.synthetic).lower(), ABLATION_SETTING[results.layout]
    how = numbers.confidence, "identities", numbers.resamples
    lines = []
    for one in compare_variants(results):
        points = (f"{value + 0.0:.4f}" for value in (one.interval.difference, one.interval.low, one.interval.high))
        counts = one.identities, one.queries, one.seeds
        lines.append((*where, one.variant, labels[one.variant], METRICS[one.metric], *points, *how, *counts))
    path = results.tables_folder / "differences.csv"
    atomic_write_text(path, pd.DataFrame(lines, columns=columns + measured).to_csv(index=False, lineterminator="\n"))
    return path


def paper_table(number: int, folder: Path = Path("results/paper")) -> pd.DataFrame:
    """The paper's Table 1, 2 or 3, percent as printed, by method or variant; a cell the paper leaves out is NaN."""
    path = folder / _PAPER_FILES[number]
    if not path.exists():
        raise StudyError(f"{path} is missing; it is part of the project: restore it from version control")
    return pd.read_csv(path, index_col=0)


def _comparison(results: Results, number: int, layout: str, columns: Columns) -> Table:
    """Table 1 or 2: one block per setting of the layout."""
    if results.layout != layout:
        raise StudyError(
            f"Table {number} is for data sets of layout {layout}; {results.dataset} has layout {results.layout}"
        )
    blocks = []
    for setting, words in SETTINGS[layout].items():
        heading = f"{words.capitalize()} ({_counts(results, setting)})"
        blocks.append(_block(results, number, setting, heading, columns))
    caption = f"{results.title}, the paper's Table {number}. {_cmc_note(results)} Chance: Rank-1 of a random ranking."
    return _table(results, number, caption, columns, blocks)


def _block(results: Results, number: int | None, setting: str, heading: str, columns: Columns) -> Block:
    """The paper's rows of its Table `number` (None: it has no such table), ours, and the differences."""
    paper = [] if results.synthetic or number is None else _paper_rows(results, number, setting, list(columns))
    ours, differences = [], []
    for variant in results.variants:
        cells = tuple(
            score(results, variant.name, where or setting, metric, 100.0 if column.unit == "percent" else 1.0)
            for column, (where, metric) in columns.items()
        )
        n, listed = len(complete_seeds(results, variant.name)), len(results.seeds)
        label = f"ours: {variant.label}" if paper else variant.label
        ours.append(Row("ours", variant.name, label, cells, str(n) if n == listed else f"{n} of {listed}"))
        row = _counterpart(variant, paper)
        if row is not None:
            pairs = zip(cells, row.cells, strict=True)
            minus = tuple(Score(a.mean - b.mean) if a and b else None for a, b in pairs)
            label = f"difference: {variant.label} − paper's {row.variant}"
            differences.append(Row("difference", variant.name, label, minus, "–"))
    return Block(setting, heading, (*paper, *ours, *differences))


def _counterpart(variant: VariantRow, paper: Sequence[Row]) -> Row | None:
    """The paper's row of what the variant is, whatever its label; None where the paper has none."""
    return next((row for row in paper if row.variant in PAPER_ROWS.get(variant.name, ())), None)


@dataclass(frozen=True)
class Comparison:
    """A score the paper printed (percent, of its row `method`) with ours, None where not run."""

    setting: str
    variant: VariantRow
    method: str
    metric: str
    paper: float
    ours: Score | None


def comparisons(results: Results) -> list[Comparison]:
    """Every printed score of the paper's DANet and of its ablation that has a counterpart among the listed variants.

    In the order of the tables; a score that stands in Table 1 and in Table 3 comes once. Empty for a rendered data set.
    """
    found: dict[tuple[str, str, str], Comparison] = {}
    for table in reversed(tables(results)):
        for block in table.blocks:
            rows = {source: [row for row in block.rows if row.source == source] for source in ("paper", "ours")}
            for variant, ours in zip(results.variants, rows["ours"], strict=True):
                printed = _counterpart(variant, rows["paper"])
                for column, a, b in zip(table.columns, ours.cells, printed.cells if printed else (), strict=False):
                    if printed and b:
                        one = Comparison(block.setting, variant, printed.variant, column.header, b.mean, a)
                        found.setdefault((block.setting, variant.name, column.key), one)
    return list(found.values())


def _paper_rows(results: Results, number: int, setting: str, columns: Sequence[Column]) -> list[Row]:
    prefix = {1: f"{setting}_", 2: f"{_PAPER_DIRECTIONS.get(setting)}_", 3: ""}[number]
    rows = []
    for method, printed in paper_table(number, results.root / "results" / "paper").iterrows():
        values = [float(printed.get(f"{prefix}{column.key}", math.nan)) for column in columns]
        cells = tuple(None if math.isnan(value) else Score(value) for value in values)
        rows.append(Row("paper", str(method), f"paper: {method}", cells, "not stated"))
    return rows


def _table(results: Results, number: int, caption: str, columns: Columns, blocks: Sequence[Block]) -> Table:
    said = [caption, "Scores are percent.", _spread_note(results)]
    if any(row.source == "paper" for block in blocks for row in block.rows):
        said.append(
            "Rows marked paper are the printed ones (–: not printed there); difference is ours minus the paper's, in "
            "points."
        )
    if results.missing:
        said.append(f"{len(results.missing)} of {len(results.runs)} listed runs: {NOT_RUN}.")
    if results.layout == "regdb" and not results.synthetic and len(results.trials) < SPLITS:
        trials = ", ".join(map(str, results.trials))
        said.append(f"Only trial{'s' * (len(results.trials) > 1)} {trials} of the protocol's ten splits.")
    splits = sorted({record["split"] for record in results.records.values()} - {"test"})
    said += [f"Evaluated on the {split} split." for split in splits]
    said += [SYNTHETIC_NOTE] if results.synthetic else []
    said += results.markers
    made_of = _provenance(results)
    text = " ".join(said)
    return Table(f"table{number}", text, tuple(columns), tuple(blocks), *made_of, results.dataset, results.synthetic)


def _spread_note(results: Results) -> str:
    counts = [len(complete_seeds(results, variant.name)) for variant in results.variants] or [0]
    n = f"n = {_range(counts)} seed{'' if max(counts) == min(counts) == 1 else 's'}"
    splits = f"{len(results.trials)} train and test splits"
    over = ["seeds"] * (max(counts) > 1) + [splits] * (max(counts) > 0 and len(results.trials) > 1)
    used = [record for variant in results.variants for record in used_records(results, variant.name).values()]
    draws = [len(one["per_trial"]) for record in used for one in record["settings"].values()]
    if not results.synthetic and max(draws, default=1) > 1:
        over.append(f"{_range(draws)} random galleries")
    if not over:
        return f"{n}: no standard deviation."
    none = "" if "seeds" in over or results.synthetic else ", so none over seeds"
    return f"Mean ± standard deviation over {' / over '.join(over)}; {n}{none}."


def _provenance(results: Results) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The runs a table is made of with the hashes of model and configuration, and notes on what they share and lack."""
    used = {name: record for row in results.variants for name, record in used_records(results, row.name).items()}
    runs, notes = [], []
    for name, record in used.items():
        model, config = (record["provenance"][key][:8] for key in ("model_sha256", "config_sha256"))
        runs.append(f"{name} (model {model}, configuration {config})")
        data, weights = (record["provenance"][key][:8] for key in ("data_sha256", "weights_sha256"))
        notes = [f"Data {data}, backbone weights {weights} (first 8 digits of SHA-256)."]  # the same in all
    if results.missing:
        notes.append(f"Not run: {', '.join(results.missing)}.")
    if unused := [name for name in results.records if name not in used]:
        notes.append(f"Run but not used, since another split of their seed was not run: {', '.join(unused)}.")
    return tuple(runs), tuple(notes)


def _counts(results: Results, setting: str) -> str:
    """Query and gallery in words with their sizes and the chance level, as far as there are records to tell."""
    query, _, gallery = setting.partition("_to_") if results.layout == "regdb" else ("infrared", "", "visible")
    found = [record["settings"][setting] for record in results.records.values() if setting in record["settings"]]
    if not found:
        return f"query {query}; gallery {gallery}"
    queries, valid, size = (_range([one[key] for one in found]) for key in ("n_query", "n_valid", "gallery_size"))
    of_them = "" if valid == queries else f", {valid} with a match"
    chance = 100 * statistics.fmean(one["chance_rank1"] for one in found)
    return f"query {query}, {queries}{of_them}; gallery {gallery}, {size}; chance {chance:.2f}"


def _cmc_note(results: Results) -> str:
    if results.layout == "regdb":
        return "CMC is image-level."
    found = [one["per_trial"] for record in results.records.values() for one in record["settings"].values()]
    draws = f", and scores are means over {_range([len(one) for one in found])} random galleries" if found else ""
    return f"CMC is identity-level{draws}."


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
