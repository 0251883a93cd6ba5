"""Records to scores: what is refused, and the statistics over seeds and test identities."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from records import ROOT, of, record, study, write_records
from scipy import stats

from danet_study import results
from danet_study.config import Bootstrap, Overrides
from danet_study.files import StudyError
from danet_study.results import estimate, holm, identity_differences, over_identities


def loaded(folder, plan, dataset="synth_sysu", **overrides):
    """The results of a plan whose runs all have a record."""
    write_records(folder, [of(config, **overrides) for config in plan.runs()])
    return results.load_results(plan, dataset, folder)


# -------------------- records


def test_frame_has_one_row_per_run_setting_and_metric(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1)))
    frame = found.frame
    assert list(frame) == ["run", "dataset", "trial", "variant", "label", "seed", "setting", "metric", "value"]
    assert not frame.duplicated(["run", "setting", "metric"]).any()
    run = "synth_sysu-1-b_cc-1"
    (row,) = frame[(frame.run == run) & (frame.setting == "all_single") & (frame.metric == "cmc1")].to_numpy().tolist()
    value = found.records[run]["settings"]["all_single"]["mean"]["cmc1"]
    assert row == [run, "synth_sysu", 1, "b_cc", "B + CC", 1, "all_single", "cmc1", value]
    assert set(frame.setting) >= {"within_visible", "modality_gap", "modality_gap_pretrained", "probe", "training"}


def test_runs_without_record_are_no_error_and_records_of_unlisted_runs_are_not_read(tmp_path):
    found = results.load_results(study(), "synth_sysu", tmp_path)
    assert found.records == {} and found.frame.empty and len(found.configs) == 4
    assert set(results.differences(found)["verdict"]) == {"not run"}
    write_records(tmp_path, [of(config) for config in study(seeds=(1, 2)).runs()])
    found = results.load_results(study(seeds=(0, 1)), "synth_sysu", tmp_path)
    assert {run[-1] for run in found.records} == {"1"} and found.seeds("b_cc") == [1]


def test_data_set_without_a_listed_run_is_refused(tmp_path):
    for name in ("synth_regdb", "", "sysu"):
        with pytest.raises(StudyError, match="synth_sysu"):
            results.load_results(study(), name, tmp_path)


def change(*keys, value):
    """A change of one entry of a record."""

    def apply(one):
        *path, last = keys
        for key in path:
            one = one[key]
        one[last] = value

    return apply


@pytest.mark.parametrize(
    ("key", "damage"),
    {
        "run": change("run", value="synth_sysu-1-b_cc-5"),
        "dataset": change("dataset", value="synth_regdb"),
        "lr": change("config", "recipe", "lr", value=0.5),
        "margin": change("config", "losses", "L_cc", "margin", value=0.9),
        "L_tri": change("config", "losses", "L_tri", value={"weight": 1.0}),
        "metric": change("evaluation", "metric", value="euclidean"),
        "data_sha256": change("provenance", "data_sha256", value="ee" * 32),
        "weights_sha256": change("provenance", "weights_sha256", value="ee" * 32),
        "partial": change("partial", value=True),
        "split": change("split", value="val"),
        "cmc1": change("settings", "all_single", "mean", "cmc1", value=1.5),
        "mAP": change("settings", "all_single", "mean", "mAP", value=math.nan),
        "modality_gap": lambda one: one.pop("modality_gap"),
        "pretrained": lambda one: one["modality_gap"].pop("pretrained"),
        "scores": change("settings", value=[1, 2]),
        **{f"b_cc-0.json{' ' * i}": text for i, text in enumerate(["", "{", "[]", "null", "{}"])},
    }.items(),
)
def test_record_that_cannot_share_a_table_is_refused_with_file_and_key(tmp_path, key, damage):
    plan = study()
    loaded(tmp_path, plan)
    path = tmp_path / "records" / "synth_sysu-1-b_cc-0.json"
    if isinstance(damage, str):  # the whole file
        path.write_text(damage)
    else:
        one = json.loads(path.read_text())
        damage(one)
        path.write_text(json.dumps(one))
    with pytest.raises(StudyError, match=key.strip()) as error:
        results.load_results(plan, "synth_sysu", tmp_path)
    assert str(path) in str(error.value)
    assert len(str(error.value).replace(str(path), "PATH").split()) <= 25


def test_changed_label_is_no_other_configuration(tmp_path):
    loaded(tmp_path, study())
    plan = study(rows={"b_cc": study().variants["b_cc"].model_copy(update={"label": "Centers"})})
    assert results.load_results(plan, "synth_sysu", tmp_path).variants["b_cc"] == "Centers"


def test_notes_mark_what_is_not_the_published_protocol(tmp_path):
    def notes(folder, **overrides):
        return " ".join(loaded(tmp_path / folder, study(), **overrides).notes)

    def settings(**marks):
        return {name: {**one, **marks} for name, one in record()["settings"].items()}

    assert notes("plain").startswith("Synthetic") and len(loaded(tmp_path / "plain", study()).notes) == 1
    assert "Partial" in notes("partial", partial=True)
    assert "random.seed" in notes("random", settings=settings(galleries="random_seed"))
    assert "euclidean" in notes("metric", settings=settings(metric="euclidean"))
    few = {"cmc1": [0.2] * 3, "mAP": [0.2] * 3, "mINP": [0.2] * 3}
    assert "3 of the protocol's 10" in notes("fewer", settings=settings(per_trial=few))
    assert loaded(tmp_path / "real", study(splits=("sysu-1",)), "sysu").notes == []


def test_trials_are_averaged_within_each_seed_and_incomplete_seeds_left_out(tmp_path):
    plan = study(seeds=(0, 1), variants=("baseline",), splits=("synth_regdb-1", "synth_regdb-2"))
    scores = {(1, 0): 0.2, (2, 0): 0.3, (1, 1): 0.5}
    found = [of(c, cmc1=scores[c.trial, c.seed]) for c in plan.runs() if (c.trial, c.seed) in scores]
    write_records(tmp_path, found)
    read = results.load_results(plan, "synth_regdb", tmp_path)
    assert read.seeds("baseline") == [0]
    assert read.values("baseline", "thermal_to_visible", "cmc1") == [pytest.approx(0.25)]


# -------------------- over seeds


def test_mean_of_three_seeds_by_hand():
    one = estimate([[1.0, 2.0, 3.0]])
    t = 4.302653  # of 2 degrees of freedom
    assert (one.value, one.n, one.df, one.sd) == (2.0, 3, 2, 1.0)
    assert one.half == pytest.approx(t / math.sqrt(3), rel=1e-6)
    assert one.prediction_half == pytest.approx(t * math.sqrt(4 / 3), rel=1e-6)


def test_two_groups_are_students_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 7).tolist(), rng.normal(0, 2, 4).tolist()
    one, oracle = estimate([a, b], [1, -1]), stats.ttest_ind(a, b)
    interval = oracle.confidence_interval(0.95)
    assert one.p == pytest.approx(oracle.pvalue)
    assert (one.value - one.half, one.value + one.half) == pytest.approx((interval.low, interval.high))
    assert (one.n, one.df) == (4, 9)


def test_group_of_weight_zero_adds_to_the_variance_only():
    one = estimate([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0], []], [1, -1, 0, 0])
    # sums of squares 2 + 0 + 8 over 3 degrees of freedom, and two means of two
    assert (one.value, one.df) == (0.0, 3)
    assert one.se == pytest.approx(math.sqrt(10 / 3))


def test_interaction_is_the_coefficient_of_least_squares():
    rng = np.random.default_rng(1)
    cells = {(cc, ml): rng.normal(cc + 2 * ml - 3 * cc * ml, 1, 5) for cc in (0, 1) for ml in (0, 1)}
    one = estimate([list(cells[key]) for key in ((1, 1), (1, 0), (0, 1), (0, 0))], [1, -1, -1, 1])
    x = np.array([[1, cc, ml, cc * ml] for cc, ml in cells for _ in range(5)], float)
    y = np.concatenate(list(cells.values()))
    beta, rest = np.linalg.lstsq(x, y, rcond=None)[:2]
    error = math.sqrt(rest[0] / 16 * np.linalg.inv(x.T @ x)[3, 3])
    assert (one.value, one.se, one.df) == (pytest.approx(beta[3]), pytest.approx(error), 16)


def test_one_seed_has_no_interval_and_no_verdict():
    one = estimate([[3.0], [1.0]], [1, -1])
    assert one.value == 2.0 and one.verdict() == "not tested (n = 1)"
    assert all(math.isnan(x) for x in (one.half, one.p, one.detectable, one.sd, one.prediction_half))
    assert estimate([[3.0], [1.0, 2.0]], [1, -1]).verdict() == "not tested (n = 1)"
    assert estimate([[3.0], []], [1, -1]) is None and estimate([[]]) is None
    assert estimate([[0.1375 * 100 - 50] * 5]).sd == 0  # equal seeds differ by no rounding error


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([5, 6, 7], [1, 2, 3], "helps"),
        ([1, 2, 3], [5, 6, 7], "hurts"),
        ([1, 2, 3], [1, 2, 4], "inconclusive"),
        ([2, 2], [1, 1], "helps"),
        ([2, 2], [2, 2], "inconclusive"),
    ],
)
def test_verdict_is_the_side_of_the_interval(a, b, verdict):
    one = estimate([a, b], [1, -1])
    assert one.verdict() == verdict
    assert (one.p < 0.05) == (verdict != "inconclusive")


@pytest.mark.parametrize(("n", "d"), [(3, 3.07), (10, 1.325), (20, 0.909)])
def test_detectable_effect_agrees_with_published_power_tables(n, d):
    """Two groups of n, two-sided 5 %, 80 % power, in standard deviations (Cohen 1988; G*Power)."""
    group = stats.norm.ppf((np.arange(n) + 0.5) / n)
    group = (group / np.std(group, ddof=1)).tolist()
    assert estimate([group, group], [1, -1]).detectable == pytest.approx(d, abs=0.005)


# -------------------- contrasts


def test_factorial_effects_and_interaction(tmp_path):
    scores = {"baseline": (0.20, 0.22), "b_cc": (0.27, 0.27), "b_ml": (0.24, 0.22), "b_ml_cc": (0.25, 0.27)}
    plan = study(seeds=(0, 1))
    write_records(tmp_path, [of(c, cmc1=scores[c.variant][c.seed]) for c in plan.runs()])
    found = results.load_results(plan, "synth_sysu", tmp_path)
    assert results.factorial(found) == {"baseline": "baseline", "cc": "b_cc", "ml": "b_ml", "both": "b_ml_cc"}
    table = results.differences(found).query("metric == 'Rank-1'").set_index("contrast")
    assert table["difference"].to_dict() == pytest.approx(
        {
            "CC given Baseline": 6,
            "ML given Baseline": 2,
            "CC given ML": 3,
            "ML given CC": -1,
            "CC and ML given Baseline": 5,
            "interaction of CC and ML": -3,
        }
    )
    # three cells with sums of squares 2, one of 0, over 4 degrees of freedom: variance 1.5; t = 6 / sqrt(1.5)
    assert table.loc["CC given Baseline", "p"] == pytest.approx(2 * stats.t.sf(6 / math.sqrt(1.5), 4))
    half = stats.t.ppf(0.975, 4) * math.sqrt(1.5 * 4 / 2)
    assert table.loc["interaction of CC and ML", "high"] == pytest.approx(-3 + half)
    assert set(table["df"]) == {4} and set(table["n"]) == {2}


def test_cells_are_found_from_losses_not_names(tmp_path):
    rows = {
        "plain": Overrides(label="Plain"),
        "long_cc": Overrides(label="CC, longer", extends=["b_cc"], recipe={"epochs": 28}),
        "wide_margin": Overrides(label="CC, 1.4", extends=["b_cc"], losses={"L_cc": {"margin": 1.4}}),
        "mutual": Overrides(label="ML", extends=["b_ml"]),
        "printed": Overrides(label="Both", extends=["b_ml_cc"]),
        "pair": Overrides(label="Both, 1.4", extends=["wide_margin", "mutual"]),
        "triplet": Overrides(label="Eq. 1", losses={"L_tri": {"weight": 1.0, "margin": 0.7}}),
    }
    found = loaded(tmp_path, study(variants=rows, rows=rows))
    cells = {"baseline": "plain", "cc": "wide_margin", "ml": "mutual", "both": "pair"}
    assert results.factorial(found) == cells
    others = list(results.contrasts(found).values())[6:]
    assert others == [{name: 1, "plain": -1} for name in ("long_cc", "printed", "triplet")]


def test_without_a_baseline_there_is_no_contrast(tmp_path):
    assert results.contrasts(loaded(tmp_path, study(variants=("b_cc", "b_ml")))) == {}


def test_holm_by_hand():
    # sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, made monotone
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])
    assert holm(np.array([0.03])) == pytest.approx([0.03])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.beta(0.3, 2, 12)
        rejected = set()
        for k, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (12 - k):
                break
            rejected.add(index)
        assert set(np.flatnonzero(holm(p) <= 0.05)) == rejected


def test_holm_counts_the_tested_rows_of_a_score_and_decides_the_verdict():
    rows = [("Rank-1", 0.01, "helps"), ("Rank-1", 0.04, "hurts"), ("mAP", 0.04, "helps"), ("Rank-1", None, "not run")]
    rows.append(("Rank-1", 0.02, "helps"))
    table = results.adjust(pd.DataFrame(rows, columns=["metric", "p", "verdict"]))
    assert table["holm"].tolist() == pytest.approx([0.03, 0.04, 0.04, math.nan, 0.04], nan_ok=True)
    table = results.adjust(pd.DataFrame([*rows, ("Rank-1", 0.9, "inconclusive")], columns=["metric", "p", "verdict"]))
    assert table["verdict"].tolist() == ["helps", "inconclusive", "helps", "not run", "inconclusive", "inconclusive"]


# -------------------- over test identities


def interval(values, n, confidence=0.95, seed=0):
    values, n = np.atleast_2d(np.array(values, float)), np.atleast_2d(np.array(n, float))
    return over_identities(values, n, Bootstrap(resamples=4000, confidence=confidence, seed=seed))[:2]


def test_bootstrap_of_two_identities_by_hand():
    """Drawn: the first twice (1/4), each once (1/2), the second twice (1/4); means 4, (4 + 3 * 0) / 4 = 1 and 0."""
    assert interval([4, 0], [1, 3], confidence=0.4) == (pytest.approx(1), pytest.approx(1))
    assert interval([4, 0], [1, 3]) == (0, 4)


def test_bootstrap_agrees_with_drawing_identities_one_by_one():
    rng = np.random.default_rng(2)
    values, n = rng.normal(1, 3, (2, 30)), rng.integers(0, 5, (2, 30))
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        split = [sum(n[s, i] * values[s, i] for i in drawn) / sum(n[s, i] for i in drawn) for s in (0, 1)]
        means.append(sum(split) / 2)
    assert interval(values, n) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.1)


def test_bootstrap_is_repeatable_and_constant_differences_have_no_spread():
    assert interval([2, 2, 2], [1, 5, 2]) == pytest.approx((2, 2))
    assert interval([1, 2, 5], [1, 5, 2], seed=3) == interval([1, 2, 5], [1, 5, 2], seed=3)


def of_identities(scores, n=(2, 1), trial=1):
    return {"trial": trial, "per_identity": {"pids": [5, 6], "n": list(n), "cmc1": list(scores), "ap": list(scores)}}


def test_differences_of_identities_average_seeds_and_refuse_other_queries():
    records = {"a": [of_identities([0.1, 0.2]), of_identities([0.3, 0.2])], "b": [of_identities([0.5, 0.1])]}
    values, n = identity_differences(records, {"b": 1, "a": -1}, "mAP")
    assert values == pytest.approx(np.array([[30, -10]])) and n.tolist() == [[2, 1]]
    records["a"][1] = of_identities([0.3, 0.2], n=(2, 2))
    with pytest.raises(StudyError, match="a and b"):
        identity_differences(records, {"b": 1, "a": -1}, "cmc1")
    with pytest.raises(StudyError, match="a and b"):
        identity_differences({"a": records["b"], "b": [of_identities([1, 1], trial=2)]}, {"b": 1, "a": -1}, "cmc1")


def test_table_of_differences_has_the_interval_of_its_contrast(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1), variants=("baseline", "b_cc")))
    row = results.differences(found).set_index("metric").loc["mAP"]
    values, n = identity_differences({v: found.of(v) for v in ("baseline", "b_cc")}, {"b_cc": 1, "baseline": -1}, "mAP")
    expected = over_identities(values, n, found.bootstrap)[:2]
    assert (row["gallery_low"], row["gallery_high"], row["identities"]) == (*expected, 8)


def test_permutation_p_is_exact_for_few_identities():
    """Of the 2 ** 5 signs of 1 to 5 those with a sum of at least 13 in size: all, and all but 1, on each side: 4."""
    numbers = Bootstrap(resamples=20_000, confidence=0.95, seed=0)
    assert over_identities(np.array([[-1.0, 2, 3, 4, 5]]), np.ones((1, 5)), numbers)[2] == pytest.approx(
        4 / 32, abs=0.01
    )
    assert over_identities(np.zeros((1, 5)), np.ones((1, 5)), numbers)[2] == 1
    assert over_identities(np.ones((2, 30)), np.ones((2, 30)), numbers)[2] == 1 / 20_001


# -------------------- two runs


def test_two_runs_of_any_configuration_are_compared():
    a = record("synth_sysu-1-baseline-0", cmc1=0.2, mAP=0.3)
    b = record("synth_sysu-1-b_cc-1", cmc1=0.25, mAP=0.28)
    b["versions"] = {**b["versions"], "python": "3.13"}
    configuration, scores = results.compare(a, b, study().bootstrap)
    keys = ["config.losses.L_cc.margin", "config.losses.L_cc.weight", "config.seed", "versions.python"]
    assert list(configuration["key"]) == keys
    assert list(configuration["a"]) == ["absent", "absent", 0, "3.12"] and configuration["b"].iloc[0] == 0.7
    assert len(scores) == 8
    first, second = scores.iloc[0], scores.iloc[1]
    assert (first["setting"], first["metric"], first["a"], first["b"]) == ("all_single", "Rank-1", 20, 25)
    assert (first["difference"], second["difference"]) == (pytest.approx(5), pytest.approx(-2))
    for row in (first, second):
        assert row["a_low"] < row["a"] < row["a_high"] and row["b_low"] < row["b"] < row["b_high"]
        assert row["low"] < row["difference"] < row["high"] and 0 < row["p"] < 1
    assert scores.iloc[2:][["a_low", "low", "p"]].isna().all(axis=None)
    same = results.compare(a, a, study().bootstrap)
    assert same[0].empty and set(same[1]["p"].dropna()) == {1} and set(same[1]["low"].dropna()) == {0}


@pytest.mark.parametrize(
    ("key", "other"),
    {
        "protocol": record("synth_regdb-1-baseline-0"),
        "data_sha256": record(provenance={"data_sha256": "other"}),
        "test queries": record("synth_sysu-2-baseline-0"),
    }.items(),
)
def test_runs_over_other_data_are_not_compared(key, other):
    with pytest.raises(StudyError, match=key):
        results.compare(record(), other, study().bootstrap)


def test_command_compares_two_record_files(tmp_path, monkeypatch, capsys):
    write_records(tmp_path, [record("synth_sysu-1-baseline-0"), record("synth_sysu-1-b_cc-0")])
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = [f"records/synth_sysu-1-{variant}-0.json" for variant in ("baseline", "b_cc")]
    for arguments, words in ((files, ["L_cc.margin", "all_single", "a_low"]), (files[:1] * 2, ["same configuration"])):
        monkeypatch.setattr("sys.argv", ["results", *arguments])
        results.main()
        text = capsys.readouterr().out
        assert all(word in text for word in words)
    monkeypatch.setattr("sys.argv", ["results", files[0], "records/none.json"])
    with pytest.raises(SystemExit, match="none.json"):
        results.main()
