"""Tables and findings from made-up records, against texts in tests/snapshots (UPDATE_SNAPSHOTS=1 writes them)."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import records
from records import ROOT, of, study, write_records

from danet_study import results, tables
from danet_study.files import StudyError
from danet_study.protocols import PROTOCOLS

SNAPSHOTS = Path(__file__).parent / "snapshots"
PAPER = ROOT / "results/paper"


def loaded(folder, plan=None, without=(), **overrides):
    plan = plan or study(seeds=(0, 1, 2))
    write_records(folder, [of(c, **overrides) for c in plan.runs() if c.name not in without])
    return results.load_results(plan, plan.plan.datasets[0], folder)


def own(folder, protocol="regdb"):
    """Results of a user's own data set, neither published nor rendered."""
    plan = study(seeds=(0, 1), splits=("mine-1",))
    change = {"name": "mine", "title": "My photographs", "published": False, "protocol": protocol}
    mine = plan.datasets["regdb"].model_copy(update=change)
    return loaded(folder, plan.model_copy(update={"datasets": {**plan.datasets, "mine": mine}}))


def texts(found):
    """Table 3 or its like, Table 1 or 2 or their like, and the findings, as Markdown."""
    made = (tables.ablation_table(found, PAPER), tables.settings_table(found, PAPER))
    return [*(table.markdown() for table in made), tables.findings(found, PAPER)]


def same_as_snapshot(name, text):
    path = SNAPSHOTS / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


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
    same_as_snapshot(f"{name}.md", "\n".join(texts(found)))
    same_as_snapshot(f"{name}.tex", tables.ablation_table(found, PAPER).latex())


def test_cells_show_mean_half_interval_and_n(tmp_path):
    grid = tables.ablation_table(loaded(tmp_path, without={"synth_sysu-1-b_ml-2"}), PAPER).grid().set_index("Variant")
    assert grid.loc["Baseline", "Rank-1"] == "22.00 ± 2.48"  # 21, 22, 23: 4.302653 / sqrt(3)
    assert grid.loc["Baseline", ["n", "Chance"]].tolist() == ["3", "12.50"]
    assert grid.loc["B + ML", ["n", "Rank-1"]].tolist() == ["2 of 3", "23.50 ± 6.35"]
    assert list(grid)[-4:] == ["Infrared only, Rank-1", "Final L_id", "Chance", "n"]


def test_variant_that_was_not_run_says_so_in_every_cell(tmp_path):
    found = loaded(tmp_path, study(), without={"synth_sysu-1-b_cc-0"})
    for table in (tables.ablation_table(found, PAPER), tables.settings_table(found, PAPER)):
        grid = table.grid()
        mine = grid[grid["Variant"] == "B + CC"].drop(columns=["Setting", "Variant"], errors="ignore")
        assert set(mine.pop("n")) == {"0 of 1"} and set(mine.to_numpy().flat) == {"not run"}
        assert "synth_sysu-1-b_cc-0" in table.markdown()
    claims = tables.claim_grid(found, PAPER).set_index(["Contrast", "Score"])[["Here", "n", "Verdict"]]
    assert claims.loc[("CC given Baseline", "mAP")].tolist() == ["not run", "0", "not run"]
    assert claims.loc[("ML given Baseline", "mAP")].tolist() == ["+2.00", "1", "not tested (n = 1)"]
    assert "b_cc" not in set(tables.scores(found)["variant"])


def test_one_seed_has_no_interval_anywhere(tmp_path):
    found = loaded(tmp_path, study())
    assert "±" not in tables.settings_table(found, PAPER).grid().to_string()
    assert "n = 1" in tables.ablation_table(found, PAPER).markdown()
    claims = tables.claim_grid(found, PAPER)
    assert set(claims[["95 % interval", "p", "Holm", "Detectable"]].to_numpy().flat) == {"–"}
    assert claims["Verdict"].str.contains("not tested").all()


@pytest.mark.parametrize("split", ["synth_sysu-1", "synth_regdb-1", "sysu-1", "regdb-1", "mine-1"])
def test_paper_rows_are_in_the_tables_of_its_own_data_sets_only(tmp_path, split):
    found = own(tmp_path) if split == "mine-1" else loaded(tmp_path, study(splits=(split,)))
    real, rendered = found.dataset.published, split.startswith("synth")
    ablation, settings, findings = texts(found)
    assert ("paper: DANet" in settings, "paper's numbers" in findings) == (real, real)
    assert ("paper: " in ablation) == (split == "sysu-1")
    names = [tables.ablation_table(found, PAPER).name, tables.settings_table(found, PAPER).name]
    expected = {"sysu-1": ["table3", "table1"], "mine-1": ["ablation", "settings"]}
    assert names == expected.get(split.removeprefix("synth_"), ["table3", "table2"])
    for text in (ablation, settings):
        assert ("Synthetic" in text) == rendered and ("paper" in text) == (split != "mine-1")


