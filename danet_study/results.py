"""Evaluation records of one data set: which runs are comparable, and what their seeds and test identities tell.

Only the runs that params.yaml lists are read. Everything can be worked out again from `results/records`.
`python -m danet_study.results A.json B.json` compares two records.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special  # scipy.stats takes seconds to import

from danet_study.config import Bootstrap, Dataset, RunConfig, Study, load_study
from danet_study.files import StudyError, read_json
from danet_study.processes import exit_with_pipeline
from danet_study.protocols import PROTOCOLS, Protocol

Record = dict[str, Any]

METRICS = {"cmc1": "Rank-1", "mAP": "mAP"}  # of contrasts and of the bootstrap
CONFIDENCE, POWER = 0.95, 0.8
GALLERIES = 10  # draws of SYSU-MM01's protocol
SYNTHETIC = "Synthetic: rendered pedestrians, not comparable with the paper's figures."
NOT_RUN, INCONCLUSIVE = "not run", "inconclusive: the interval includes zero"
# fmt: off
_REQUIRED = ("run", "dataset", "protocol", "synthetic", "partial", "variant", "trial", "seed", "split", "settings",
             "per_identity", "within", "modality_gap", "probe", "training", "config", "evaluation", "provenance",
             "versions")
# fmt: on


# -------------------- records


@dataclass(frozen=True)
class Results:
    """The listed runs of one data set (`configs`, in table order) and the records that exist, both by run name."""

    dataset: Dataset
    configs: Mapping[str, RunConfig]
    records: Mapping[str, Record]
    bootstrap: Bootstrap

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.dataset.protocol]

    @property
    def variants(self) -> dict[str, str]:  # labels by name, in table order
        return {config.variant: config.label for config in self.configs.values()}

    @property
    def missing(self) -> list[str]:
        return [run for run in self.configs if run not in self.records]

    @property
    def notes(self) -> list[str]:
        """What sets these scores apart from the benchmark's published protocol; no line as a rule."""
        records = self.records.values()
        settings = [setting for record in records for setting in record["settings"].values()]
        notes = [SYNTHETIC] if self.dataset.synthetic else []
        if any(record["partial"] for record in records):
            notes.append("Partial: only a part of the data set was prepared, so these are not the benchmark's figures.")
        if any(setting.get("galleries") == "random_seed" for setting in settings):
            notes.append("Galleries drawn with `random.seed(trial)`: not comparable with the published galleries.")
        for metric in sorted({setting["metric"] for setting in settings if "metric" in setting}):
            notes.append(f"Ranked by {metric} distance of the features as they are, not by cosine distance.")
        draws = min((len(setting["per_trial"]["cmc1"]) for setting in settings), default=GALLERIES)
        if self.dataset.protocol == "sysu_mm01" and draws < GALLERIES:
            notes.append(f"Means over {draws} of the protocol's {GALLERIES} galleries.")
        return notes

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All scores as a tidy table: run, dataset, trial, variant, label, seed, setting, metric, value.

        Values are fractions, those of the setting `training` nats and counts.
        """
        keys, labels = ["run", "dataset", "trial", "variant", "seed"], self.variants
        rows = [[*map(record.get, keys), *score] for record in self.records.values() for score in _scores(record)]
        frame = pd.DataFrame(rows, columns=[*keys, "setting", "metric", "value"])
        frame.insert(4, "label", frame["variant"].map(labels))
        return frame

    def seeds(self, variant: str) -> list[int]:
        """Seeds of a variant for which every listed trial has a record, so that all means are over the same trials."""
        listed = [config for config in self.configs.values() if config.variant == variant]
        gaps = {config.seed for config in listed if config.name not in self.records}
        return sorted({config.seed for config in listed} - gaps)

    def values(self, variant: str, setting: str, metric: str) -> list[float]:
        """A score for each of `seeds(variant)`, averaged over the trials; empty where the setting was not scored."""
        keys = [(variant, setting, metric, seed) for seed in self.seeds(variant)]
        return [self._means[key] for key in keys if key in self._means]

    @cached_property
    def _means(self) -> dict[Any, float]:
        """Means over the trials, by variant, setting, metric and seed."""
        return self.frame.groupby(["variant", "setting", "metric", "seed"])["value"].mean().to_dict()


def load_results(study: Study, dataset: str, results: Path | str = "results") -> Results:
    """The records in `<results>/records` of the runs that `study` lists for `dataset`; a missing one is no error.

    Raises StudyError for a data set without a listed run and for records that `load_records` refuses.
    """
    configs = [config for config in study.runs() if config.dataset.name == dataset]
    if not configs:
        listed = ", ".join(study.plan.datasets)
        raise StudyError(f"params.yaml, study.splits: no split of data set {dataset!r}, only of {listed}")
    return collect(study, configs, results)


def collect(study: Study, configs: Sequence[RunConfig], results: Path | str = "results") -> Results:
    """`Results` of any runs of one data set, such as the rows of the sensitivity study."""
    records = load_records(configs, Path(results) / "records")
    return Results(configs[0].dataset, {config.name: config for config in configs}, records, study.bootstrap)


def load_records(configs: Iterable[RunConfig], folder: Path) -> dict[str, Record]:
    """The records that exist of `configs`, by run name.

    Raises StudyError for a damaged record, one of another run or data set, one made with other numbers than params.yaml
    has now, and for records over different data or backbone weights: no table may mix them.
    """
    exit_with_pipeline()  # every stage that tables or draws comes through here
    records: dict[str, Record] = {}
    for config in configs:
        path = folder / f"{config.name}.json"
        if not path.exists():
            continue
        record = load_record(path)
        _require(path, {"run": config.name, "dataset": config.dataset.name}, record)
        _require(path, {"config": config.resolved(), "evaluation": config.evaluation.model_dump()}, record)
        for name, first in list(records.items())[:1]:
            _require(path, _shared(first), _shared(record), source=name)
        records[config.name] = record
    return records


def _shared(record: Record) -> dict[str, Any]:
    """What all records of a table have in common."""
    hashes = {key: record["provenance"].get(key) for key in ("data_sha256", "weights_sha256")}
    return hashes | {key: record[key] for key in ("split", "partial", "synthetic")}


def load_record(path: Path) -> Record:
    """One evaluation record. Raises StudyError for a damaged file, a missing key or a score outside 0 to 1."""
    record = read_json(path)
    for key in _REQUIRED:
        if not isinstance(record, dict) or key not in record:
            raise StudyError(f"{path}: no key {key!r}, so it is damaged; remove it and run `dvc repro`")
    try:
        scores = list(_scores(record))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StudyError(f"{path}: scores are damaged ({error!r}); remove it and run `dvc repro`") from None
    for setting, metric, value in scores:
        if not 0 <= value <= (math.inf if setting == "training" else 1):
            raise StudyError(f"{path}: {setting} {metric} is {value}; remove the file and run `dvc repro`")
    return record


def _require(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any], source: str = "params.yaml") -> None:
    a, b = leaves(expected), leaves({key: found[key] for key in expected})
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            there, here = (str(value)[:12] if "sha256" in key else value for value in (b.get(key), a.get(key)))
            raise StudyError(f"{path}: {key} is {there}, but {here} in {source}; run `dvc repro`")


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys, its values as JSON gives them back."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: json.loads(json.dumps(value))}
    return {k: v for key in value for k, v in leaves(value[key], f"{prefix}.{key}".lstrip(".")).items()}


def _scores(record: Record) -> Iterator[tuple[str, str, float]]:
    """Setting, metric and value of every number that a table may show."""
    shares, gap, training = ("nearest", "median", "mean"), record["modality_gap"], record["training"]
    groups = {key: {**one["mean"], "chance_rank1": one["chance_rank1"]} for key, one in record["settings"].items()}
    groups |= {f"within_{key}": {"cmc1": one["cmc1"], "mAP": one["mAP"]} for key, one in record["within"].items()}
    groups["modality_gap"] = {key: gap[key] for key in shares}
    groups["modality_gap_pretrained"] = {key: gap["pretrained"][key] for key in shares}
    groups["probe"] = record["probe"]
    groups["training"] = {**training["final"], "steps": training["steps"], "epochs": training["epochs"]}
    for setting, metrics in groups.items():
        for metric, value in metrics.items():
            yield setting, metric, float(value)


# -------------------- over seeds


@dataclass(frozen=True)
class Estimate:
    """A mean or a contrast of means, with what its seeds tell about another training; NaN where n = 1.

    n: seeds of the smallest group. sd: standard deviation of a run (n - 1, pooled over groups). se: standard error.
    """

    value: float
    n: int
    sd: float
    se: float
    df: int

    @property
    def critical(self) -> float:
        """The t value that the interval ends at."""
        return float(special.stdtrit(self.df, (1 + CONFIDENCE) / 2))

    @property
    def half(self) -> float:
        """Half the width of the 95 % t interval."""
        return self.critical * self.se

    @property
    def p(self) -> float:
        """Two-sided p value of the t test against zero."""
        if self.se == 0:
            return float(self.value == 0)
        return float(2 * special.stdtr(self.df, -abs(self.value) / self.se))

    @property
    def prediction_half(self) -> float:
        """Half the width of the 95 % interval that one further run falls into: t(n - 1) * sd * sqrt(1 + 1 / n)."""
        return self.critical * self.sd * math.sqrt(1 + 1 / self.n)

    @property
    def detectable(self) -> float:
        """The smallest true value that this test finds with 80 % power, were `se` the true one."""
        if math.isnan(self.se):
            return math.nan
        # noncentrality at which the t statistic exceeds `critical` with 80 %; the far tail adds next to nothing
        return float(special.nctdtrinc(self.df, 1 - POWER, self.critical) * self.se)

    def verdict(self, above: str = "helps", below: str = "hurts") -> str:
        """Which side of zero the 95 % interval lies on."""
        if math.isnan(self.half):
            return f"not tested (n = {self.n})"
        if abs(self.value) <= self.half:
            return INCONCLUSIVE
        return above if self.value > 0 else below


def estimate(groups: Sequence[Sequence[float]], weights: Sequence[float] = (1.0,)) -> Estimate | None:
    """The weighted sum of the groups' means, its variance pooled over all groups; None where a weighted group is empty.

    Groups of weight 0 only help to estimate the variance. Two groups and weights 1, -1 give Student's t test, not
    paired by seed.
    """
    used = [(group, weight) for group, weight in zip(groups, weights, strict=True) if weight]
    if not all(group for group, _ in used):
        return None
    value, n = sum(weight * float(np.mean(group)) for group, weight in used), min(len(group) for group, _ in used)
    if n == 1:
        return Estimate(value, 1, math.nan, math.nan, 0)
    filled = [group for group in groups if group]
    df = sum(len(group) - 1 for group in filled)
    variance = sum(float(np.var(group)) * len(group) for group in filled) / df
    error = math.sqrt(variance * sum(weight**2 / len(group) for group, weight in used))
    return Estimate(value, n, math.sqrt(variance), error, df)


def score(results: Results, variant: str, setting: str, metric: str, scale: float = 100.0) -> Estimate | None:
    """Mean over seeds of one score of a variant, in percent unless `scale` is 1; None where it was not run."""
    return estimate([[scale * value for value in results.values(variant, setting, metric)]])


# -------------------- contrasts between variants


class Contrast(NamedTuple):
    """A weighted sum of variants, and what it is called when it lies above and below zero."""

    name: str
    weights: dict[str, float]
    above: str = "helps"
    below: str = "hurts"


def factorial(results: Results) -> dict[str, str]:
    """The variants that are the cells of the 2 x 2 design, as far as listed: keys baseline, cc, ml, both.

    CC is the term L_cc, ML is L_M (with L_sid). The Baseline is the first listed variant with neither; the others
    differ from it in these terms only, and "both" has the terms of "cc" and "ml" as they are there.
    """
    configs: dict[str, RunConfig] = {}
    for config in results.configs.values():
        configs.setdefault(config.variant, config)
    cells: dict[str, str] = {}
    for cell, terms in (("baseline", set()), ("cc", {"L_cc"}), ("ml", {"L_M"}), ("both", {"L_cc", "L_M"})):
        for name, config in configs.items():
            first = configs[cells.get("baseline", name)]
            parts = [configs[part].losses for part in cells.values()] if cell == "both" else [first.losses]
            alike = (config.recipe, config.model) == (first.recipe, first.model)
            alike &= all(losses.items() <= config.losses.items() for losses in parts)
            alike &= config.losses.keys() <= first.losses.keys() | {"L_cc", "L_sid", "L_M"}
            if alike and config.losses.keys() & {"L_cc", "L_M"} == terms:
                cells.setdefault(cell, name)
    return cells if "baseline" in cells else {}


def contrasts(results: Results) -> list[Contrast]:
    """The effects of the 2 x 2 design, its interaction, and every further variant less the Baseline."""
    cells, found = factorial(results), []
    pairs = {
        "CC given Baseline": ("cc", "baseline"),
        "ML given Baseline": ("ml", "baseline"),
        "CC given ML": ("both", "ml"),
        "ML given CC": ("both", "cc"),
        "CC and ML given Baseline": ("both", "baseline"),
    }
    for name, (a, b) in pairs.items():
        if a in cells and b in cells:
            found.append(Contrast(name, {cells[a]: 1.0, cells[b]: -1.0}))
    if len(cells) == 4:
        weights = {cells["both"]: 1.0, cells["cc"]: -1.0, cells["ml"]: -1.0, cells["baseline"]: 1.0}
        found.append(Contrast("interaction of CC and ML", weights, "more than additive", "less than additive"))
    for name, label in results.variants.items():
        if cells and name not in cells.values():
            baseline = cells["baseline"]
            found.append(Contrast(f"{label} − {results.variants[baseline]}", {name: 1.0, baseline: -1.0}))
    return found


def effect(results: Results, contrast: Contrast, metric: str) -> Estimate | None:
    """A contrast in the ablation's setting, in points, with the variance pooled over all variants; None if not run."""
    if not contrast.weights.keys() <= results.variants.keys():
        return None
    setting = results.protocol.ablation
    groups = [[100 * value for value in results.values(name, setting, metric)] for name in results.variants]
    return estimate(groups, [contrast.weights.get(name, 0.0) for name in results.variants])


