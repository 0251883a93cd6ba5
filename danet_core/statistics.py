"""How sure a difference between two variants is, given who was photographed: a paired bootstrap over test identities.

It says nothing about another training: the trained models are held fixed. That spread is the one over seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from danet_core.files import StudyError
from danet_core.scores import ABLATION_SETTING, Results, complete_seeds, run_name

METRICS = {"cmc1": "Rank-1", "ap": "mAP"}  # of a record's `per_query`, and what their means are called
_AT_ONCE = 2**20  # numbers drawn at a time: 8 MB per 64-bit array, however many resamples there are


@dataclass(frozen=True)
class Interval:
    """A difference of means, with the interval that resampling gave it, in the unit of the scores."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """A variant less the Baseline in one metric, in points, and what was resampled."""

    variant: str
    metric: str
    interval: Interval
    seeds: int
    identities: int
    queries: int


def paired_bootstrap(
    differences: Float[np.ndarray, " M"],
    identities: Integer[np.ndarray, " M"],
    splits: Integer[np.ndarray, " M"],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """The mean of paired differences, and its percentile interval over resampled identities.

    An identity is drawn with all its queries, because they are not independent: they show one person in the same
    clothes, often from neighbouring frames, and are found or missed together. Drawing single queries would take
    thousands of them for as many witnesses and give too narrow an interval. The mean is taken over the queries of each
    split, then over the splits, as printed scores are; an identity that several splits test is drawn for all of them.

    Args:
        differences: (M,) one variant's score less the other's, per query.
        identities: (M,) of the queries.
        splits: (M,) which trial tests them; all equal where there is one.
        resamples: how often as many identities as there are get drawn, with replacement.
        confidence: share of the resampled means within the interval.
        seed: of the draws; equal arguments give equal intervals.

    Returns:
        Interval in the unit of `differences`.

    Raises:
        StudyError: there is no query, or a difference is not finite.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals, and resampling by the
    independent unit.
    """
    if len(differences) == 0 or not np.isfinite(differences).all():
        raise StudyError(
            f"a bootstrap needs at least one query and finite differences only, found {len(differences)} queries with "
            f"{int((~np.isfinite(differences)).sum())} that are not finite; run `dvc repro` to make the records again"
        )
    people, person = np.unique(identities, return_inverse=True)
    parts, part = np.unique(splits, return_inverse=True)
    cell = person * len(parts) + part
    shape = len(people), len(parts)
    sums = np.bincount(cell, differences, len(people) * len(parts)).reshape(shape)
    counts = np.bincount(cell, minlength=len(people) * len(parts)).reshape(shape).astype(np.float64)
    rng, means = np.random.default_rng(seed), []
    step = max(1, _AT_ONCE // len(people))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.multinomial(len(people), np.full(len(people), 1 / len(people)), size).astype(np.float64)
        means.append(_mean(drawn @ sums, drawn @ counts))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    difference = _mean(sums.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True))
    return Interval(float(difference[0]), float(low), float(high))


def _mean(sums: Float[np.ndarray, "n S"], counts: Float[np.ndarray, "n S"]) -> Float[np.ndarray, " n"]:
    """Means over the queries of each split, then over the splits of which any query was drawn."""
    drawn = counts > 0
    return np.divide(sums, counts, out=np.zeros_like(sums), where=drawn).sum(axis=1) / drawn.sum(axis=1)


def compare_variants(results: Results, baseline: str = "baseline") -> list[Resampled]:
    """Every listed variant less the Baseline, in Rank-1 and mAP of the ablation's setting, in points.

    A query's scores are first averaged over the seeds that both variants have, and over the galleries. Left out are
    variants without a seed in common with it.

    Raises StudyError when two records of a trial do not score the same queries.
    """
    names = [row.name for row in results.variants]
    found = []
    for variant in [name for name in names if name != baseline and baseline in names]:
        seeds = [s for s in complete_seeds(results, variant) if s in complete_seeds(results, baseline)]
        if seeds:
            found += _compare(results, variant, baseline, seeds)
    return found


def _compare(results: Results, variant: str, baseline: str, seeds: list[int]) -> list[Resampled]:
    pids, splits = [], []
    differences: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    for trial in results.trials:
        kept = [[_kept(results, name, trial, seed) for seed in seeds] for name in (variant, baseline)]
        first = kept[0][0]
        if any((one["rows"], one["pids"]) != (first["rows"], first["pids"]) for side in kept for one in side):
            raise StudyError(
                f"the records of {variant} and {baseline} on {results.dataset}, trial {trial}, score other queries "
                "than one another, so they cannot be paired; run `dvc repro` to make all from the same data"
            )
        pids.append(np.array(first["pids"]))
        splits.append(np.full(len(first["pids"]), trial))
        for metric, parts in differences.items():
            ours, theirs = (np.mean([one[metric] for one in side], axis=0) for side in kept)
            parts.append(100 * (ours - theirs))
    people, tested = np.concatenate(pids), np.concatenate(splits)
    numbers = results.bootstrap
    return [
        Resampled(
            variant,
            metric,
            paired_bootstrap(
                np.concatenate(parts),
                people,
                tested,
                resamples=numbers.resamples,
                confidence=numbers.confidence,
                seed=numbers.seed,
            ),
            len(seeds),
            len(np.unique(people)),
            len(people),
        )
        for metric, parts in differences.items()
    ]


def _kept(results: Results, variant: str, trial: int, seed: int) -> dict[str, list]:
    """Scores per query of a run in the ablation's setting."""
    return results.records[run_name(variant, trial, seed)]["settings"][ABLATION_SETTING[results.layout]]["per_query"]
