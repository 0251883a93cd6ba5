"""The evaluation records of the listed runs, and mean and spread of every score in them.

What is shown comes from the records of the runs that params.yaml lists and from nothing else: a run without a record is
"not run", a record of a run that is not listed is left alone, and records that differ in more than variant, trial and
seed never stand side by side. No torch: all of it can be worked out again from `results/` alone.
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

from danet_core.files import StudyError, read_json
from danet_core.runs import read_features, read_training_record
from danet_core.tables import Score

if TYPE_CHECKING:
    from danet_core.config import Study
    from danet_core.parameters import Bootstrap

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
METRIC_NOTE = "Ranked by {} distance between the features as they are, not by cosine distance."
GALLERIES = 10  # random galleries of SYSU-MM01's protocol
FEWER_NOTE = "Means over {} of the protocol's ten random galleries: not the benchmark's figures."
RERANK_NOTE = "Re-ranked by k-reciprocal neighbours ({}): not comparable with scores without re-ranking."

# fmt: off
_REQUIRED = ("dataset", "title", "layout", "synthetic", "partial", "variant", "label", "trial", "seed", "split",
             "settings", "within", "figure1", "probe", "training", "provenance", "config", "evaluation")
# fmt: on
_FREE = ("config.trial", "config.seed")  # may differ within a table


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
    bootstrap: Bootstrap

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

        A part of the data set, SYSU-MM01's other gallery convention (a setting has `galleries: random_seed`), fewer
        than its ten galleries, another distance than cosine (a setting has `metric`), and re-ranking (a setting has
        `rerank`, a mapping of its parameters).
        """
        notes = [PARTIAL_NOTE] if self.partial else []
        settings = [one for record in self.records.values() for one in record["settings"].values()]
        if any(_random_galleries(one) for one in settings):
            notes.append(RANDOM_SEED_NOTE)
        drawn = min((len(one["per_trial"]) for one in settings), default=GALLERIES)
        if self.layout == "sysu" and drawn < GALLERIES:
            notes.append(FEWER_NOTE.format(drawn))
        # dict.fromkeys: a set that keeps its order
        for metric in dict.fromkeys(one["metric"] for one in settings if one.get("metric")):
            notes.append(METRIC_NOTE.format(metric))
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

    A listed run without a record is no error. Title and labels are those of `study` now. Raises StudyError for an
    unknown data set, a damaged record, a record of another data set or run, and records that cannot stand in one table
    (see `check_comparable`).
    """
    row = study.dataset(dataset)
    variants = []
    for name in study.study.variants:
        variant = study.variants[name]
        modules = tuple(key for key in ("cc", "ml") if getattr(variant, key) is not None)
        variants.append(VariantRow(name, variant.label, modules, variant.epochs_factor))
    trials = (1,) if row.layout == "sysu" else study.study.trials
    seeds, root = study.study.seeds, Path(root)
    named = dataset, row.title, row.layout, row.synthetic
    results = Results(*named, tuple(variants), trials, seeds, {}, root, study.bootstrap)
    records = {}
    for name in results.runs:
        path = root / "results" / dataset / "metrics" / f"{name}.json"
        if path.exists():
            records[name] = load_record(path)
            for key in ("dataset", "layout", "synthetic"):
                _expect(path, key, records[name][key], getattr(results, key))
            # Words of params.yaml, not of the run: figures say what the tables beside them say.
            records[name] |= {"title": row.title, "label": study.variants[records[name]["variant"]].label}
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


def tidy(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a tidy table: one row per variant, trial, seed, setting and metric, scores as fractions.

    Settings are the protocol's (`all_single`, `thermal_to_visible`, ...), the same with `:identity_level` for RegDB's
    identity-level CMC, `within_visible` and `within_infrared`, `figure1`, `probe` and `training`.
    """
    rows = [(r["variant"], r["trial"], r["seed"], *metric) for r in records for metric in _metrics(r)]
    return pd.DataFrame(rows, columns=["variant", "trial", "seed", "setting", "metric", "value"])


def load_training(results: Results) -> list[Record]:
    """The training records (`runs/<dataset>/<run>/record.json`) of the listed runs that exist, in table order.

    Labels are those of params.yaml now.
    """
    labels = {row.name: row.label for row in results.variants}
    paths = [results.root / "runs" / results.dataset / run / "record.json" for run in results.runs]
    records = [read_training_record(path) for path in paths if path.exists()]
    return [{**record, "label": labels[record["variant"]]} for record in records]


def load_features(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Test features of the first run with scores of each variant: keys feat (N, D), pids (N,), modalities (N,).

    `feat` is the feature that retrieval uses (`test_feature` of the recipe: before or after the BN neck).
    Raises StudyError for a missing or damaged file: a figure that left a variant out would not say so.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for run, record in results.records.items():
        if record["variant"] not in found:
            path = results.root / "runs" / results.dataset / run / "features.npz"
            recipe = read_training_record(path.with_name("record.json"))["config"]["dataset"]["recipe"]
            feat = "feat_bn" if recipe["test_feature"] == "after_bn" else "feat"
            arrays = read_features(path, (feat, "pids", "modalities"))
            found[record["variant"]] = {"feat": arrays.pop(feat), **arrays}
    return found


def check_comparable(records: Mapping[str, Record]) -> None:
    """Refuse to set runs side by side that differ in more than variant, trial and seed.

    Compared are the resolved configurations, how they were evaluated, on which split, and the hashes of data and
    backbone weights; within one variant its own row too, and between variants the numbers and readings of a module that
    both have. Raises StudyError naming both runs, key and values.
    """
    first: dict[str, tuple[str, dict[str, Any]]] = {}  # the run each is compared with, and what they have to share
    for name, record in records.items():
        leaves = dict(_leaves(record["config"], "config"))
        leaves |= {f"provenance.{key}": record["provenance"][key] for key in ("data_sha256", "weights_sha256")}
        leaves |= {key: record[key] for key in ("split", "partial")}
        leaves |= _leaves(record["evaluation"], "evaluation")
        own = {key: value for key, value in leaves.items() if key not in _FREE}
        shared = {key: value for key, value in own.items() if not key.startswith("config.variant")}
        groups = [("", shared), (f"variant {record['variant']}", own)]
        for module in ("cc", "ml"):
            numbers = {key: value for key, value in own.items() if key.startswith(f"config.variant.{module}.")}
            groups += [(module, numbers)] if numbers else []
        for group, found in groups:
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
    groups["probe"] = record["probe"]
    training = record["training"]
    groups["training"] = {**training["final"], **{key: training[key] for key in ("steps", "epochs")}}
    for setting, metrics in groups.items():
        for metric, value in metrics.items():
            if value is not None:  # a loss term the variant does not have
                yield setting, metric, float(value)


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
        for record in used_records(results, variant).values()
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


def used_records(results: Results, variant: str) -> dict[str, Record]:
    """The records of a variant's complete seeds, by run name, in table order."""
    seeds = complete_seeds(results, variant)
    names = [run_name(variant, trial, seed) for trial in results.trials for seed in seeds]
    return {name: results.records[name] for name in names}


def _values(results: Results, variant: str, setting: str, metric: str) -> dict[int, list[float]]:
    """One metric of a variant by complete seed, then trial."""
    values: dict[int, list[float]] = {}
    for name, record in used_records(results, variant).items():
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
