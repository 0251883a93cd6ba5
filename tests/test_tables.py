"""Tables and findings from made-up records, against texts in tests/snapshots (UPDATE_SNAPSHOTS=1 writes them)."""

import csv
import io
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from records import ROOT, of, study, write_records

from danet_study import results, tables
from danet_study.files import StudyError

SNAPSHOTS = Path(__file__).parent / "snapshots"
PAPER = ROOT / "results/paper"


def loaded(folder, plan, without=(), **overrides):
    dataset = plan.plan.datasets[0]
    write_records(folder, [of(c, **overrides) for c in plan.runs() if c.name not in without])
    return results.load_results(plan, dataset, folder)


def same_as_snapshot(name, text):
    path = SNAPSHOTS / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def rows(grid, column):
    return grid.set_index(column).to_dict("index")


@pytest.mark.parametrize(
    ("name", "plan"),
    {
        "synth_sysu": study(seeds=(0, 1, 2)),
        "one_seed": study(splits=("synth_regdb-1",)),
        "regdb": study(seeds=(0, 1), splits=("regdb-1", "regdb-2")),
        "sysu": study(seeds=(0, 1), splits=("sysu-1",)),
    }.items(),
)
def test_tables_and_findings_are_those_of_the_snapshot(tmp_path, name, plan):
    found = loaded(tmp_path, plan, without={plan.runs()[-1].name} if name != "sysu" else ())
    parts = [tables.ablation_table(found, PAPER), tables.settings_table(found, PAPER)]
    same_as_snapshot(f"{name}.md", "\n".join([*(p.markdown() for p in parts), tables.findings(found, PAPER)]))
    same_as_snapshot(f"{name}.tex", parts[0].latex())


def test_cells_show_mean_half_interval_and_n(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1, 2)), without={"synth_sysu-1-b_ml-2"})
    grid = rows(tables.ablation_table(found, PAPER).grid(), "Variant")
    assert grid["Baseline"]["Rank-1"] == "22.00 ± 2.48"  # 21, 22, 23: 4.302653 / sqrt(3)
    assert (grid["Baseline"]["n"], grid["Baseline"]["Chance"]) == ("3", "12.50")
    assert (grid["B + ML"]["n"], grid["B + ML"]["Rank-1"]) == ("2 of 3", "23.50 ± 6.35")
    assert list(grid["Baseline"])[-4:] == ["Infrared only, Rank-1", "Final L_id", "Chance", "n"]


def test_variant_that_was_not_run_says_so_in_every_cell(tmp_path):
    found = loaded(tmp_path, study(), without={"synth_sysu-1-b_cc-0"})
    for table in (tables.ablation_table(found, PAPER), tables.settings_table(found, PAPER)):
        mine = table.cells[table.cells["variant"] == "b_cc"]
        assert set(mine["text"]) == set(mine["status"]) == {"not run"} and mine["mean"].isna().all()
        assert "synth_sysu-1-b_cc-0" in table.markdown() and "0 of 1" in table.markdown()
    verdicts = tables.contrast_grid(found).groupby("Contrast")["Verdict"].first()
    assert verdicts["CC given Baseline"] == "not run" and verdicts["ML given Baseline"] == "not tested (n = 1)"


def test_one_seed_has_no_interval_anywhere(tmp_path):
    found = loaded(tmp_path, study())
    assert "±" not in tables.settings_table(found, PAPER).grid().to_string()
    assert "n = 1" in tables.ablation_table(found, PAPER).markdown()
    for grid in (tables.contrast_grid(found), tables.claim_grid(found, PAPER)):
        assert set(grid["95 % interval"]) == set(grid["p"]) == {"–"}
    assert results.differences(found)[["low", "high", "p", "detectable"]].isna().all().all()


@pytest.mark.parametrize("split", ["synth_sysu-1", "synth_regdb-1", "sysu-1", "regdb-1"])
def test_paper_rows_are_in_the_tables_of_its_own_data_sets_only(tmp_path, split):
    found = loaded(tmp_path, study(splits=(split,)))
    real = not split.startswith("synth")
    table = tables.settings_table(found, PAPER)
    assert ("paper" in set(table.cells["source"])) == real
    assert ("paper" in set(tables.ablation_table(found, PAPER).cells["source"])) == (split == "sysu-1")
    assert ("paper's numbers" in tables.findings(found, PAPER)) == real
    for text in (table.markdown(), table.latex(), tables.findings(found, PAPER)):
        assert ("Synthetic" in text) != real
    assert table.name == ("table1" if "sysu" in split else "table2")


def test_every_printed_number_of_the_paper_reaches_its_table(tmp_path):
    for split, name in (("sysu-1", "table1_sysu_mm01.csv"), ("regdb-1", "table2_regdb.csv")):
        cells = tables.settings_table(loaded(tmp_path / split, study(splits=(split,))), PAPER).cells
        shown = cells[(cells["source"] == "paper") & (cells["status"] == "printed")]["mean"]
        assert sorted(shown) == sorted(pd.read_csv(PAPER / name, index_col=0).stack().dropna())


def test_partial_copy_and_other_protocol_are_marked_and_not_judged(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1), splits=("regdb-1",)), partial=True)
    assert "Partial" in tables.settings_table(found, PAPER).markdown()
    assert tables.paper_grid(found, PAPER)["Verdict"].str.startswith("not tested").all()