def differences(results: Results) -> pd.DataFrame:
    """All contrasts in Rank-1 and mAP of the ablation's setting, in points, with both kinds of interval.

    low, high, p, detectable: over seeds (another training). gallery_low, gallery_high: over test identities, with these
    models and this gallery (`identity_bootstrap`). p is not corrected for the number of contrasts.
    """
    rows = []
    for contrast in contrasts(results):
        for metric, title in METRICS.items():
            one = effect(results, contrast, metric)
            row: dict[str, Any] = {
                "dataset": results.dataset.name,
                "synthetic": results.dataset.synthetic,
                "setting": results.protocol.ablation,
                "contrast": contrast.name,
                "variants": " ".join(f"{weight:+.0f}*{name}" for name, weight in contrast.weights.items()),
                "metric": title,
                "verdict": one.verdict(contrast.above, contrast.below) if one else NOT_RUN,
            }
            if one:
                row |= {"difference": one.value, "low": one.value - one.half, "high": one.value + one.half}
                row |= {"n": one.n, "df": one.df, "p": one.p, "detectable": one.detectable}
                row |= identity_bootstrap(results, contrast, metric)
            rows.append(row)
    order = "dataset synthetic setting contrast variants metric difference low high n df p detectable verdict"
    return pd.DataFrame(rows, columns=[*order.split(), "gallery_low", "gallery_high", "identities"])


