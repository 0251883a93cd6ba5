"""From evaluation records to scores and the content of the paper's Tables 1 to 3.

What is printed comes from the records of the runs that params.yaml lists and from nothing else: a run without a record
is "not run", a record of a run that is not listed is left alone, and records that differ in more than variant, trial
and seed never share a table. No torch: tables can be made again from `results/` alone.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from danet_core.files import StudyError, atomic_write_text, read_json
from danet_core.tables import NOT_RUN, Block, Column, Row, Score, Table

if TYPE_CHECKING:
    from danet_core.config import Study

Record = Mapping[str, Any]

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "sysu": {
        "all_single": "all-search, single-shot",
        "all_multi": "all-search, multi-shot",
        "indoor_single": "indoor-search, single-shot",
        "indoor_multi": "indoor-search, multi-shot",
    },
    "regdb": {"thermal_to_visible": "thermal to visible", "visible_to_thermal": "visible to thermal"},
}
ABLATION_SETTING = {"sysu": "all_single", "regdb": "thermal_to_visible"}
SYNTHETIC_NOTE = "Synthetic: rendered pedestrians, not comparable with the paper's SYSU-MM01/RegDB figures."
PARTIAL_NOTE = (
    "Partial: only a part of the data set was prepared (`--allow-partial`), so these are not the benchmark's figures."
)
RANDOM_SEED_NOTE = (
    "Galleries drawn with `random.seed(trial)`, single-shot only, not by `rand_perm_cam.mat`: not comparable with "
    "scores over the published galleries."
)
RERANK_NOTE = "Re-ranked by k-reciprocal neighbours ({}): not comparable with scores without re-ranking."

# fmt: off
_REQUIRED = ("dataset", "title", "layout", "synthetic", "partial", "variant", "label", "trial", "seed", "split",
             "settings", "within", "figure1", "training", "provenance", "config")
# fmt: on
_FREE = ("config.trial", "config.seed")  # may differ within a table
_PAPER_FILES = {1: "table1_sysu_mm01.csv", 2: "table2_regdb.csv", 3: "table3_ablation.csv"}
_PAPER_DIRECTIONS = {"thermal_to_visible": "infrared2visible", "visible_to_thermal": "visible2infrared"}


# -------------------- records


@dataclass(frozen=True)
class VariantRow:
    """A variant as a row of the tables: its name and label in params.yaml, and the modules it adds to the Baseline."""

    name: str
    label: str
    modules: tuple[str, ...]
    epochs_factor: int


@dataclass(frozen=True)
class Results:
    """The listed runs of one data set with the evaluation records that exist; `records` is keyed by run name."""

    dataset: str
    title: str
    layout: str
    synthetic: bool
    variants: tuple[VariantRow, ...]
    trials: tuple[int, ...]
    seeds: tuple[int, ...]
    records: Mapping[str, Record]
    root: Path

    @property
    def tables_folder(self) -> Path:
        return self.root / "results" / self.dataset / "tables"

    @property
    def figures_folder(self) -> Path:
        return self.root / "results" / self.dataset / "figures"

    @property
    def partial(self) -> bool:
        return any(record["partial"] for record in self.records.values())

    @property
    def markers(self) -> tuple[str, ...]:
        """Sentences on what sets these records apart from the benchmark's plain protocol; none as a rule.

        A part of the data set, SYSU-MM01's other gallery convention (a setting has `galleries: random_seed`), and
        re-ranking (a setting has `rerank`, a mapping of its parameters).
        """
        notes = [PARTIAL_NOTE] if self.partial else []
        settings = [one for record in self.records.values() for one in record["settings"].values()]
        if any(_random_galleries(one) for one in settings):
            notes.append(RANDOM_SEED_NOTE)
        # dict.fromkeys: a set that keeps its order
        for rerank in dict.fromkeys(_rerank_words(one["rerank"]) for one in settings if one.get("rerank")):
            notes.append(RERANK_NOTE.format(rerank))
        return tuple(notes)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of all listed runs, in table order: variant, then trial, then seed."""
        return tuple(run_name(row.name, trial, s) for row in self.variants for trial in self.trials for s in self.seeds)

    @property
    def missing(self) -> tuple[str, ...]:
        """Listed runs without a record."""
        return tuple(run for run in self.runs if run not in self.records)


def run_name(variant: str, trial: int, seed: int) -> str:
    """`<variant>-t<trial>-s<seed>`, the name of a run's folder and files."""
    return f"{variant}-t{trial}-s{seed}"


def load_results(study: Study, dataset: str, root: Path | str = ".") -> Results:
    """Read the records of the runs that `study` lists for `dataset`, from `<root>/results/<dataset>/metrics`.

    A listed run without a record is no error. Raises StudyError for an unknown data set, a damaged record, a record of
    another data set or run, and records that cannot stand in one table (see `check_comparable`).
    """
    row = study.dataset(dataset)
    variants = []
    for name in study.study.variants:
        variant = study.variants[name]
        modules = tuple(key for key in ("cc", "ml") if getattr(variant, key) is not None)
        variants.append(VariantRow(name, variant.label, modules, variant.epochs_factor))
    trials = (1,) if row.layout == "sysu" else study.study.trials
    seeds, root = study.study.seeds, Path(root)
    results = Results(dataset, row.title, row.layout, row.synthetic, tuple(variants), trials, seeds, {}, root)
    records = {}
    for name in results.runs:
        path = root / "results" / dataset / "metrics" / f"{name}.json"
        if path.exists():
            records[name] = load_record(path)
            for key in ("dataset", "layout", "synthetic"):
                _expect(path, key, records[name][key], getattr(results, key))
    check_comparable(records)
    return dataclasses.replace(results, records=records)