def test_records_of_other_training_code_are_marked(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1)))
    assert "versions" not in tables.ablation_table(found, PAPER).markdown()
    found.records["synth_sysu-1-b_cc-1"]["versions"]["training_code_sha256"] = "ee" * 32
    assert "2 versions" in tables.ablation_table(found, PAPER).markdown()


def test_paper_number_is_judged_by_the_prediction_interval(tmp_path):
    plan = study(seeds=(0, 1, 2), splits=("sysu-1",))
    found = loaded(tmp_path, plan)
    for one in found.records.values():
        if one["variant"] == "b_ml_cc":  # Rank-1 62, 63, 64: 63 ± 4.97; mAP 58, 59, 60: 59 ± 4.97
            mean = one["settings"]["all_single"]["mean"]
            mean["cmc1"], mean["mAP"] = 0.62 + 0.01 * one["seed"], 0.58 + 0.01 * one["seed"]
    grid = tables.paper_grid(found, PAPER)
    both = grid[(grid["Variant"] == "B + ML + CC") & (grid["Setting"] == "all-search, single-shot")]
    judged = rows(both, "Score")
    assert judged["Rank-1"] == {
        "Variant": "B + ML + CC",
        "Setting": "all-search, single-shot",
        "Paper": "66.89",
        "Ours": "63.00",
        "Prediction interval": "58.03 to 67.97",
        "n": "3",
        "Verdict": "consistent",
    }
    assert judged["mAP"]["Verdict"] == "not reproduced"
    assert len(grid) == 3 * 4 + 4 * 4  # the ablation's rows, then DANet's four searches


def test_claims_have_the_papers_gains_and_figure_1_in_three_readings(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1, 2)))
    grid = tables.claim_grid(found, PAPER)
    paper = grid[grid["Score"] != "share"]["Paper"].tolist()
    assert paper == ["+4.07", "+5.94", "+8.99", "+8.33", "+12.39", "+12.85", "−0.67", "−1.42"]
    shares = grid[grid["Score"] == "share"]
    assert shares["Here"].tolist() == ["100.00 %", "75.00 %", "75.00 %", "12.50 %", "75.00 %", "25.00 %"]
    verdicts = ["holds", "holds", "holds", "fails", "holds", "fails"]
    assert [verdict.split()[0] for verdict in shares["Verdict"]] == verdicts


def test_csv_is_tidy_and_reads_back(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1, 2)))
    table = tables.settings_table(found, PAPER)
    read = pd.read_csv(io.StringIO(table.csv()))
    assert not read.duplicated(["setting", "source", "variant", "metric"]).any()
    one = read[(read["setting"] == "all_multi") & (read["variant"] == "b_cc") & (read["metric"] == "mAP")].iloc[0]
    assert (one["mean"], one["std"], one["n"], one["synthetic"]) == (30.0, 1.0, 3, True)


def test_latex_has_one_row_per_variant_and_escapes(tmp_path):
    text = tables.ablation_table(loaded(tmp_path, study(seeds=(0, 1))), PAPER).latex()
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(re.search(r"(?<!\\)[_%#]", line) for line in body)
    assert text.count("\\\\") == 5 and text.count("{") == text.count("}")
    assert not set("±−–") & set("\n".join(body))


def test_captions_are_short(tmp_path):
    for plan in (study(seeds=(0, 1)), study(splits=("regdb-1",))):
        found = loaded(tmp_path, plan)
        texts = [table.caption for table in (tables.ablation_table(found, PAPER), tables.settings_table(found, PAPER))]
        texts += re.findall(r"^\*\*.*", tables.findings(found, PAPER), re.M)
        assert len(texts) >= 5 and all(len(text.split()) <= 40 for text in texts)


def test_pipes_and_stars_in_labels_do_not_break_markdown(tmp_path):
    odd = study().variants["b_cc"].model_copy(update={"label": "CC | *new* <b>"})
    text = tables.ablation_table(loaded(tmp_path, study(rows={"b_cc": odd})), PAPER).markdown()
    row = next(line for line in text.splitlines() if "new" in line)
    assert r"CC \| \*new\* \<b\>" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", text.splitlines()[2]))


def test_variants_of_the_same_label_keep_rows_of_their_own(tmp_path):
    twin = study().variants["b_cc"].model_copy(update={"label": "Baseline"})
    grid = tables.settings_table(loaded(tmp_path, study(rows={"b_cc": twin})), PAPER).grid()
    assert len(grid) == 4 * 4


def test_write_tables_writes_all_files_whole_and_the_same_again(tmp_path):
    plan = study(seeds=(0, 1))
    loaded(tmp_path, plan)
    (tmp_path / "paper").symlink_to(PAPER)
    paths = tables.write_tables(plan, "synth_sysu", tmp_path)
    names = {f"{table}.{suffix}" for table in ("table1", "table3") for suffix in ("md", "csv", "tex")}
    folder = tmp_path / "synth_sysu/tables"
    assert {path.name for path in folder.iterdir()} == names | {"differences.csv", "findings.md"}
    first = {path: path.read_bytes() for path in paths}
    assert tables.write_tables(plan, "synth_sysu", str(tmp_path)) == paths
    assert {path: path.read_bytes() for path in paths} == first
    header = next(csv.reader(io.StringIO((folder / "differences.csv").read_text())))
    assert {"contrast", "difference", "low", "high", "n", "p", "verdict", "gallery_low", "gallery_high"} <= set(header)


def test_missing_table_of_the_paper_is_named(tmp_path):
    with pytest.raises(StudyError, match="table3_ablation.csv"):
        tables.findings(loaded(tmp_path, study()), tmp_path)