def test_data_set_with_a_protocol_of_its_own_has_all_tables(tmp_path, monkeypatch):
    settings = {"one_way": "one way"}
    protocol = replace(PROTOCOLS["regdb"], settings=settings, ablation="one_way", sides={"one_way": (1, 0)}, trials=1)
    monkeypatch.setitem(PROTOCOLS, "mine", protocol)
    monkeypatch.setitem(records.SETTINGS, "mine", {"one_way": (24, 0.125)})
    ablation, settings, findings = texts(own(tmp_path, "mine"))
    assert all("one way" in text and "21.50" in text and "paper" not in text for text in (ablation, settings))
    assert "CC given Baseline" in findings and "paper's numbers" not in findings


def test_captions_are_short_and_name_rendered_data(tmp_path):
    for seeds in ((0, 1), (0,)):
        for split in ("synth_sysu-1", "regdb-1"):
            found = loaded(tmp_path, study(seeds=seeds, splits=(split,)))
            object.__setattr__(found.dataset, "title", "A title that does not say it")
            captions = [text for text in "\n".join(texts(found)).splitlines() if found.dataset.title in text]
            assert len(captions) == (4 if split.startswith("synth") else 5)
            assert all(len(text.split()) <= 40 + 7 for text in captions)  # the usual title has 4 words less
            assert all(("rendered" in text) == split.startswith("synth") for text in captions)


@pytest.mark.parametrize(("split", "name"), [("sysu-1", "table1_sysu_mm01.csv"), ("regdb-1", "table2_regdb.csv")])
def test_every_printed_number_of_the_paper_reaches_its_table(tmp_path, split, name):
    grid = tables.settings_table(loaded(tmp_path, study(splits=(split,))), PAPER).grid()
    shown = grid[grid["n"] == "not stated"].drop(columns=["Setting", "Variant", "n"]).replace("–", None)
    printed = pd.read_csv(PAPER / name, index_col=0).stack().dropna()
    assert sorted(map(float, shown.stack().dropna())) == sorted(printed)


def test_records_of_other_training_code_are_marked(tmp_path):
    found = loaded(tmp_path)
    assert "versions" not in tables.ablation_table(found, PAPER).markdown()
    found.records["synth_sysu-1-b_cc-1"]["versions"]["training_code_sha256"] = "ee" * 32
    assert "2 versions" in tables.ablation_table(found, PAPER).markdown()


def test_paper_number_is_judged_by_the_prediction_interval(tmp_path):
    found = loaded(tmp_path, study(seeds=(0, 1, 2), splits=("sysu-1",)))
    for one in found.records.values():
        if one["variant"] == "b_ml_cc":  # Rank-1 62, 63, 64: 63 ± 4.97; mAP 58, 59, 60: 59 ± 4.97
            mean = one["settings"]["all_single"]["mean"]
            mean["cmc1"], mean["mAP"] = 0.62 + 0.01 * one["seed"], 0.58 + 0.01 * one["seed"]
    grid = tables.paper_grid(found, PAPER)
    assert len(grid) == 3 * 4 + 4 * 4  # the ablation's rows, then DANet's four searches
    both = grid[(grid["Variant"] == "B + ML + CC") & (grid["Setting"] == "all-search, single-shot")].set_index("Score")
    numbers = ["Paper", "Ours", "Prediction interval", "n", "Verdict"]
    assert both.loc["Rank-1", numbers].tolist() == ["66.89", "63.00", "58.03 to 67.97", "3", "consistent"]
    assert both.loc["mAP", "Verdict"] == "not reproduced"
    partial = loaded(tmp_path, study(seeds=(0, 1), splits=("regdb-1",)), partial=True)
    assert "Partial" in tables.settings_table(partial, PAPER).markdown()
    assert tables.paper_grid(partial, PAPER)["Verdict"].str.startswith("not tested").all()


def test_claims_have_the_papers_gains_and_figure_1_in_three_readings(tmp_path):
    found = loaded(tmp_path)
    for one in found.records.values():  # nearest: 75, 80, 85; median: 49, 50, 51; mean: as it is for all seeds
        one["modality_gap"]["nearest"], one["modality_gap"]["median"] = (
            0.75 + 0.05 * one["seed"],
            0.49 + 0.01 * one["seed"],
        )
    grid = tables.claim_grid(found, PAPER)
    tests = grid[grid["Score"] != "share"]
    assert " ".join(tests["Paper"]) == "+4.07 +5.94 +3.40 +4.52 +8.99 +8.33 +8.32 +6.91 +12.39 +12.85 −0.67 −1.42"
    assert list(dict.fromkeys(grid["Claim"])) == ["CC helps", "ML helps", "both help", "both add up", "Figure 1"]
    table = results.differences(found).set_index(["contrast", "metric"])
    assert tests["Here"].tolist() == [tables.signed(value) for value in table["difference"]]
    assert tests["Verdict"].tolist() == table["verdict"].tolist()
    shares = grid[grid["Score"] == "share"][["Contrast", "Here", "95 % interval", "n", "Verdict"]].to_numpy().tolist()
    assert [row[1:] for row in shares] == [
        ["100.00 %", "–", "–", "holds, not tested"],
        ["80.00 %", "67.58 to 92.42", "3", "holds"],  # 5 * 4.302653 / sqrt(3)
        ["75.00 %", "–", "–", "holds, not tested"],
        ["50.00 %", "47.52 to 52.48", "3", "inconclusive"],
        ["75.00 %", "–", "–", "holds, not tested"],
        ["25.00 %", "–", "3", "fails, not tested"],
    ]
    assert "nearest other, before training" in shares[0][0] and "mean other, after the Baseline" in shares[5][0]


