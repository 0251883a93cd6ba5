"""The readings study: rows and paths are strict, runs are named and shared, and the rule, table and plot are right."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures.records import training_record

from danet_core import readings
from danet_core.config import Study, load_study
from danet_core.files import StudyError, atomic_write_json
from danet_core.record import RunFolder
from danet_core.strict import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PARAMS = ROOT / "params.yaml"
DEFAULT = {"group": "Variants", "variant": "b_ml_cc", "against": None, "choice": "DANet", "reading": "d", "set": {}}
HALF = {"group": "Margin", "variant": "b_ml_cc", "against": "danet", "choice": "rho", "reading": "half"}
ROWS: dict[str, dict[str, Any]] = {
    "danet": DEFAULT,
    "rho_half": {**HALF, "set": {"variant.cc.margin": 0.35}},
    "before_bn": {**HALF, "choice": "test", "set": {"dataset.recipe.test_feature": "before_bn"}},
}


def study_of(tmp_path: Path, rows: dict[str, dict[str, Any]] = ROWS, **block: Any) -> Study:
    """params.yaml with these rows as its readings study."""
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    params["readings"].update(rows=rows, **block)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return load_study(tmp_path / "params.yaml")


def changed(tmp_path: Path, **values: Any) -> Study:
    """A study with an odd row, which is looked up."""
    study = study_of(tmp_path, {"danet": DEFAULT, "odd": {**HALF, "set": values.pop("set", {}), **values}})
    study.reading("odd", 0)
    return study


# -------------------- rows


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("variant.cc.margn", 0.3, "'variant.cc.margn' is no path .* of variant b_ml_cc; the nearest is 'variant.cc.ma"),
        ("dataset.name", "other", "'dataset.name' is no path"),
        ("seed", 3, "'seed' is no path"),
        (3, 3, "3 is no path"),
        ("dataset.recipe", {}, "'dataset.recipe' is no path"),
        ("variant.cc.margin", "wide", "odd.set: variant.cc.margin: expected a number, found 'wide'"),
        ("variant.cc.margin", -1, "odd.set: variant.cc.margin: expected a distance of at least 0, found -1"),
        (
            "dataset.recipe.milestones",
            [8, 99],
            "dataset.recipe.milestones: expected ascending epochs below epochs = 14",
        ),
        ("evaluation.trials", 11, "odd.set: evaluation.trials: expected 1 to 10"),
    ],
)
def test_a_path_or_value_that_does_not_fit_is_one_sentence(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        changed(tmp_path, set={path: value})
    assert "\n" not in str(caught.value)


def test_a_module_that_the_variant_lacks_has_no_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no path in the configuration of a run of variant b_cc"):
        changed(tmp_path, variant="b_cc", set={"variant.ml.lambda_2": 1.0})


def test_a_row_that_nothing_runs_does_not_stand_in_the_way_of_the_study(tmp_path: Path) -> None:
    odd = {"odd": {**HALF, "set": {"variant.cc.margin": -1}}, "danet": DEFAULT}
    assert study_of(tmp_path, odd).run("synth_sysu", "b_ml_cc", 1, 0).seed == 0
    with pytest.raises(ConfigError, match=r"odd\.set: variant\.cc\.margin"):
        study_of(tmp_path, odd, run=["odd"])


def test_a_reading_changes_what_it_sets_and_nothing_else(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    plain, read = study.run("synth_sysu", "b_ml_cc", 1, 2), study.reading("rho_half", 2)
    assert read.variant.cc is not None and plain.variant.cc is not None
    assert (plain.variant.cc.margin, read.variant.cc.margin) == (0.7, 0.35)
    back = dataclasses.replace(read, variant=plain.variant, reading=None)
    assert back == plain
    assert study.run("synth_sysu", "b_ml_cc", 1, 2, "rho_half") == read


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"run": ["rho_third"]}, "unknown reading 'rho_third'"),
        ({"run": ["before_bn"]}, "lists before_bn, which trains as danet does .* list danet instead"),
        ({"run": ["danet", "danet"]}, "readings.run: expected each row once"),
        ({"table": ["synth_regdb"]}, r"readings.table: expected \[\] or \[synth_sysu\]"),
        ({"seeds": [1, 1]}, "readings.seeds: expected different seeds"),
        ({"rows": {"Rho": DEFAULT}}, "names of a-z, 0-9 and _"),
        ({"rows": {"odd": {**HALF, "set": {}}}}, r"odd.against: expected null or another row \(\), found 'danet'"),
        ({"rows": {"odd": {**DEFAULT, "variant": "b_cx"}}, "run": ["odd"]}, "unknown variant 'b_cx'"),
    ],
)
def test_a_study_that_does_not_hang_together_is_refused(tmp_path: Path, block: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_of(tmp_path, **{"rows": ROWS, **block})


def test_a_reading_of_another_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reading rho_half: expected variant b_ml_cc, found b_cc"):
        study_of(tmp_path).run("synth_sysu", "b_cc", 1, 0, "rho_half")


# -------------------- runs


def test_no_reading_lies_where_a_run_of_the_study_does(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    plain, read = study.run("synth_sysu", "b_ml_cc", 1, 0), study.reading("danet", 0)
    assert RunFolder.of(plain).root == Path("runs/synth_sysu/b_ml_cc-t1-s0")
    assert RunFolder.of(read).root == Path("runs/readings/synth_sysu/danet-s0")
    assert RunFolder.of(read).checkpoint == Path("build/checkpoints/readings/synth_sysu/danet-s0.pt")
    assert plain.metrics == "synth_sysu/metrics/b_ml_cc-t1-s0.json"
    assert read.metrics == "synth_sysu/readings/metrics/danet-s0/danet.json"


def test_a_row_that_only_scores_differently_uses_the_runs_of_the_first_that_trains_alike(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert study.trained_as == {"danet": "danet", "rho_half": "rho_half", "before_bn": "danet"}
    read = study.reading("before_bn", 1)
    assert read.trained == study.reading("danet", 1)
    assert RunFolder.of(read) == RunFolder.of(study.reading("danet", 1))
    assert read.metrics == "synth_sysu/readings/metrics/danet-s1/before_bn.json"


def test_the_projects_study_is_switched_off_and_shares_what_trains_alike() -> None:
    study = load_study(PARAMS)
    assert (study.readings.run, study.readings.table) == ((), ())
    assert study.trained_as["test_before_bn"] == "b_ml_cc"
    assert study.trained_as["sid_alone_baseline"] == "sid_alone"
    assert len(study.readings.seeds) >= readings.FEWEST_SEEDS
    for name, row in study.readings.rows.items():
        assert (row.against is None) == (name in study.study.variants)


# -------------------- rule


@pytest.mark.parametrize(
    ("reading", "reference", "seeds_differ", "verdict"),
    [
        ((25.0, 26.0, 25.5), (20.0, 21.0, 20.5), 1.0, "raises"),
        ((15.0, 16.0, 15.5), (20.0, 21.0, 20.5), 1.0, "lowers"),
        ((20.9, 21.9, 21.4), (20.0, 21.0, 20.5), 0.5, "not told apart"),  # one sign, but less than two seeds differ by
        ((25.0, 26.0, 20.4), (20.0, 21.0, 20.5), 0.5, "not told apart"),  # one seed says otherwise
        ((20.1, 23.0, 29.0), (20.0, 21.0, 20.5), 0.5, "not told apart"),  # its own seeds differ by more
        ((21.0, 22.0, 21.5), (20.0, 21.0, 20.5), 0.5, "not told apart"),  # exactly as much
        ((25.0, 26.0, 25.5), (20.0, 21.0, 20.5), 5.0, "not told apart"),  # exactly as much as those of all rows
        ((15.0, 16.0, 15.5), (20.0, 21.0, 20.5), 4.9, "lowers"),
    ],
)
def test_told_apart_is_one_sign_and_more_than_two_seeds_differ_by(
    reading: Any, reference: Any, seeds_differ: float, verdict: str
) -> None:
    pair = dict(enumerate(reading)), dict(enumerate(reference))
    difference = readings.compare(*pair, seeds_differ, same_runs=False)
    assert difference is not None and difference.verdict == verdict


@pytest.mark.parametrize(
    ("paired", "to_exceed", "verdict"),
    [
        ((1.0, 2.0, 1.5), 1.242, "raises"),  # 4.303 standard errors of 0.289
        ((-1.0, -2.0, -1.5), 1.242, "lowers"),
        ((1.0, 2.5, 1.0), 2.151, "not told apart"),
        ((0.0, 0.0, 0.0), 0.0, "not told apart"),
    ],
)
def test_two_ways_of_scoring_the_same_runs_are_told_apart_by_their_paired_differences_alone(
    paired: Any, to_exceed: float, verdict: str
) -> None:
    reference = {0: 10.0, 1: 50.0, 2: 90.0}  # trainings that differ by far more
    reading = {seed: reference[seed] + change for seed, change in enumerate(paired)}
    difference = readings.compare(reading, reference, 40.0, same_runs=True)
    assert difference is not None and difference.verdict == verdict
    assert difference.to_exceed == pytest.approx(to_exceed, abs=1e-3)
    trained = readings.compare(reading, reference, 40.0, same_runs=False)
    assert trained is not None and trained.verdict == "not told apart"


@pytest.mark.parametrize("same_runs", [False, True])
def test_two_seeds_tell_nothing_apart(same_runs: bool) -> None:
    difference = readings.compare({0: 90.0, 1: 91.0}, {0: 1.0, 1: 2.0}, 0.0, same_runs=same_runs)
    assert difference is not None
    assert (difference.to_exceed, difference.verdict) == (None, "not told apart")


def test_differences_are_paired_by_seed_and_by_no_other() -> None:
    scores = {0: 25.0, 2: 27.0, 3: 40.0}, {0: 20.0, 1: 99.0, 2: 23.0}
    difference = readings.compare(*scores, 0.0, same_runs=False)
    assert difference is not None
    assert difference.paired == (5.0, 4.0)
    assert (difference.change, round(difference.std or 0, 4)) == (4.5, 0.7071)
    assert readings.compare({0: 1.0}, {1: 1.0}, 0.0, same_runs=False) is None


def test_the_rates_of_error_are_those_that_the_page_states() -> None:
    """Studies of 47 trained rows, drawn from one normal distribution, the first of them the reference of 31."""
    wrong, found = [], []
    for scores in np.random.default_rng(0).standard_normal((600, 47, 3)):
        seeds_differ = float(np.ptp(scores, axis=1).mean())
        reference, *others = (dict(enumerate(row)) for row in scores.tolist())
        moved = [{seed: score + 3 for seed, score in row.items()} for row in others[-5:]]
        pairs = [readings.compare(row, reference, seeds_differ, same_runs=False) for row in others[:31] + moved]
        told = [pair.verdict != readings.NOT_TOLD_APART for pair in pairs if pair is not None]
        wrong.append(sum(told[:31]))
        found += told[31:]
    assert np.mean(wrong) / 31 == pytest.approx(0.018, abs=0.004)
    assert np.mean(np.array(wrong) == 0) == pytest.approx(0.76, abs=0.04)
    assert np.mean([count for count in wrong if count]) == pytest.approx(2.3, abs=0.4)
    assert np.mean(found) == pytest.approx(0.75, abs=0.03)
    passed = []
    for row, reference in np.random.default_rng(1).standard_normal((6000, 2, 3)):
        both = dict(enumerate(row.tolist())), dict(enumerate(reference.tolist()))
        pair = readings.compare(*both, float(np.ptp(row) + np.ptp(reference)) / 2, same_runs=False)
        passed.append(pair is not None and pair.verdict != readings.NOT_TOLD_APART)
    assert np.mean(passed) == pytest.approx(0.05, abs=0.01)


# -------------------- the page's table of choices


def choices() -> list[tuple[list[str], list[str]]]:
    """The rows (some as patterns) and keys that each line of docs/READINGS.md names in its last two columns."""
    page = (ROOT / "docs/READINGS.md").read_text(encoding="utf-8")
    table = page.partition("## The choices")[2].partition("## What they move")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert all(len(cells) == 5 for cells in lines)
    return [(re.findall(r"`([^`]+)`", cells[3]), re.findall(r"`([^`]+)`", cells[4])) for cells in lines]


def test_the_page_names_every_row_of_the_study_and_no_other() -> None:
    rows = load_study(PARAMS).readings.rows
    patterns = {name for names, _ in choices() for name in names}
    assert [name for name in patterns if not fnmatch.filter(rows, name)] == []
    assert [name for name in rows if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)] == []


def test_the_page_names_the_keys_that_its_rows_set_and_none_that_params_yaml_lacks() -> None:
    params, rows = yaml.safe_load(PARAMS.read_text(encoding="utf-8")), load_study(PARAMS).readings.rows
    known = {str(key) for key in every_key(params)}
    assert len(choices()) > 20
    for names, keys in choices():
        assert set(keys) <= known
        chosen = {row for name in names for row in fnmatch.filter(rows, name)}
        assert {path.rpartition(".")[2] for row in chosen for path in rows[row].set} <= set(keys)


def every_key(value: Any) -> Iterator[str]:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    yield from value if isinstance(value, dict) else ()
    for item in below:
        yield from every_key(item)


# -------------------- table and plot


def record(rank1: float, mean_ap: float) -> dict[str, Any]:
    """What the study reads of an evaluation record."""
    return {
        "settings": {"all_single": {"mean": {"cmc1": rank1 / 100, "mAP": mean_ap / 100}, "per_trial": [{}]}},
        "training": {"final": {"L_id": 0.5}},
        "provenance": {"data_sha256": "d" * 64, "weights_sha256": "e" * 64, "model_sha256": "f" * 64},
        "split": "test",
        "partial": False,
    }


RECORDS = {
    "danet": {0: record(20.0, 18.0), 1: record(21.0, 18.5), 2: record(20.5, 18.0)},
    "rho_half": {0: record(25.0, 18.1), 1: record(26.0, 18.4), 2: record(25.5, 18.2)},
}


def test_the_table_shows_means_differences_and_verdicts(tmp_path: Path) -> None:
    found = readings.outcome(study_of(tmp_path), RECORDS, tmp_path)
    lines = readings.markdown(found).splitlines()
    assert "| DANet | 20.50 | 20.00 to 21.00 | 18.17 | 18.00 to 18.50 | 0.50 |" in lines
    rho = next(line for line in lines if line.startswith("| rho |"))
    assert [cell.strip() for cell in rho.strip("|").split("|")] == [
        *("rho", "half", "`danet`", "25.50", "+5.00 ± 0.00 (n = 3)", "1.00", "raises"),
        *("18.23", "+0.07 ± 0.15 (n = 3)", "0.50", "not told apart", "0.50"),
    ]
    assert "| test | half | `danet` | not run | – | – | – | not run | – | – | – | – |" in lines
    assert readings.SYNTHETIC_NOTE in lines[-1] and "data dddddddddddd." in lines[-1]
    assert "differ by up to, on average: Rank-1 1.00, mAP 0.40." in lines[-1]


def test_one_seed_has_differences_and_no_verdict_and_nothing_to_exceed(tmp_path: Path) -> None:
    first = {name: {0: found[0]} for name, found in RECORDS.items()}
    found = readings.outcome(study_of(tmp_path), first, tmp_path)
    rho = next(line for line in readings.markdown(found).splitlines() if line.startswith("| rho |"))
    assert [cell.strip() for cell in rho.strip("|").split("|")][4:7] == ["+5.00 (n = 1)", "–", "not told apart"]
    assert "differ by up to, on average" not in readings.markdown(found)
    assert readings.table(found).set_index(["row", "metric"])["to_exceed"].isna().all()
    assert [len(axis.patches) for axis in readings.forest(found).axes] == [0, 0]  # no bars


def test_rows_that_only_score_differently_are_marked_and_count_once_among_the_trained(tmp_path: Path) -> None:
    scored = {0: record(20.5, 8.0), 1: record(21.5, 28.5), 2: record(21.0, 18.0)}  # +0.5 each, in Rank-1
    found = readings.outcome(study_of(tmp_path), {**RECORDS, "before_bn": scored}, tmp_path)
    assert found.seeds_differ == pytest.approx({"cmc1": 1.0, "mAP": 0.4})
    row = next(line for line in readings.markdown(found).splitlines() if line.startswith("| test |"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("test", "half", "`danet`, same runs", "21.00", "+0.50 ± 0.00 (n = 3)", "0.00", "raises"),
        *("18.17", "0.00 ± 10.00 (n = 3)", "24.84", "not told apart", "0.50"),
    ]
    frame = readings.table(found).set_index(["row", "metric"])
    assert frame["same_runs"].dropna().to_dict() == {
        (row, metric): same
        for row, same in (("rho_half", "false"), ("before_bn", "true"))
        for metric in readings.SCORES
    }


def test_a_row_against_another_training_is_judged_by_trainings_even_where_it_shares_its_own_runs() -> None:
    study = load_study(PARAMS)
    scores = {0: 20.0, 1: 21.0, 2: 20.5}
    made = {name: {seed: record(score, score) for seed, score in scores.items()} for name in study.readings.rows}
    lines = readings.outcome(study, made).lines
    same = {line.name for line in lines if any(one.same_runs for one in line.differences.values())}
    assert len(set(study.trained_as.values())) == 47  # as docs/READINGS.md says, and how many share a reference
    assert sum(line.against == "b_ml_cc" and line.name not in same for line in lines) == 31
    assert same == {"test_before_bn", "metric_euclidean", "before_bn_euclidean", "one_stream"}
    gain = next(line for line in lines if line.name == "gain_cc")
    assert gain.differences["mAP"].to_exceed == pytest.approx(1.0)


def test_the_csv_has_a_line_for_each_row_and_score(tmp_path: Path) -> None:
    frame = readings.table(readings.outcome(study_of(tmp_path), RECORDS, tmp_path)).set_index(["row", "metric"])
    assert list(frame.index) == [(row, metric) for row in ROWS for metric in ("cmc1", "mAP")]
    shown = frame.loc[("rho_half", "cmc1")]
    assert shown[["status", "n", "pairs", "mean", "difference", "verdict"]].tolist() == [
        "run",
        3,
        3,
        25.5,
        5.0,
        "raises",
    ]
    assert frame.loc[("before_bn", "mAP"), "status"] == "not run"
    assert frame["synthetic"].unique().tolist() == ["true"]


def test_the_forest_plot_has_a_diamond_for_each_row_that_was_run_filled_where_told_apart(tmp_path: Path) -> None:
    figure = readings.forest(readings.outcome(study_of(tmp_path), RECORDS, tmp_path))
    panels = figure.axes
    assert [axis.get_title() for axis in panels] == ["Rank-1, difference in points", "mAP, difference in points"]
    fills = []
    for axis in panels:
        (diamond,) = [line for line in axis.lines if line.get_marker() == "D"]
        (dots,) = [line for line in axis.lines if line.get_marker() == "o"]
        assert len(dots.get_xdata()) == 3  # type: ignore[arg-type]
        fills.append(diamond.get_markerfacecolor())
    assert fills == ["#D55E00", "white"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["Margin", "rho: half"]
    title = figure.get_suptitle()
    assert "synthetic" in title


def test_where_nothing_was_run_table_and_plot_say_what_to_do(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    found = readings.outcome(study, readings.load_records(study, tmp_path), tmp_path)
    with pytest.raises(StudyError, match="has been run on synth_sysu; run `make readings`"):
        readings.summary(found)
    with pytest.raises(StudyError, match="no reading with its reference to draw"):
        readings.forest(found)
    assert readings.page_block("synth_sysu", tmp_path) == readings.NOTHING_RUN + "\n"


# -------------------- records


def write(study: Study, root: Path, name: str, seed: int, **changes: Any) -> Path:
    config = study.reading(name, seed)
    made = {**record(20.0, 18.0), "config": config.resolved(), "evaluation": dataclasses.asdict(config.evaluation)}
    path = root / "results" / config.metrics
    atomic_write_json(path, {**made, **changes})
    training = {**training_record("synth_sysu", "b_ml_cc"), "config": config.resolved()}
    training["history"] = [{**training["history"][0], "seconds": seconds} for seconds in (50.0, 30.0)]
    training["seconds"] = 31.0  # of the last leg: the run was interrupted after its first epoch
    training["provenance"]["model_sha256"] = made["provenance"]["model_sha256"]
    training["versions"]["device"]["threads"] = 1
    atomic_write_json(root / "runs" / config.place / "record.json", training)
    return path


def test_a_record_of_other_numbers_or_data_is_refused_by_name(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    write(study, tmp_path, "danet", 0)
    assert readings.load_records(study, tmp_path).keys() == {"danet"}
    odd = write(study, tmp_path, "rho_half", 0, provenance={"data_sha256": "other", "weights_sha256": "e" * 64})
    with pytest.raises(StudyError, match=r"danet\.json and .*rho_half\.json differ in data_sha256"):
        readings.load_records(study, tmp_path)
    write(study, tmp_path, "rho_half", 0, config=study.reading("danet", 0).resolved())
    with pytest.raises(StudyError, match=r"rho_half\.json: expected a reading's record with the config"):
        readings.load_records(study, tmp_path)
    odd.unlink()
    write(study, tmp_path, "before_bn", 0, evaluation={})
    with pytest.raises(StudyError, match=r"before_bn\.json: expected a reading's record with the evaluation"):
        readings.load_records(study, tmp_path)


def test_the_record_counts_a_shared_run_once_and_is_not_made_from_a_part_of_the_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert readings.write_record(study, tmp_path) is None
    for name in ROWS:
        write(study, tmp_path, name, 0)
    path = readings.write_record(study, tmp_path)
    assert path is not None
    made = json.loads(path.read_text(encoding="utf-8"))
    assert (made["trained_runs"], made["training_seconds"]) == (2, 160.0)
    assert set(made["runs"]) == {"danet-s0", "rho_half-s0"} and made["runs"]["danet-s0"]["steps"] == 560
    readings.write_table(readings.outcome(study, readings.load_records(study, tmp_path), tmp_path))
    block = readings.page_block("synth_sysu", tmp_path)
    assert "2 trained runs, 0.0 hours of training in all, on x86_64 with 1 thread each" in block
    (tmp_path / "runs/readings/synth_sysu/danet-s0/record.json").unlink()
    assert readings.write_record(study, tmp_path) is None
    assert path.exists()  # what it says of these models still holds
    scores = tmp_path / "results" / study.reading("rho_half", 0).metrics
    of_another = json.loads(scores.read_text(encoding="utf-8"))
    of_another["provenance"]["model_sha256"] = "0" * 64
    atomic_write_json(scores, of_another)
    assert readings.write_record(study, tmp_path) is None
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (("provenance", "model_sha256"), "model that was scored"),
        (("versions", "train_code_sha256"), "training code of the other rows"),
    ],
)
def test_runs_of_another_model_or_other_code_than_the_rows_of_the_table_are_refused(
    tmp_path: Path, where: tuple[str, str], what: str
) -> None:
    study = study_of(tmp_path)
    for name in ROWS:
        write(study, tmp_path, name, 0)
    path = tmp_path / "runs/readings/synth_sysu/rho_half-s0/record.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    run[where[0]][where[1]] = "0" * 64
    atomic_write_json(path, run)
    with pytest.raises(StudyError, match=f"rho_half-s0.record.json: expected the {what} .* run `make readings`"):
        readings.write_record(study, tmp_path)