def load_record(path: Path) -> dict[str, Any]:
    """One evaluation record. Raises StudyError for a missing or damaged file, a missing key, a score outside [0, 1]."""
    record = read_json(path)
    missing = [key for key in _REQUIRED if not isinstance(record, dict) or key not in record]
    if missing:
        raise StudyError(
            f"{path} has no key {missing[0]!r}; it is not an evaluation record: remove it and run `dvc repro`"
        )
    _expect(path, "the run it names", run_name(record["variant"], record["trial"], record["seed"]), path.stem)
    for setting, metric, value in _metrics(record):
        # Losses and counts have no upper bound; every other number of a record is a fraction.
        fraction = setting != "training"
        if not math.isfinite(value) or value < 0 or (fraction and value > 1):
            expected = "a fraction from 0 to 1" if fraction else "a finite number of at least 0"
            raise StudyError(
                f"{path}: {setting} {metric} is {value}; expected {expected}: remove the file and run `dvc repro`"
            )
    return record


def load_metrics(folder: Path | str) -> pd.DataFrame:
    """`tidy` of every record in a metrics folder, listed in params.yaml or not; empty for a missing folder."""
    return tidy(load_record(path) for path in sorted(Path(folder).glob("[!.]*.json")))


def tidy(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a tidy table: one row per variant, trial, seed, setting and metric, scores as fractions.

    Settings are the protocol's (`all_single`, `thermal_to_visible`, ...), the same with `:identity_level` for RegDB's
    identity-level CMC, `within_visible` and `within_infrared`, `figure1` and `training`.
    """
    rows = [(r["variant"], r["trial"], r["seed"], *metric) for r in records for metric in _metrics(r)]
    return pd.DataFrame(rows, columns=["variant", "trial", "seed", "setting", "metric", "value"])


def load_training(results: Results) -> list[Record]:
    """The training records (`runs/<dataset>/<run>/record.json`) of the listed runs that exist, in table order."""
    paths = [results.root / "runs" / results.dataset / run / "record.json" for run in results.runs]
    return [read_json(path) for path in paths if path.exists()]


def load_features(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Test features of each variant's first listed run that has them: keys feat (N, D), pids (N,), modalities (N,).

    `feat` is the feature that retrieval uses (`test_feature` of the recipe: before or after the BN neck).
    Raises StudyError for a damaged file.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for run in results.runs:
        variant = run.rpartition("-t")[0]
        path = results.root / "runs" / results.dataset / run / "features.npz"
        if variant in found or not path.exists():
            continue
        recipe = read_json(path.with_name("record.json"))["config"]["dataset"]["recipe"]
        feat = "feat_bn" if recipe["test_feature"] == "after_bn" else "feat"
        try:
            with np.load(path) as arrays:
                keys = {"feat": feat, "pids": "pids", "modalities": "modalities"}
                found[variant] = {key: arrays[stored] for key, stored in keys.items()}
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(f"{path} is damaged ({error}); remove it and run `dvc repro`") from None
    return found


def check_comparable(records: Mapping[str, Record]) -> None:
    """Refuse to set runs side by side that differ in more than variant, trial and seed.

    Compared are the resolved configurations, the hashes of data and backbone weights, the evaluated split, and over how
    many galleries each setting is the mean; within one variant its own row too. Raises StudyError naming both runs,
    key and values.
    """
    first: dict[str, tuple[str, dict[str, Any]]] = {}  # the run each is compared with, and what they have to share
    for name, record in records.items():
        leaves = dict(_leaves(record["config"], "config"))
        leaves |= {f"provenance.{key}": record["provenance"][key] for key in ("data_sha256", "weights_sha256")}
        leaves |= {key: record[key] for key in ("split", "partial")}
        leaves |= {f"galleries of {key}": len(found["per_trial"]) for key, found in record["settings"].items()}
        for setting, found in record["settings"].items():
            for key in ("galleries", "rerank"):
                leaves |= dict(_leaves(found[key], f"{setting}.{key}")) if found.get(key) else {}
        own = {key: value for key, value in leaves.items() if key not in _FREE}
        shared = {key: value for key, value in own.items() if not key.startswith("config.variant")}
        for group, found in (("", shared), (record["variant"], own)):
            reference, expected = first.setdefault(group, (name, found))
            for key in sorted(expected.keys() | found.keys()):
                a, b = expected.get(key, "nothing"), found.get(key, "nothing")
                if a != b:
                    raise StudyError(
                        f"runs {reference} and {name} differ in {key} ({_short(a)} against {_short(b)}), so no table "
                        "can hold both; run `dvc repro` to make all runs from the same params.yaml and data"
                    )


def _random_galleries(setting: Record) -> bool:
    return setting.get("galleries") == "random_seed"


def _rerank_words(rerank: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in rerank.items()) if isinstance(rerank, dict) else str(rerank)


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key in sorted(value):
        yield from _leaves(value[key], f"{prefix}.{key}")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _expect(path: Path, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise StudyError(f"{path}: {what} is {found!r}, expected {expected!r}; remove the file and run `dvc repro`")


def _metrics(record: Record) -> Iterator[tuple[str, str, float]]:
    """Setting, metric and value of every number of a record that a table may show (see `tidy`)."""
    groups: dict[str, Mapping[str, Any]] = {}
    for setting, found in record["settings"].items():
        groups[setting] = {**found["mean"], "chance_rank1": found["chance_rank1"]}
        if "identity_level" in found:
            groups[f"{setting}:identity_level"] = found["identity_level"]
    for modality, found in record["within"].items():
        groups[f"within_{modality}"] = {key: found[key] for key in ("cmc1", "mAP")}
    groups["figure1"] = {key: value for key, value in record["figure1"].items() if key.startswith("share")}
    training = record["training"]
    groups["training"] = {**training["final"], **{key: training[key] for key in ("steps", "epochs")}}
    for setting, metrics in groups.items():
        for metric, value in metrics.items():
            if value is not None:  # a loss term the variant does not have
                yield setting, metric, float(value)


# -------------------- scores


def score(results: Results, variant: str, setting: str, metric: str, scale: float = 1.0) -> Score | None:
    """Mean and spreads of one tidy metric (see `tidy`) of one variant, times `scale`; None where not run.

    Only seeds whose listed trials are all there count.
    """
    values = _values(results, variant, setting, metric)
    if not values:
        return None
    by_seed = [scale * statistics.fmean(of_seed) for of_seed in values.values()]
    by_trial = [scale * statistics.fmean(of_trial) for of_trial in zip(*values.values(), strict=True)]
    draws = [
        [draw[metric] for draw in record["settings"].get(setting, {}).get("per_trial", ()) if metric in draw]
        for record in _used(results, variant).values()
    ]
    by_gallery = [scale * statistics.fmean(of_gallery) for of_gallery in zip(*draws, strict=True)]
    return Score(
        statistics.fmean(by_seed),
        len(by_seed),
        _std(by_seed),
        len(by_trial),
        _std(by_trial),
        max(1, len(by_gallery)),
        _std(by_gallery),
    )


def seed_means(results: Results, variant: str, setting: str, metric: str) -> dict[int, float]:
    """Mean over the trials of one tidy metric for each of `complete_seeds`."""
    return {seed: statistics.fmean(found) for seed, found in _values(results, variant, setting, metric).items()}


def complete_seeds(results: Results, variant: str) -> list[int]:
    """Seeds of a variant for which every listed trial has a record, so that all means are over the same trials."""
    return [s for s in results.seeds if all(run_name(variant, trial, s) in results.records for trial in results.trials)]


def _used(results: Results, variant: str) -> dict[str, Record]:
    """The records of a variant's complete seeds, by run name, in table order."""
    seeds = complete_seeds(results, variant)
    names = [run_name(variant, trial, seed) for trial in results.trials for seed in seeds]
    return {name: results.records[name] for name in names}


def _values(results: Results, variant: str, setting: str, metric: str) -> dict[int, list[float]]:
    """One metric of a variant by complete seed, then trial."""
    values: dict[int, list[float]] = {}
    for name, record in _used(results, variant).items():
        found = [value for where, what, value in _metrics(record) if (where, what) == (setting, metric)]
        if (
            not found
            and setting in SETTINGS[results.layout]
            and any(map(_random_galleries, record["settings"].values()))
        ):
            return {}  # that convention knows no multi-shot search
        if not found:
            raise StudyError(f"the record of run {name} has no {metric} for {setting}; remove it and run `dvc repro`")
        values.setdefault(record["seed"], []).append(found[0])
    return values


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


# -------------------- tables

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
    """The paper's row of the variant's name, or its DANet for the variant that has both modules."""
    both = variant.modules == ("cc", "ml") and variant.epochs_factor == 1
    for row in paper:
        if row.variant == variant.label or (both and row.variant == "DANet"):
            return row
    return None


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
    used = [record for variant in results.variants for record in _used(results, variant.name).values()]
    draws = [len(one["per_trial"]) for record in used for one in record["settings"].values()]
    if not results.synthetic and max(draws, default=1) > 1:
        over.append(f"{_range(draws)} random galleries")
    if not over:
        return f"{n}: no standard deviation."
    none = "" if "seeds" in over or results.synthetic else ", so none over seeds"
    return f"Mean ± standard deviation over {' / over '.join(over)}; {n}{none}."


def _provenance(results: Results) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The runs a table is made of with the hashes of model and configuration, and notes on what they share and lack."""
    used = {name: record for row in results.variants for name, record in _used(results, row.name).items()}
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