def test_scores_are_tidy_and_read_back(tmp_path):
    read = pd.read_csv(io.StringIO(tables.to_csv(tables.scores(loaded(tmp_path)))))
    assert not read.duplicated(["setting", "variant", "metric"]).any()
    one = read.set_index(["setting", "variant", "metric"]).loc[("all_multi", "b_cc", "mAP")]
    assert one[["mean", "sd", "n", "synthetic"]].tolist() == [30.0, 1.0, 3, True]
    assert set(read[read["setting"] == "training"]["metric"]) >= {"L_id", "steps"}


def test_latex_has_one_row_per_variant_and_escapes(tmp_path):
    text = tables.ablation_table(loaded(tmp_path), PAPER).latex()
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(re.search(r"(?<!\\)[_%#]", line) for line in body)
    assert text.count("\\\\") == 5 and text.count("{") == text.count("}")
    assert not set("±−–") & set("\n".join(body))


def test_pipes_and_stars_in_labels_do_not_break_markdown(tmp_path):
    odd = study().variants["b_cc"].model_copy(update={"label": "CC | *new* <b>"})
    text = tables.ablation_table(loaded(tmp_path, study(rows={"b_cc": odd})), PAPER).markdown()
    row = next(line for line in text.splitlines() if "new" in line)
    assert r"CC \| \*new\* \<b\>" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", text.splitlines()[2]))


def test_variants_of_the_same_label_keep_rows_of_their_own(tmp_path):
    twin = study().variants["b_cc"].model_copy(update={"label": "Baseline"})
    assert len(tables.settings_table(loaded(tmp_path, study(rows={"b_cc": twin})), PAPER).grid()) == 4 * 4


def test_write_tables_writes_all_files_whole_and_the_same_again(tmp_path):
    plan = study(seeds=(0, 1))
    loaded(tmp_path, plan)
    (tmp_path / "paper").symlink_to(PAPER)
    paths = tables.write_tables(plan, "synth_sysu", tmp_path)
    folder = tmp_path / "synth_sysu/tables"
    names = {"table1.md", "table1.tex", "table3.md", "table3.tex", "findings.md", "differences.csv", "scores.csv"}
    names.add("classifiers.md")
    assert {path.name for path in folder.iterdir()} == names | {"classifiers.md"}
    first = {path: path.read_bytes() for path in paths}
    assert tables.write_tables(plan, "synth_sysu", str(tmp_path)) == paths
    assert {path: path.read_bytes() for path in paths} == first
    columns = {"contrast", "difference", "low", "high", "n", "p", "holm", "verdict", "gallery_low", "gallery_high"}
    assert columns <= set(pd.read_csv(folder / "differences.csv"))


def test_classifiers_are_tabled_for_the_variants_that_train_them(tmp_path):
    accuracy = {head: {"visible": 0.9, "infrared": 0.8} for head in ("C", "C_v", "C_r")}
    gradient = {"L_sid": {"mean": 1.85, "std": 0.1}, "L_M": {"mean": 0.3, "std": 0.1}}
    plan = study(seeds=(0, 1))
    found = loaded(tmp_path, plan)
    assert "not measured" in tables.classifiers_section(found)  # old records
    for run in found.records.values():
        if run["variant"] == "b_ml":
            run["classifiers"] = {"cosine": {"mean": -0.25 + 0.5 * run["seed"], "std": 0}, "accuracy": accuracy}
            run["classifiers"]["gradient"] = gradient
    write_records(tmp_path, found.records.values())
    lines = tables.classifiers_section(results.load_results(plan, "synth_sysu", tmp_path)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| B ")]
    assert [row[0] for row in rows] == ["B + ML", "B + ML + CC"] and rows[1][1] == "not measured"
    # cosines -0.25 and 0.25: mean 0, half interval t(0.975, 1) * 0.25 = 12.706 * 0.25
    assert rows[0][1] == "0.00 ± 317.66" and rows[0][2:] == ["90.00", "80.00"] * 3 + ["185.00", "30.00", "2"]


def test_missing_table_of_the_paper_is_named(tmp_path):
    with pytest.raises(StudyError, match="table3_ablation.csv"):
        tables.findings(loaded(tmp_path), tmp_path)
