"""What is read, which scores it makes, and what Tables 1 to 3 hold, from records made by code."""

from __future__ import annotations

import io
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fixtures import records
from fixtures.notebooks import run_notebook
from fixtures.records import cells, edit, metrics, study, write_records, write_runs

from danet_core import findings, report, scores
from danet_core.config import load_study
from danet_core.files import StudyError
from danet_core.tables import Score

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with the paper's tables and nothing else."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    return tmp_path


# -- what is read ------------------------------------------------------------------------------------------------------


def test_tidy_metrics_have_one_row_per_run_setting_and_metric(root: Path) -> None:
    write_records(root, "synth_sysu", listed := study(seeds=(0, 1)))
    frame = scores.tidy(scores.load_results(listed, "synth_sysu", root).records.values())
    assert list(frame.columns) == ["variant", "trial", "seed", "setting", "metric", "value"]
    assert not frame.duplicated(["variant", "trial", "seed", "setting", "metric"]).any()
    one = frame.query("variant == 'b_cc' and seed == 1 and setting == 'all_single' and metric == 'cmc1'")
    assert one["value"].item() == pytest.approx(0.288)
    terms = frame.query("variant == 'baseline' and seed == 0 and setting == 'training'")["metric"]
    assert set(terms) == {"L_id", "total", "steps", "epochs"}  # the Baseline has no other term


def test_regdb_metrics_keep_identity_level_cmc_apart(root: Path) -> None:
    write_records(root, "synth_regdb", listed := study())
    settings = set(scores.tidy(scores.load_results(listed, "synth_regdb", root).records.values())["setting"])
    assert {"thermal_to_visible", "thermal_to_visible:identity_level", "within_visible", "figure1"} <= settings


def test_a_folder_without_records_gives_an_empty_table(tmp_path: Path) -> None:
    assert scores.tidy(scores.load_results(study(), "synth_sysu", tmp_path).records.values()).empty


def test_a_record_of_a_run_that_is_not_listed_is_not_used(root: Path) -> None:
    write_records(root, "synth_sysu", study(seeds=(0, 1)))
    metrics(root, "synth_sysu", "b_cc-t1-s7").write_text("not even JSON", encoding="utf-8")
    results = scores.load_results(study(), "synth_sysu", root)
    assert set(results.records) == {f"{variant}-t1-s0" for variant in records.VARIANT_ORDER}
    alone = report.table3(results)
    assert cells(alone.markdown(), "B + CC")[0] == "27.80"
    assert not any("-s1" in run for run in alone.runs)