# -------------------- over test identities


def paired_bootstrap(
    values: Float[np.ndarray, "S P"], n: Float[np.ndarray, "S P"], *, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean over queries, then splits, when test identities are drawn with replacement.

    values: score differences by split and identity, means over the identity's queries. n: valid queries of each, 0
    where a split does not test the identity. An identity is drawn with all its queries, of all splits: they show one
    person in the same clothes. The models and the gallery are fixed, so the interval holds with this gallery and says
    nothing about another training.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    people = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), resamples)
    queries = drawn @ n.T
    sums = np.divide(drawn @ (n * values).T, queries, out=np.zeros(queries.shape), where=queries > 0)
    means = sums.sum(axis=1) / (queries > 0).sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def identity_bootstrap(results: Results, contrast: Contrast, metric: str) -> dict[str, float]:
    """`paired_bootstrap` of a contrast in points (gallery_low, gallery_high), each variant averaged over its seeds."""
    every = results.records.values()
    records = {
        name: [record for record in every if record["variant"] == name and record["seed"] in results.seeds(name)]
        for name in contrast.weights
    }
    return _bootstrap(records, contrast.weights, metric, results.bootstrap)


def _bootstrap(
    records: Mapping[str, Sequence[Record]], weights: Mapping[str, float], metric: str, numbers: Bootstrap
) -> dict[str, float]:
    key = {"cmc1": "cmc1", "mAP": "ap"}[metric]
    tables = {name: pd.concat([_identities(record) for record in found]) for name, found in records.items()}
    counts = pd.concat(tables.values()).groupby(["trial", "pid"])["n"].agg(["min", "max"])
    if (counts["min"] != counts["max"]).any() or len({frozenset(table.index) for table in tables.values()}) > 1:
        raise StudyError(f"{' and '.join(records)}: test queries differ between the records; run `dvc repro`")
    means = [weights[name] * table.groupby(["trial", "pid"])[key].mean() for name, table in tables.items()]
    change = 100 * sum(means[1:], means[0])
    values, n = (table.unstack(fill_value=0).to_numpy(float) for table in (change, counts["min"]))
    low, high = paired_bootstrap(
        values, n, resamples=numbers.resamples, confidence=numbers.confidence, seed=numbers.seed
    )
    return {"gallery_low": low, "gallery_high": high, "identities": values.shape[1]}


