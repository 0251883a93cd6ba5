"""The paired bootstrap over test identities: by hand, by a loop, by scipy, and what is printed of it."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fixtures.records import edit, metrics, study, write_records
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from danet_core import findings, report, scores
from danet_core.files import StudyError
from danet_core.statistics import Interval, compare_variants, paired_bootstrap

NUMBERS: dict[str, Any] = {"resamples": 400, "confidence": 0.9, "seed": 3}


def interval(differences: Any, identities: Any, splits: Any = None, **changes: Any) -> Interval:
    differences, identities = np.asarray(differences, dtype=np.float64), np.asarray(identities)
    splits = np.ones(len(differences), dtype=np.int64) if splits is None else np.asarray(splits)
    return paired_bootstrap(differences, identities, splits, **{**NUMBERS, **changes})


def test_two_identities_by_hand() -> None:
    # Drawn are both (mean (3 * 1 + 5) / 4 = 2, half of the time), the first twice (1) or the second twice (5).
    found = interval([1, 1, 1, 5], [7, 7, 7, 9], resamples=4000)
    assert found == Interval(2, 1, 5)
    # The middle half of the resamples reaches from the first quartile, between 1 and 2, to the third, between 2 and 5.
    middle = interval([1, 1, 1, 5], [7, 7, 7, 9], resamples=4000, confidence=0.4)
    assert (middle.low, middle.high) == (2, 2)


def test_an_identity_of_several_splits_is_drawn_for_all_of_them_and_the_splits_count_alike() -> None:
    # Split means 2 (three queries) and 8 (one): their mean is 5, where the mean over all queries is 3.5.
    assert interval([1, 1, 4, 8], [1, 1, 2, 2], [1, 1, 1, 2]).difference == 5
    # Identity 1 twice: split 2 has no query then, and the mean is that of split 1 alone.
    assert interval([1, 1, 4, 8], [1, 1, 2, 2], [1, 1, 1, 2], resamples=4000).low == 1


def loop(differences: np.ndarray, identities: np.ndarray, splits: np.ndarray) -> Interval:
    """The same draws, with one loop over resamples, splits and identities each."""
    people = sorted(set(identities.tolist()))
    rng, means = np.random.default_rng(NUMBERS["seed"]), []
    for _ in range(NUMBERS["resamples"]):
        drawn = dict(zip(people, rng.multinomial(len(people), [1 / len(people)] * len(people)), strict=True))
        of_splits = []
        for split in sorted(set(splits.tolist())):
            values = [
                value
                for value, pid, at in zip(differences.tolist(), identities.tolist(), splits.tolist(), strict=True)
                for _ in range(drawn[pid])
                if at == split
            ]
            if values:
                of_splits.append(sum(values) / len(values))
        means.append(sum(of_splits) / len(of_splits))
    whole = [differences[splits == split].mean() for split in sorted(set(splits.tolist()))]
    return Interval(float(np.mean(whole)), *(float(np.quantile(means, share)) for share in (0.05, 0.95)))


@pytest.mark.parametrize("n_splits", [1, 3])
def test_the_result_is_that_of_plain_loops(n_splits: int) -> None:
    rng = np.random.default_rng(n_splits)
    differences, identities = rng.normal(size=60), rng.integers(0, 9, 60)
    splits = rng.integers(0, n_splits, 60)
    found, wanted = interval(differences, identities, splits), loop(differences, identities, splits)
    np.testing.assert_allclose(
        [found.difference, found.low, found.high], [wanted.difference, wanted.low, wanted.high], atol=1e-12
    )


def test_scipys_bootstrap_of_the_same_ratio_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(80), rng.integers(5, 30, 80))
    differences = rng.normal(2, 5, 80)[identities] + rng.normal(0, 5, len(identities))
    sums, counts = np.bincount(identities, differences), np.bincount(identities)
    theirs = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = interval(differences, identities, resamples=20_000, confidence=0.95)
    np.testing.assert_allclose([found.low, found.high], [theirs.low, theirs.high], atol=0.05)  # of a width of 2.4


queries = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 5)), min_size=1, max_size=30)


@given(queries, st.floats(-100, 100))
@settings(max_examples=50)
def test_a_shift_moves_the_interval_and_a_swap_of_the_variants_mirrors_it(pairs: Any, shift: float) -> None:
    differences, identities = np.array([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
    found, moved = interval(differences, identities), interval(differences + shift, identities)
    np.testing.assert_allclose(
        [moved.difference, moved.low, moved.high],
        [value + shift for value in (found.difference, found.low, found.high)],
        atol=1e-9,
    )
    swapped = interval(-differences, identities)
    np.testing.assert_allclose(
        [-swapped.difference, -swapped.high, -swapped.low], [found.difference, found.low, found.high], atol=1e-9
    )
    assert found.low <= found.high


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
@settings(max_examples=20)
def test_equal_variants_differ_by_nothing_with_certainty(identities: list[int]) -> None:
    assert interval(np.zeros(len(identities)), identities) == Interval(0, 0, 0)


def test_more_people_narrow_the_interval_and_more_images_of_the_same_people_do_not() -> None:
    rng = np.random.default_rng(5)
    by_person = rng.normal(size=400)
    few, many = (interval(by_person[:n], np.arange(n), resamples=2000) for n in (25, 400))
    assert many.high - many.low < 0.5 * (few.high - few.low)
    again = interval(np.tile(by_person[:25], 16), np.tile(np.arange(25), 16), resamples=2000)
    assert again.high - again.low == pytest.approx(few.high - few.low, abs=1e-9)


def test_the_same_numbers_give_the_same_interval_and_another_seed_another() -> None:
    rng = np.random.default_rng(1)
    differences, identities = rng.normal(size=50), rng.integers(0, 10, 50)
    assert interval(differences, identities) == interval(differences, identities)
    assert interval(differences, identities) != interval(differences, identities, seed=4)


def test_regdbs_ten_splits_take_less_than_fifty_megabytes() -> None:
    rng = np.random.default_rng(1)
    differences, identities = rng.normal(size=20_600), rng.integers(1, 413, 20_600)
    splits = np.repeat(np.arange(10), 2060)
    tracemalloc.start()
    try:
        interval(differences, identities, splits, resamples=10_000)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("differences", [[], [0.0, np.nan], [np.inf]])
def test_no_query_and_no_number_are_refused(differences: list[float]) -> None:
    with pytest.raises(StudyError, match="at least one query and finite differences only"):
        interval(np.array(differences), np.zeros(len(differences), dtype=np.int64))


def test_every_variant_is_compared_and_the_difference_is_that_of_the_printed_scores(tmp_path: Path) -> None:
    write_records(tmp_path, "synth_sysu", study(seeds=(0, 1)))
    found = compare_variants(scores.load_results(study(seeds=(0, 1)), "synth_sysu", tmp_path))
    assert [(one.variant, one.metric) for one in found] == [
        (variant, metric) for variant in ("b_cc", "b_ml", "b_ml_cc") for metric in ("cmc1", "ap")
    ]
    assert {(one.seeds, one.identities, one.queries) for one in found} == {(2, 20, 100)}
    assert found[0].interval.difference == pytest.approx(7.8, abs=1e-4)
    assert found[1].interval.difference == pytest.approx(7.41, abs=1e-4)
    assert all(one.interval.low < one.interval.difference < one.interval.high for one in found)


def test_only_seeds_that_both_variants_have_are_compared(tmp_path: Path) -> None:
    write_records(
        tmp_path, "synth_regdb", study(seeds=(0, 1), trials=(1, 2)), skip=("b_cc-t2-s1", "b_ml-t1-s0", "b_ml-t1-s1")
    )
    found = compare_variants(scores.load_results(study(seeds=(0, 1), trials=(1, 2)), "synth_regdb", tmp_path))
    assert {(one.variant, one.seeds, one.queries) for one in found} == {("b_cc", 1, 200), ("b_ml_cc", 2, 200)}


def test_records_of_other_queries_are_not_paired(tmp_path: Path) -> None:
    write_records(tmp_path, "synth_sysu", study())

    def move(record: dict[str, Any]) -> None:
        record["settings"]["all_single"]["per_query"]["rows"][3] = 1000

    edit(metrics(tmp_path, "synth_sysu", "b_cc-t1-s0"), move)
    with pytest.raises(StudyError, match="b_cc and baseline on synth_sysu, trial 1, score other queries"):
        compare_variants(scores.load_results(study(), "synth_sysu", tmp_path))


@pytest.mark.parametrize("dataset", ["synth_sysu", "sysu", "regdb"])
def test_findings_tell_the_interval_over_people_apart_from_the_spread_over_trainings(
    tmp_path: Path, dataset: str
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper").symlink_to(Path(__file__).parent.parent / "results" / "paper")
    write_records(tmp_path, dataset, study())
    results = scores.load_results(study(), dataset, tmp_path)
    (line,) = [line for line in findings.finding_parts(results)[0].lines if "bootstrap" in line]
    cc = compare_variants(results)[0].interval
    assert line.startswith("Over test people, with these trained models as they are, 95 % of resampled differences ")
    assert f"B + CC: Rank-1 +{cc.low:.2f} to +{cc.high:.2f}, mAP +" in line and "; B + ML + CC: Rank-1 +" in line
    assert "20 identities, each with all its queries, 100 in all, 200 times" in line
    assert line.endswith("That is no spread over trainings: only further seeds show what another training would give.")
    assert "it helps" not in line and "verdict" not in line


def test_the_differences_are_written_as_a_tidy_table(tmp_path: Path) -> None:
    write_records(tmp_path, "synth_sysu", study())
    results = scores.load_results(study(), "synth_sysu", tmp_path)
    path = report.write_differences(results)
    assert path == results.tables_folder / "differences.csv"
    table = pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")))
    assert table[["variant", "metric"]].to_numpy().tolist()[:2] == [["b_cc", "Rank-1"], ["b_cc", "mAP"]]
    first = json.loads(table.iloc[0].to_json())
    assert first["difference"] == 7.8 and first["low"] < 7.8 < first["high"]
    assert (first["resampled"], first["identities"], first["queries"], first["seeds"]) == ("identities", 20, 100, 1)
    assert (first["synthetic"], first["confidence"], first["resamples"]) == (True, 0.95, 200)
