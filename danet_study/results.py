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
from typing import Any

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
CONTRASTS = {  # weights of the cells of the 2 x 2 design, and the paper's claim
    "CC given Baseline": ({"cc": 1, "baseline": -1}, "CC helps"),
    "CC given ML": ({"both": 1, "ml": -1}, "CC helps"),
    "ML given Baseline": ({"ml": 1, "baseline": -1}, "ML helps"),
    "ML given CC": ({"both": 1, "cc": -1}, "ML helps"),
    "CC and ML given Baseline": ({"both": 1, "baseline": -1}, "both help"),
    "interaction of CC and ML": ({"both": 1, "cc": -1, "ml": -1, "baseline": 1}, "both add up"),
}
LEVEL, POWER = 0.05, 0.8
GALLERIES = 10  # draws of SYSU-MM01's and LLCM's protocols
SYNTHETIC = "Synthetic: rendered pedestrians, not comparable with the paper's figures."
NOT_RUN, INCONCLUSIVE = "not run", "inconclusive"
_REQUIRED = (
    *("run", "dataset", "protocol", "synthetic", "partial", "variant", "trial", "seed", "split", "settings", "within"),
    *("per_identity", "modality_gap", "probe", "training", "config", "evaluation", "provenance", "versions"),
)


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
    def title(self) -> str:
        """The data set as captions name it; a rendered one says so whatever its title."""
        title = self.dataset.title
        return f"{title} (rendered)" if self.dataset.synthetic and "rendered" not in title else title

    @property
    def variants(self) -> dict[str, str]:  # labels by name, in table order
        return {config.variant: config.label for config in self.configs.values()}

    @property
    def notes(self) -> list[str]:
        """What sets these scores apart from the benchmark's published protocol; no line as a rule."""
        records = self.records.values()
        settings = [setting for record in records for setting in record["settings"].values()]
        notes = [SYNTHETIC] if self.dataset.synthetic else []
        if any(record["split"] == "val" for record in records):
            notes.append("Scored on validation identities.")
        if any(record["partial"] for record in records):
            notes.append("Partial: only a part of the data set was prepared, so these are not the benchmark's figures.")
        if any(setting.get("galleries") == "random_seed" for setting in settings):
            notes.append("Galleries drawn with `random.seed(trial)`: not comparable with the published galleries.")
        for metric in sorted({setting["metric"] for setting in settings if "metric" in setting}):
            notes.append(f"Ranked by {metric} distance of the features as they are, not by cosine distance.")
        draws = min((len(setting["per_trial"]["cmc1"]) for setting in settings), default=GALLERIES)
        if self.dataset.protocol in ("sysu_mm01", "llcm") and draws < GALLERIES:
            notes.append(f"Means over {draws} of the protocol's {GALLERIES} galleries.")
        return notes

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All scores as a tidy table: run, dataset, trial, variant, label, seed, setting, metric, value.

        Values are fractions. Those of the setting `training` are nats and counts.
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

    def of(self, variant: str) -> list[Record]:
        """The records of a variant's `seeds`."""
        seeds = self.seeds(variant)
        return [one for one in self.records.values() if one["variant"] == variant and one["seed"] in seeds]

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
    records = load_records(configs, Path(results) / "records")
    return Results(configs[0].dataset, {config.name: config for config in configs}, records, study.bootstrap)


def load_records(configs: Iterable[RunConfig], folder: Path, *, skip_stale: bool = False) -> dict[str, Record]:
    """The records that exist of `configs`, by run name.

    Raises StudyError for a damaged record, one of another run or data set, one made with other numbers than params.yaml
    has now, and for records over different data or backbone weights: no table may mix them. With `skip_stale` such a
    record is left out, unless it is damaged.
    """
    exit_with_pipeline()  # every stage that tables or draws comes through here
    records: dict[str, Record] = {}
    for config in configs:
        path = folder / f"{config.name}.json"
        if not path.exists():
            continue
        record = load_record(path)
        first = next(iter(records.values()), record)
        made = {"run": config.name, "dataset": config.dataset.name, "config": config.resolved()}
        made["evaluation"] = config.evaluation.model_dump()
        shared = _differing(_shared(first), _shared(record), first["run"])
        stale = [*_differing(made, record, "params.yaml"), *shared]
        if not stale:
            records[config.name] = record
        elif not skip_stale:
            raise StudyError(f"{path}: {stale[0]}; run `dvc repro`")
    return records


def _shared(record: Record) -> dict[str, Any]:
    """What all records of a table have in common."""
    hashes = {key: record["provenance"].get(key) for key in ("data_sha256", "weights_sha256")}
    return hashes | {key: record[key] for key in ("split", "partial", "synthetic")}


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any], source: str) -> Iterator[str]:
    a, b = leaves(expected), leaves({key: found[key] for key in expected})
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            there, here = (str(value)[:12] if "sha256" in key else value for value in (b.get(key), a.get(key)))
            yield f"{key} is {there}, but {here} in {source}"