def _identities(record: Record) -> pd.DataFrame:
    found = record["per_identity"]
    index = pd.MultiIndex.from_product([[record["trial"]], found["pids"]], names=["trial", "pid"])
    return pd.DataFrame({key: found[key] for key in ("n", "cmc1", "ap")}, index=index)


# -------------------- two runs


class Comparison(NamedTuple):
    """Two records: where their configurations differ, scores in percent, and differences with intervals."""

    configuration: pd.DataFrame
    scores: pd.DataFrame
    identities: pd.DataFrame


def compare(a: Record, b: Record, bootstrap: Bootstrap) -> Comparison:
    """Two runs over the same test identities, whatever their configurations: b less a, in points.

    Raises StudyError when they were tested on different data.
    """
    for key, one, other in (("protocol", a, b), ("data_sha256", a["provenance"], b["provenance"])):
        if one[key] != other[key]:
            raise StudyError(f"{a['run']} and {b['run']}: {key} differs, so their scores cannot be compared")
    ours, theirs = (leaves({key: record[key] for key in ("config", "evaluation")}) for record in (a, b))
    values = [(k, ours.get(k, "absent"), theirs.get(k, "absent")) for k in sorted(ours.keys() | theirs.keys())]
    changed = [row for row in values if row[1] != row[2]]
    rows, resampled = [], []
    for setting in (name for name in a["settings"] if name in b["settings"]):
        for metric, title in METRICS.items():
            one, other = (100 * record["settings"][setting]["mean"][metric] for record in (a, b))
            rows.append((setting, title, one, other, other - one))
            if setting == PROTOCOLS[a["protocol"]].ablation:
                found = _bootstrap({"a": [a], "b": [b]}, {"a": -1.0, "b": 1.0}, metric, bootstrap)
                resampled.append({"metric": title, "difference": other - one, **found})
    scores = pd.DataFrame(rows, columns=["setting", "metric", "a", "b", "difference"])
    return Comparison(pd.DataFrame(changed, columns=["key", "a", "b"]), scores, pd.DataFrame(resampled))


def main() -> None:
    """`python -m danet_study.results A.json B.json`: print what differs between two evaluation records."""
    parser = argparse.ArgumentParser(prog="python -m danet_study.results", description=main.__doc__)
    parser.add_argument("records", nargs=2, type=Path, metavar="RECORD", help="results/records/<run>.json")
    parser.add_argument("--params", default="params.yaml")
    arguments = parser.parse_args()
    try:
        a, b = map(load_record, arguments.records)
        found = compare(a, b, load_study(arguments.params).bootstrap)
    except StudyError as error:
        raise SystemExit(f"results: {error}") from None
    print(f"a: {a['run']}\nb: {b['run']}\n\n{found.configuration.to_string(index=False)}\n")
    for table in (found.scores, found.identities):
        print(table.to_string(index=False, float_format="%.2f"), end="\n\n")
    print("gallery_low, gallery_high: interval over test identities, with these two models and this gallery.")


if __name__ == "__main__":
    main()