def test_damaged_and_foreign_records_are_refused(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    path = metrics(root, "synth_sysu", "b_cc-t1-s0")
    good = path.read_text(encoding="utf-8")
    cases: list[tuple[Callable[[dict[str, Any]], None], str]] = [
        (lambda r: r.pop("within"), "no key 'within'"),
        (lambda r: r.update(seed=3), "the run it names is 'b_cc-t1-s3', expected 'b_cc-t1-s0'"),
        (lambda r: r.update(dataset="sysu"), "dataset is 'sysu', expected 'synth_sysu'"),
        (
            lambda r: r["settings"]["all_single"]["mean"].update(cmc1=27.8),
            "all_single cmc1 is 27.8; expected a fraction",
        ),
        (lambda r: r["training"]["final"].update(L_id=float("nan")), "L_id is nan; expected a finite number"),
    ]
    for change, message in cases:
        path.write_text(good, encoding="utf-8")
        edit(path, change)
        with pytest.raises(StudyError, match=re.escape(message)) as caught:
            scores.load_results(study(), "synth_sysu", root)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["config"]["dataset"]["recipe"].update(lr=0.5), r"config.dataset.recipe.lr \(0.001 against 0.5\)"),
        (lambda r: r["provenance"].update(data_sha256="0" * 64), r"provenance.data_sha256 \(.{12} against 0{12}\)"),
        (lambda r: r["provenance"].update(weights_sha256="0" * 64), r"provenance.weights_sha256"),
        (lambda r: r.update(partial=True), r"partial \(False against True\)"),
        (lambda r: r["evaluation"].update(trials=9), r"evaluation.trials \(10 against 9\)"),
        (lambda r: r["evaluation"].update(metric="euclidean"), r"evaluation.metric \(cosine against euclidean\)"),
        (lambda r: r["evaluation"].update(rerank={"k1": 20}), r"evaluation.rerank \(None against nothing\)"),
    ],
    ids=["recipe", "data", "weights", "partial", "trials", "metric", "rerank"],
)
def test_a_table_refuses_runs_that_differ_in_more_than_variant_trial_and_seed(
    root: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write_records(root, "synth_sysu", study())
    edit(metrics(root, "synth_sysu", "b_cc-t1-s0"), change)
    with pytest.raises(StudyError, match=f"baseline-t1-s0 and b_cc-t1-s0 differ in {message}"):
        scores.load_results(study(), "synth_sysu", root)


def test_seeds_of_one_variant_must_share_its_modules_and_variants_need_not(root: Path) -> None:
    chosen = study(variants=("baseline", "b_cc", "baseline_2x"), seeds=(0, 1))
    write_records(root, "synth_sysu", chosen)
    assert len(scores.load_results(chosen, "synth_sysu", root).records) == 6
    edit(metrics(root, "synth_sysu", "b_cc-t1-s1"), lambda r: r["config"]["variant"]["cc"].update(margin=0.3))
    with pytest.raises(
        StudyError, match=r"b_cc-t1-s0 and b_cc-t1-s1 differ in config.variant.cc.margin \(0.7 against 0.3"
    ):
        scores.load_results(chosen, "synth_sysu", root)


# -- cells -------------------------------------------------------------------------------------------------------------


def test_table_3_of_the_sysu_layout_is_all_search_single_shot_with_its_companions(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    table = report.table3(scores.load_results(study(), "synth_sysu", root))
    assert cells(table.markdown(), "B + ML + CC") == [
        *("25.90", "55.90", "65.90", "24.61", "9.00"),  # Rank-1, Rank-10, Rank-20, mAP, mINP
        *("99.31", "87.00", "0.75", "41.25", "1"),  # visible, infrared, L_id in nats, Figure 1, seeds
    ]
    assert "all-search, single-shot (query infrared, 1700; gallery visible, 300; chance 1.25)" in table.caption
    labels = [row.label for row in table.blocks[0].rows]
    assert labels == ["Baseline", "B + CC", "B + ML", "B + ML + CC"]


def test_with_one_seed_no_spread_is_printed_and_the_caption_says_so(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    for table in report.tables(scores.load_results(study(), "synth_sysu", root)):
        text = table.markdown() + table.latex() + table.csv()
        assert "n = 1 seed: no standard deviation." in table.caption
        assert not re.search(r"±|\\pm|nan", text)


def test_with_several_seeds_mean_and_sample_standard_deviation_are_printed(root: Path) -> None:
    chosen = study(seeds=(0, 1, 2))
    write_records(root, "synth_sysu", chosen)
    table = report.table3(scores.load_results(chosen, "synth_sysu", root))
    # Rank-1 of B + CC: 27.8, 28.8, 29.8; sample standard deviation 1, not the population's 0.82.
    assert cells(table.markdown(), "B + CC")[0] == "28.80 ± 1.00"
    assert cells(table.markdown(), "B + CC")[-1] == "3"
    assert "$\\pm$ 1.00" in table.latex()
    frame = pd.read_csv(io.StringIO(table.csv()))
    row = frame.query("variant == 'b_cc' and metric == 'rank1'").iloc[0]
    assert (row["mean"], row["std"], row["n"], row["unit"]) == (28.8, 1.0, 3, "percent")


def test_a_listed_run_without_a_record_is_not_run_in_every_cell(root: Path) -> None:
    write_records(root, "synth_sysu", study(), skip=("b_ml-t1-s0",))
    table = report.table3(scores.load_results(study(), "synth_sysu", root))
    assert cells(table.markdown(), "B + ML") == ["not run"] * 9 + ["0 of 1"]
    assert "Not run: b_ml-t1-s0." in table.markdown() and "% Not run: b_ml-t1-s0." in table.latex()
    assert "1 of 4 listed runs: not run." in table.caption
    frame = pd.read_csv(io.StringIO(table.csv())).query("variant == 'b_ml'")
    assert set(frame["status"]) == {"not run"} and frame["mean"].isna().all() and set(frame["n"]) == {0}


def test_a_missing_seed_shows_in_the_count_of_seeds(root: Path) -> None:
    chosen = study(seeds=(0, 1, 2))
    write_records(root, "synth_sysu", chosen, skip=("b_cc-t1-s1", "b_ml-t1-s1", "b_ml-t1-s2"))
    markdown = report.table3(scores.load_results(chosen, "synth_sysu", root)).markdown()
    assert cells(markdown, "B + CC")[0] == "28.80 ± 1.41" and cells(markdown, "B + CC")[-1] == "2 of 3"
    assert cells(markdown, "B + ML")[0] == "16.90" and cells(markdown, "B + ML")[-1] == "1 of 3"


def test_the_studys_own_params_are_understood(root: Path) -> None:
    real = load_study(ROOT / "params.yaml")
    for dataset in real.datasets:
        results = scores.load_results(real, dataset, root)
        assert [row.name for row in results.variants] == list(real.study.variants)
        assert len(results.missing) == len(results.runs) == len(set(results.runs))
    modules = {row.name: row.modules for row in results.variants}
    assert all(modules[name] == (("cc",) if name == "b_cc" else ()) for name in ("baseline", "b_cc") if name in modules)


def test_figures_and_tables_say_the_title_and_labels_that_params_yaml_has_now(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    write_runs(root, "synth_sysu", study())
    for path in [*root.glob("results/synth_sysu/metrics/*.json"), *root.glob("runs/synth_sysu/*/record.json")]:
        edit(path, lambda record: record.update(label=f"old {record['label']}", title="an old title"))
    results = scores.load_results(study(), "synth_sysu", root)
    labels = {row.name: row.label for row in results.variants}
    for record in (*results.records.values(), *scores.load_training(results)):
        assert record["label"] == labels[record["variant"]]
    assert {record["title"] for record in results.records.values()} == {results.title}


def test_the_records_of_these_tests_have_the_configuration_of_a_real_run() -> None:
    real = load_study(ROOT / "params.yaml").run("synth_sysu", "b_cc", 1, 0).resolved()
    made = records.config("synth_sysu", "b_cc", 1, 0)
    assert made.keys() == real.keys()
    assert made["dataset"].keys() == real["dataset"].keys() and made["variant"].keys() == real["variant"].keys()
    assert made["dataset"]["recipe"].keys() <= real["dataset"]["recipe"].keys()


def test_without_any_record_every_cell_is_not_run(root: Path) -> None:
    for dataset in ("synth_sysu", "synth_regdb"):
        for table in report.tables(scores.load_results(study(), dataset, root)):
            assert all(cell is None for block in table.blocks for row in block.rows for cell in row.cells)
            assert "Made of no run." in table.markdown()


def test_spreads_over_seeds_and_over_trials_are_kept_apart(root: Path) -> None:
    chosen = study(seeds=(0, 1), trials=(1, 2, 3))
    write_records(root, "synth_regdb", chosen)
    results = scores.load_results(chosen, "synth_regdb", root)
    found = scores.score(results, "baseline", "thermal_to_visible", "cmc1", 100.0)
    values = {(seed, trial): 20 + seed - 0.5 * (trial - 1) for seed in (0, 1) for trial in (1, 2, 3)}
    by_seed = [statistics.mean(values[seed, trial] for trial in (1, 2, 3)) for seed in (0, 1)]
    by_trial = [statistics.mean(values[seed, trial] for seed in (0, 1)) for trial in (1, 2, 3)]
    assert found is not None
    assert found.mean == pytest.approx(statistics.mean(values.values()))
    assert (found.n, found.n_trials) == (2, 3)
    assert found.std == pytest.approx(statistics.stdev(by_seed))
    assert found.std_trials == pytest.approx(statistics.stdev(by_trial))
    table = report.table2(results)
    assert cells(table.markdown(), "Baseline")[0] == "20.00 ± 0.71 / 0.50"
    assert "Mean ± standard deviation over seeds / over 3 train and test splits; n = 2 seeds." in table.caption


def test_with_one_seed_the_spread_is_over_trials(root: Path) -> None:
    chosen = study(trials=(1, 2, 3))
    write_records(root, "synth_regdb", chosen)
    table = report.table2(scores.load_results(chosen, "synth_regdb", root))
    assert cells(table.markdown(), "Baseline")[0] == "19.50 ± 0.50"
    assert "Mean ± standard deviation over 3 train and test splits; n = 1 seed." in table.caption


def test_a_seed_that_lacks_a_trial_is_left_out_so_that_means_are_over_the_same_trials(root: Path) -> None:
    chosen = study(seeds=(0, 1), trials=(1, 2))
    write_records(root, "synth_regdb", chosen, skip=("b_cc-t2-s1",))
    results = scores.load_results(chosen, "synth_regdb", root)
    table = report.table2(results)
    assert cells(table.markdown(), "B + CC")[0] == "27.55 ± – / 0.35"
    assert cells(table.markdown(), "B + CC")[-1] == "1 of 2"
    assert not any(run.startswith("b_cc-t1-s1") for run in table.runs)
    assert "Run but not used, since another split of their seed was not run: b_cc-t1-s1." in table.markdown()


def test_spread_over_random_galleries_is_in_the_csv(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    results = scores.load_results(study(), "synth_sysu", root)
    draws = [100 * one["cmc1"] for one in results.records["baseline-t1-s0"]["settings"]["all_single"]["per_trial"]]
    row = pd.read_csv(io.StringIO(report.table3(results).csv())).query("variant == 'baseline' and metric == 'rank1'")
    assert row["std_galleries"].item() == pytest.approx(statistics.stdev(draws), abs=1e-4)
    assert row["n_galleries"].item() == 10


# -- tables ------------------------------------------------------------------------------------------------------------


def test_table_1_has_the_four_searches_in_the_papers_order(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    table = report.table1(scores.load_results(study(), "synth_sysu", root))
    assert [block.setting for block in table.blocks] == ["all_single", "all_multi", "indoor_single", "indoor_multi"]
    assert [column.key for column in table.columns] == ["rank1", "rank10", "rank20", "mAP", "mINP"]
    indoor = table.blocks[3]
    assert indoor.heading.startswith(
        "Indoor-search, multi-shot (query infrared, 1700, 990 with a match; gallery visible, 1120"
    )
    assert indoor.rows[0].cells[0] is not None and indoor.rows[0].cells[0].mean == pytest.approx(35.0)


def test_table_2_names_both_directions_by_query_and_gallery(root: Path) -> None:
    write_records(root, "synth_regdb", study())
    table = report.table2(scores.load_results(study(), "synth_regdb", root))
    assert [block.heading for block in table.blocks] == [
        "Thermal to visible (query thermal, 1000; gallery visible, 1000; chance 1.25)",
        "Visible to thermal (query visible, 1000; gallery thermal, 1000; chance 1.25)",
    ]
    means = [block.rows[0].cells[0].mean for block in table.blocks if block.rows[0].cells[0]]
    assert means == pytest.approx([20.0, 18.0])
    assert "image-level" in table.caption


def test_a_real_regdb_table_of_fewer_than_ten_splits_names_them(root: Path) -> None:
    said = {}
    for trials in ((3,), (1, 7), tuple(range(1, 11))):
        for dataset in ("regdb", "synth_regdb"):
            write_records(root, dataset, chosen := study(trials=trials))
            for table in report.tables(scores.load_results(chosen, dataset, root)):
                said[dataset, len(trials), table.name] = re.findall(r"Only trial[^.]*\.", table.caption)
    for table in ("table2", "table3"):
        assert said["regdb", 1, table] == ["Only trial 3 of the protocol's ten splits."]
        assert said["regdb", 2, table] == ["Only trials 1, 7 of the protocol's ten splits."]
        assert said["regdb", 10, table] == said["synth_regdb", 1, table] == []


def test_tables_1_and_2_refuse_the_other_layout(root: Path) -> None:
    with pytest.raises(StudyError, match="Table 2 is for data sets of layout regdb; synth_sysu has layout sysu"):
        report.table2(scores.load_results(study(), "synth_sysu", root))


@pytest.mark.parametrize("dataset", ["synth_sysu", "synth_regdb"])
def test_synthetic_tables_say_so_and_show_no_number_of_the_paper(root: Path, dataset: str) -> None:
    write_records(root, dataset, study())
    for table in report.tables(scores.load_results(study(), dataset, root)):
        assert scores.SYNTHETIC_NOTE in table.caption
        assert {row.source for block in table.blocks for row in block.rows} == {"ours"}
        assert set(pd.read_csv(io.StringIO(table.csv()))["synthetic"]) == {True}


def test_a_partial_data_set_is_named_in_every_caption(root: Path) -> None:
    write_records(root, "sysu", study())
    for path in (root / "results" / "sysu" / "metrics").glob("*.json"):
        edit(path, lambda record: record.update(partial=True))
    for table in report.tables(scores.load_results(study(), "sysu", root)):
        assert scores.PARTIAL_NOTE in table.caption


def random_seed_galleries(record: dict[str, Any]) -> None:
    """The record as the other gallery convention leaves it: single-shot searches only, each marked."""
    record["settings"] = {key: value for key, value in record["settings"].items() if key.endswith("single")}
    for setting in record["settings"].values():
        setting["galleries"] = "random_seed"


def rerank(record: dict[str, Any]) -> None:
    for setting in record["settings"].values():
        setting["rerank"] = {"k1": 20, "k2": 6, "lambda": 0.3}


def euclidean(record: dict[str, Any]) -> None:
    for setting in record["settings"].values():
        setting["metric"] = "euclidean"


def test_another_distance_is_named_in_every_caption(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    for path in (root / "results" / "synth_sysu" / "metrics").glob("*.json"):
        edit(path, euclidean)
    for table in report.tables(scores.load_results(study(), "synth_sysu", root)):
        assert "Ranked by euclidean distance between the features as they are" in table.caption


def test_variants_that_share_a_module_must_share_its_reading(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    edit(metrics(root, "synth_sysu", "b_ml_cc-t1-s0"), lambda r: r["config"]["variant"]["cc"].update(equation=2))
    with pytest.raises(StudyError, match=r"b_cc-t1-s0 and b_ml_cc-t1-s0 differ in config.variant.cc.equation \(3 ag"):
        scores.load_results(study(), "synth_sysu", root)


def test_other_galleries_and_re_ranking_are_named_in_every_caption_and_nowhere_else(root: Path) -> None:
    write_records(root, "sysu", study())
    plain = scores.load_results(study(), "sysu", root)
    assert plain.markers == ()
    for path in (root / "results" / "sysu" / "metrics").glob("*.json"):
        edit(path, random_seed_galleries)
        edit(path, rerank)
    results = scores.load_results(study(), "sysu", root)
    for before, table in zip(report.tables(plain), report.tables(results), strict=True):
        assert "`random.seed(trial)`" in table.caption and "`random.seed(trial)`" not in before.caption
        assert "k-reciprocal neighbours (k1 20, k2 6, lambda 0.3)" in table.caption and "k1" not in before.caption
    table1 = report.table1(results)
    shown = {block.setting: block.rows[13].cells[0] for block in table1.blocks}
    assert shown["all_multi"] is None and shown["indoor_multi"] is None  # not run, and no number of the paper's
    assert shown["all_single"] is not None and shown["all_single"].mean == pytest.approx(20.0)


def test_fewer_than_ten_galleries_are_named_in_every_caption_and_a_regdb_split_has_none(root: Path) -> None:
    write_records(root, "sysu", study())
    write_records(root, "regdb", study())
    for path in (root / "results" / "sysu" / "metrics").glob("*.json"):
        edit(path, lambda record: [one.update(per_trial=one["per_trial"][:3]) for one in record["settings"].values()])
    results = scores.load_results(study(), "sysu", root)
    assert results.markers == (scores.FEWER_NOTE.format(3),)
    assert all("Means over 3 of the protocol's ten" in table.caption for table in report.tables(results))
    assert scores.load_results(study(), "regdb", root).markers == ()


def test_a_setting_that_is_missing_without_that_convention_is_a_damaged_record(root: Path) -> None:
    write_records(root, "sysu", study())
    for path in (root / "results" / "sysu" / "metrics").glob("*.json"):
        edit(path, lambda record: record["settings"].pop("all_multi"))
    with pytest.raises(StudyError, match="has no cmc1 for all_multi"):
        report.table1(scores.load_results(study(), "sysu", root))


def test_real_tables_print_the_spread_over_seeds_and_over_galleries_apart(root: Path) -> None:
    chosen = study(seeds=(0, 1, 2))
    write_records(root, "sysu", chosen, skip=("b_ml-t1-s1", "b_ml-t1-s2"))
    results = scores.load_results(chosen, "sysu", root)
    table = report.table3(results)
    # The fixture draws ten galleries 0.2 points apart: their sample standard deviation is 0.2 * sqrt(110 / 12).
    assert cells(table.markdown(), "ours: B + CC")[0] == f"28.80 ± 1.00 / {0.2 * (110 / 12) ** 0.5:.2f}"
    assert cells(table.markdown(), "ours: B + ML")[0] == f"16.90 ± – / {0.2 * (110 / 12) ** 0.5:.2f}"
    assert cells(table.markdown(), "ours: B + CC")[5] == "99.31 ± 0.00 / –"  # within a modality nothing is drawn
    assert "± standard deviation over seeds / over 10 random galleries; n = 1 to 3 seeds." in table.caption


def test_a_real_table_of_one_seed_says_that_its_spread_is_not_over_seeds(root: Path) -> None:
    write_records(root, "sysu", study())
    table = report.table1(scores.load_results(study(), "sysu", root))
    assert "± standard deviation over 10 random galleries; n = 1 seed, so none over seeds." in table.caption
    assert cells(table.markdown(), "ours: B + CC")[0] == "27.80 ± 0.61"


def test_each_block_of_a_real_table_holds_every_row_of_the_papers(root: Path) -> None:
    table = report.table1(scores.load_results(study(), "sysu", root))
    methods = list(report.paper_table(1, root / "results" / "paper").index)
    for block in table.blocks:
        assert [row.variant for row in block.rows if row.source == "paper"] == methods
        assert all(cell is None for row in block.rows if row.source != "paper" for cell in row.cells)


def test_what_is_compared_with_the_paper_is_each_of_its_scores_once(root: Path) -> None:
    write_records(root, "sysu", study())
    found = report.comparisons(scores.load_results(study(), "sysu", root))
    keys = [(one.setting, one.variant.name, one.metric) for one in found]
    assert len(keys) == len(set(keys)) == 4 * 4 + 3 * 4  # DANet in four searches, three further rows of Table 3
    cc = {one.metric: (one.paper, one.ours) for one in found if one.variant.name == "b_cc"}
    assert cc["mAP"][0] == 57.78
    assert cc["Rank-1"][1] is not None and cc["Rank-1"][1].mean == pytest.approx(27.8)
    assert report.comparisons(scores.load_results(study(), "synth_sysu", root)) == []


def test_a_variant_with_another_label_is_still_compared_with_what_it_is_in_the_paper(root: Path) -> None:
    renamed = study()
    renamed.variants["b_cc"].label = "with centres"
    write_records(root, "sysu", renamed)
    usual, found = (report.comparisons(scores.load_results(one, "sysu", root)) for one in (study(), renamed))
    assert [(one.method, one.metric, one.paper) for one in found] == [(u.method, u.metric, u.paper) for u in usual]
    assert "gain of with centres over Baseline" in findings.findings(scores.load_results(renamed, "sysu", root))


def test_real_tables_put_the_papers_rows_above_ours_and_the_difference_below(root: Path) -> None:
    write_records(root, "sysu", study())
    ablation, table1 = report.tables(scores.load_results(study(), "sysu", root))
    sources = [row.source for row in table1.blocks[0].rows]
    assert sources == ["paper"] * 13 + ["ours"] * 4 + ["difference"]
    markdown = table1.markdown()
    assert cells(markdown, "paper: DANet") == ["66.89", "95.06", "98.09", "64.69", "–", "not stated"]
    assert cells(markdown, "difference: B + ML + CC − paper's DANet")[:2] == ["−40.99", "−39.16"]
    assert scores.SYNTHETIC_NOTE not in table1.caption
    assert cells(ablation.markdown(), "difference: B + CC − paper's B + CC")[0] == "−30.77"  # 27.80 - 58.57
    assert [row.source for row in ablation.blocks[0].rows] == ["paper"] * 4 + ["ours"] * 4 + ["difference"] * 4


def test_the_papers_regdb_directions_are_matched_by_query(root: Path) -> None:
    write_records(root, "regdb", study())
    ablation, table2 = report.tables(scores.load_results(study(), "regdb", root))
    thermal = {row.variant: row.cells for row in table2.blocks[0].rows if row.source == "paper"}
    assert thermal["DANet"][0] == Score(78.3)  # infrared2visible, not visible2infrared's 79.4
    assert thermal["D2RL (Wang et al. 2019b)"] == (None,) * 6  # dashes in this direction, as in the paper
    assert [len([row for row in block.rows if row.source == "paper"]) for block in table2.blocks] == [9, 9]
    assert {row.source for row in ablation.blocks[0].rows} == {"ours"}  # the paper's ablation is on SYSU-MM01 only


def test_the_papers_numbers_never_fill_a_cell_that_was_not_run(root: Path) -> None:
    table = report.table3(scores.load_results(study(), "sysu", root))
    markdown = table.markdown()
    assert cells(markdown, "ours: Baseline") == ["not run"] * 9 + ["0 of 1"]
    assert cells(markdown, "paper: Baseline")[0] == "54.50"
    assert set(cells(markdown, "difference: Baseline − paper's Baseline")) == {"–"}


def test_stored_paper_tables_give_the_differences_the_paper_claims(root: Path) -> None:
    ablation = report.paper_table(3, ROOT / "results" / "paper")
    gains = (ablation - ablation.loc["Baseline"]).round(2)
    assert (gains.loc["B + CC", "rank1"], gains.loc["B + CC", "mAP"]) == (4.07, 5.94)
    assert (gains.loc["B + ML", "rank1"], gains.loc["B + ML", "mAP"]) == (8.99, 8.33)
    assert (gains.loc["B + ML + CC", "rank1"], gains.loc["B + ML + CC", "mAP"]) == (12.39, 12.85)
    table1 = report.paper_table(1, ROOT / "results" / "paper")
    assert table1.shape == (13, 16)
    assert table1.loc["DANet", "all_single_rank1"] == ablation.loc["B + ML + CC", "rank1"]
    assert report.paper_table(2, ROOT / "results" / "paper").shape == (9, 4)
    with pytest.raises(StudyError, match="table3_ablation.csv is missing"):
        report.paper_table(3, root / "nowhere")


# -- text --------------------------------------------------------------------------------------------------------------


def test_equal_records_give_equal_bytes_and_nothing_half_written_stays(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    results = scores.load_results(study(), "synth_sysu", root)
    first = {path.name: path.read_bytes() for t in report.tables(results) for path in report.write_table(t, root / "a")}
    again = scores.load_results(study(), "synth_sysu", root)
    second = {path.name: path.read_bytes() for t in report.tables(again) for path in report.write_table(t, root / "b")}
    assert first == second
    assert sorted(first) == sorted(path.name for path in (root / "a").iterdir())
    assert set(first) == {f"table{number}.{suffix}" for number in (1, 3) for suffix in ("md", "csv", "tex")}


def test_provenance_names_each_run_with_the_hashes_of_model_and_configuration(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    results = scores.load_results(study(), "synth_sysu", root)
    table = report.table3(results)
    hashes = results.records["b_ml-t1-s0"]["provenance"]
    line = f"b_ml-t1-s0 (model {hashes['model_sha256'][:8]}, configuration {hashes['config_sha256'][:8]})"
    assert line in table.markdown() and f"% {line}" in table.latex()
    assert f"Data {hashes['data_sha256'][:8]}" in table.markdown()


# -- the notebook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["synth_sysu", "synth_regdb"])
def test_the_tables_notebook_needs_only_records_and_writes_all_tables(
    root: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = study(seeds=(0, 1))
    write_records(root, dataset, chosen)
    shown = run_notebook("04_tables.ipynb", root, chosen, monkeypatch, dataset=dataset)
    number = 1 if dataset == "synth_sysu" else 2
    written = {path.name for path in (root / "results" / dataset / "tables").iterdir()}
    assert written == {"findings.md", "differences.csv"} | {
        f"table{n}.{suffix}" for n in (number, 3) for suffix in ("md", "csv", "tex")
    }
    assert [one.data.splitlines()[0][:5] for one in shown] == ["synth", "synth", "- Syn"]
    assert not (root / "runs").exists()