def load_record(path: Path) -> Record:
    """One evaluation record. Raises StudyError for a damaged file, a missing key or a score outside 0 to 1."""
    record = read_json(path)
    try:
        limits = {"training": math.inf, "classifiers": math.inf}  # nats, counts and ratios
        faults = [f"no key {key!r}" for key in _REQUIRED if key not in record] or [
            f"{setting} {metric} is {value}"
            for setting, metric, value in _scores(record)
            if not (-1 if metric == "cosine" else 0) <= value <= limits.get(setting, 1)
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        faults = [f"scores are damaged ({error!r})"]
    if faults:
        raise StudyError(f"{path}: {faults[0]}; remove the file and run `dvc repro`")
    return record


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
    if one := record.get("classifiers"):  # of variants that train C_v and C_r
        accuracy = {f"{head}_{side}": share for head, sides in one["accuracy"].items() for side, share in sides.items()}
        ratios = {term: ratio["mean"] for term, ratio in one["gradient"].items()}
        groups["classifiers"] = {"cosine": one["cosine"]["mean"], **accuracy, **ratios}
    for setting, metrics in groups.items():
        for metric, value in metrics.items():
            yield setting, metric, float(value)


# -------------------- over seeds


@dataclass(frozen=True)
class Estimate:
    """A mean or a contrast of means, with what its seeds tell about another training; NaN where n = 1."""

    value: float
    n: int  # seeds of the smallest group
    df: int = 0
    sd: float = math.nan  # standard deviation of a run (n - 1, pooled over groups)
    se: float = math.nan  # standard error of `value`
    half: float = math.nan  # half the width of the 95 % t interval
    p: float = math.nan  # two-sided t test against zero
    prediction_half: float = math.nan  # of the 95 % interval of one further run: t(n - 1) * sd * sqrt(1 + 1 / n)
    detectable: float = math.nan  # the smallest true value that the test finds with 80 % power, were `se` the true one

    def verdict(self, above: str = "helps", below: str = "hurts") -> str:
        """Which side of zero the 95 % interval lies on."""
        if math.isnan(self.half):
            return f"not tested (n = {self.n})"
        if abs(self.value) <= self.half:
            return INCONCLUSIVE
        return above if self.value > 0 else below

    def row(self, above: str = "helps", below: str = "hurts") -> dict[str, Any]:
        """What a table of differences says of it."""
        low, high = self.value - self.half, self.value + self.half
        row = {"difference": self.value, "low": low, "high": high, "n": self.n, "df": self.df, "p": self.p}
        return {**row, "detectable": self.detectable, "verdict": self.verdict(above, below)}


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
        return Estimate(value, 1)
    filled = [group for group in groups if group]
    df = sum(len(group) - 1 for group in filled)
    centered = [np.asarray(group) - group[0] for group in filled]  # equal values: a variance of exactly 0
    variance = sum(float(np.var(group)) * len(group) for group in centered) / df
    sd, se = math.sqrt(variance), math.sqrt(variance * sum(weight**2 / len(group) for group, weight in used))
    p = 2 * special.stdtr(df, -abs(value) / se) if se else value == 0
    t = special.stdtrit(df, 1 - LEVEL / 2)
    # noncentrality at which the t statistic exceeds t with 80 %; the far tail adds next to nothing
    detectable = special.nctdtrinc(df, 1 - POWER, t) * se
    return Estimate(value, n, df, sd, se, t * se, float(p), t * sd * math.sqrt(1 + 1 / n), detectable)


def score(results: Results, variant: str, setting: str, metric: str, scale: float | None = None) -> Estimate | None:
    """Mean over seeds of one score of a variant, in percent (`training`: as it is); None where it was not run."""
    scale = scale or (1.0 if setting == "training" else 100.0)
    return estimate([[scale * value for value in results.values(variant, setting, metric)]])


# -------------------- contrasts between variants


def factorial(results: Results) -> dict[str, str]:
    """The variants that are the cells of the 2 x 2 design, as far as listed: keys baseline, cc, ml, both.

    CC is the term L_cc, ML is L_M (with L_sid). The Baseline is the first listed variant with neither; the others
    differ from it in these terms only, and "both" has the terms of "cc" and "ml" as they are there.
    """
    configs = {config.variant: config for config in results.configs.values()}
    plain = [name for name, config in configs.items() if not config.losses.keys() & {"L_cc", "L_M"}]
    if not plain:
        return {}
    base = configs[plain[0]]
    added = {  # terms, by variant
        name: {term: config.losses[term] for term in config.losses.keys() - base.losses.keys()}
        for name, config in configs.items()
        if (config.recipe, config.model) == (base.recipe, base.model) and base.losses.items() <= config.losses.items()
    }
    cells = {"baseline": plain[0]}
    for cell, wanted in {"cc": {"L_cc"}, "ml": {"L_M"}, "both": {"L_cc", "L_M"}}.items():
        parts = [added[name] for name in cells.values()] if cell == "both" else []
        for name, terms in added.items():
            if terms.keys() - {"L_sid"} == wanted and all(part.items() <= terms.items() for part in parts):
                cells.setdefault(cell, name)
    return cells


def contrasts(results: Results) -> dict[str, dict[str, int]]:
    """Weights of variants by name: the 2 x 2 design as far as it is listed, then every other variant less Baseline."""
    cells, labels = factorial(results), results.variants
    found = {
        name: {cells[cell]: weight for cell, weight in weights.items()}
        for name, (weights, _) in CONTRASTS.items()
        if weights.keys() <= cells.keys()
    }
    for name in labels:
        if cells and name not in cells.values():
            found[f"{labels[name]} − {labels[cells['baseline']]}"] = {name: 1, cells["baseline"]: -1}
    return found


def effect(results: Results, weights: Mapping[str, int], metric: str) -> Estimate | None:
    """A contrast in the ablation's setting, in points, with the variance pooled over all variants; None if not run."""
    setting = results.protocol.ablation
    groups = [[100 * value for value in results.values(name, setting, metric)] for name in results.variants]
    return estimate(groups, [weights.get(name, 0) for name in results.variants])


def differences(results: Results) -> pd.DataFrame:
    """All contrasts in Rank-1 and mAP of the ablation's setting, in points, with both kinds of interval.

    low, high, p, holm, detectable: over seeds (another training). gallery_low, gallery_high: over test identities, with
    these models and this gallery (`over_identities`).
    """
    setting, rows = results.protocol.ablation, []
    start = {"dataset": results.dataset.name, "synthetic": results.dataset.synthetic, "setting": setting}
    for contrast, weights in contrasts(results).items():
        words = ("helps", "hurts") if len(weights) == 2 else ("more than additive", "less than additive")
        for metric, title in METRICS.items():
            variants = " ".join(f"{weight:+}*{name}" for name, weight in weights.items())
            row = {**start, "contrast": contrast, "variants": variants, "metric": title, "verdict": NOT_RUN}
            if one := effect(results, weights, metric):
                values, n = identity_differences({name: results.of(name) for name in weights}, weights, metric)
                low, high, _ = over_identities(values, n, results.bootstrap)
                row |= {**one.row(*words), "gallery_low": low, "gallery_high": high, "identities": values.shape[1]}
            rows.append(row)
    order = "dataset synthetic setting contrast variants metric difference low high n df p holm detectable verdict"
    return adjust(pd.DataFrame(rows, columns=[*order.split(), "gallery_low", "gallery_high", "identities"]))


def adjust(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column `holm`: p adjusted for all rows of a score. A row above `LEVEL` is inconclusive."""
    for _, rows in table[table["p"].notna()].groupby("metric"):
        table.loc[rows.index, "holm"] = holm(rows["p"].to_numpy(float))
    return table.assign(verdict=table["verdict"].mask(table["holm"] > LEVEL, INCONCLUSIVE))


def holm(p: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Holm-Bonferroni adjusted p values: the k-th smallest of N times N - k + 1, made monotone, at most 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


# -------------------- over test identities


def over_identities(
    values: Float[np.ndarray, "S P"], n: Float[np.ndarray, "S P"], numbers: Bootstrap
) -> tuple[float, float, float]:
    """The mean over queries, then splits: low and high of its interval over test identities, and p of no difference.

    values: score differences by split and identity, means over the identity's queries. n: valid queries of each, 0
    where a split does not test the identity. An identity is drawn with all its queries, of all splits: they show one
    person in the same clothes. The models and the gallery are fixed, so the test holds with this gallery and says
    nothing about another training. Interval: percentiles of draws with replacement (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993). p: two-sided, the sign of each identity's difference is drawn (Fisher, "The
    Design of Experiments", 1935).
    """
    people, rng = values.shape[1], np.random.default_rng(numbers.seed)
    drawn = rng.multinomial(people, np.full(people, 1 / people), numbers.resamples)
    queries = drawn @ n.T
    sums = np.divide(drawn @ (n * values).T, queries, out=np.zeros(queries.shape), where=queries > 0)
    means = sums.sum(axis=1) / (queries > 0).sum(axis=1)
    low, high = np.quantile(means, [(1 - numbers.confidence) / 2, (1 + numbers.confidence) / 2])
    shares = (n * values / n.sum(axis=1, keepdims=True)).mean(axis=0)
    signs = rng.choice([-1.0, 1.0], (numbers.resamples, people))
    extreme = np.abs(signs @ shares) >= abs(shares.sum()) - 1e-9
    return float(low), float(high), (1 + int(extreme.sum())) / (1 + numbers.resamples)


def identity_differences(
    records: Mapping[str, Sequence[Record]], weights: Mapping[str, int], metric: str
) -> tuple[Float[np.ndarray, "S P"], Float[np.ndarray, "S P"]]:
    """A weighted sum of variants in points by split and test identity, and the valid queries of each.

    records: of each variant, averaged over its seeds. Raises StudyError if they were not tested on the same queries.
    """
    key = {"cmc1": "cmc1", "mAP": "ap"}[metric]
    rows = [
        (name, one["trial"], *values)
        for name, found in records.items()
        for one in found
        for values in zip(*(one["per_identity"][column] for column in ("pids", "n", key)), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["variant", "trial", "pid", "n", "score"])
    means = frame.pivot_table(index=["trial", "pid"], columns="variant", values="score")
    n = frame.groupby(["trial", "pid"])["n"].agg(["min", "max"])
    if means.isna().any(axis=None) or (n["min"] != n["max"]).any():
        raise StudyError(f"{' and '.join(records)}: test queries differ between the records; run `dvc repro`")
    change = 100 * means[list(weights)].dot(pd.Series(weights))
    values, counts = (table.unstack(fill_value=0).to_numpy(float) for table in (change, n["min"]))
    return values, counts


# -------------------- two runs


def compare(a: Record, b: Record, bootstrap: Bootstrap) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two runs over the same test identities, whatever their configurations: what differs, and scores in percent.

    Configuration: key, a, b. Scores: setting, metric, a, b, difference (b less a); in the ablation's setting also
    intervals over test identities and p (`over_identities`), with these two models and this gallery.
    Raises StudyError when they were tested on different data or queries.
    """
    for key, one, other in (("protocol", a, b), ("data_sha256", a["provenance"], b["provenance"])):
        if one[key] != other[key]:
            raise StudyError(f"{a['run']} and {b['run']}: {key} differs; choose two records of the same test set")
    parts = [{key: record[key] for key in ("config", "evaluation", "versions")} for record in (a, b)]
    ours, theirs = (pd.Series(leaves(part), dtype=object) for part in parts)
    configuration = pd.DataFrame({"a": ours, "b": theirs}).fillna("absent").rename_axis("key").reset_index()
    records, rows = {"a": [a], "b": [b]}, []
    for setting in (name for name in a["settings"] if name in b["settings"]):
        for metric, title in METRICS.items():
            one, other = (100 * record["settings"][setting]["mean"][metric] for record in (a, b))
            row = {"setting": setting, "metric": title, "a": one, "b": other, "difference": other - one}
            if setting == PROTOCOLS[a["protocol"]].ablation:
                for prefix, weights in {"a_": {"a": 1}, "b_": {"b": 1}, "": {"a": -1, "b": 1}}.items():
                    low, high, p = over_identities(*identity_differences(records, weights, metric), bootstrap)
                    row |= {f"{prefix}low": low, f"{prefix}high": high, "p": p}  # p: the last, of the difference
            rows.append(row)
    order = "setting metric a a_low a_high b b_low b_high difference low high p"
    return configuration[configuration["a"] != configuration["b"]], pd.DataFrame(rows, columns=order.split())


def main() -> None:
    """`python -m danet_study.results A.json B.json`: print what differs between two evaluation records."""
    parser = argparse.ArgumentParser(prog="python -m danet_study.results", description=main.__doc__)
    parser.add_argument("records", nargs=2, type=Path, metavar="RECORD", help="results/records/<run>.json")
    parser.add_argument("--params", default="params.yaml")
    arguments = parser.parse_args()
    try:
        a, b = map(load_record, arguments.records)
        configuration, scores = compare(a, b, load_study(arguments.params).bootstrap)
    except StudyError as error:
        raise SystemExit(f"results: {error}") from None
    print(*(f"{name}: {path}" for name, path in zip("ab", arguments.records, strict=True)), sep="\n", end="\n\n")
    print("same configuration" if configuration.empty else configuration.to_string(index=False), end="\n\n")
    p_text = scores["p"].map("{:.4f}".format, na_action="ignore")
    print(scores.assign(p=p_text).to_string(index=False, float_format="%.2f", na_rep=""))
    print("low, high, p: over test identities, with these two models and this gallery; not over another training.")


if __name__ == "__main__":
    main()
