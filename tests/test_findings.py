"""The sentences about the tables, and the README's section."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures import records
from fixtures.records import edit, metrics, study, write_records

from danet_core import findings, report, scores
from danet_core.files import StudyError, atomic_write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with the paper's tables and nothing else."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    return tmp_path


def test_sentences_say_for_each_module_whether_it_helped(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    assert findings.ablation_sentences(scores.load_results(study(), "synth_sysu", root)) == [
        "On synth_sysu, B + CC raised Rank-1 by 7.80 points and mAP by 7.41 points (n = 1 seed): "
        "one seed, so no verdict.",
        "On synth_sysu, B + ML lowered Rank-1 by 3.10 points and mAP by 2.95 points (n = 1 seed): "
        "one seed, so no verdict.",
        "On synth_sysu, B + ML + CC raised Rank-1 by 5.90 points and mAP by 5.60 points (n = 1 seed): "
        "one seed, so no verdict.",
    ]


def sentence(root: Path, ranks: list[float], baseline: list[float], maps: list[float] | None = None) -> str:
    """The sentence on CC for these Rank-1 values by seed; mAP is 0.95 of Rank-1 unless given."""
    chosen = study(variants=("baseline", "b_cc"), seeds=tuple(range(len(ranks))))
    for variant, values in (("baseline", baseline), ("b_cc", ranks)):
        for seed, rank1 in enumerate(values):
            made = records.record("synth_sysu", variant, 1, seed, rank1)
            if maps is not None and variant == "b_cc":
                made["settings"]["all_single"]["mean"]["mAP"] = maps[seed]
            atomic_write_json(metrics(root, "synth_sysu", f"{variant}-t1-s{seed}"), made)
    return findings.ablation_sentence(scores.load_results(chosen, "synth_sysu", root), "b_cc")


@pytest.mark.parametrize("rank1", [0.21, 0.60])
def test_one_seed_gives_no_verdict_however_large_the_change(root: Path, rank1: float) -> None:
    assert sentence(root, [rank1], [0.20]).endswith("(n = 1 seed): one seed, so no verdict.")


def test_two_seeds_that_agree_to_a_tenth_of_a_point_do_not_settle_it_either(root: Path) -> None:
    # Mean 0.55, standard deviation 0.07, t(0.975, 1 degree of freedom) = 12.7: the interval reaches 0.64 either way.
    assert "not settled" in sentence(root, [0.205, 0.256], [0.20, 0.25])


def test_scores_that_disagree_are_said_to(root: Path) -> None:
    found = sentence(root, [0.25, 0.31, 0.37], [0.20, 0.25, 0.30], maps=[0.15, 0.20, 0.25])
    assert "raised Rank-1 by 6.00 ± 1.00 points and lowered mAP by" in found
    assert found.endswith("(n = 3 seeds): the two scores disagree.")


def test_a_row_whose_identity_loss_is_still_high_is_named_where_the_baselines_is_not(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    path = metrics(root, "synth_sysu", "b_cc-t1-s0")
    edit(path, lambda r: r["training"]["final"].update(L_id=1.02))
    assert "L_id is still 1 or above for B + CC (1.02)." in findings.findings(
        scores.load_results(study(), "synth_sysu", root)
    )


def test_with_several_seeds_the_paired_differences_decide(root: Path) -> None:
    # Differences 5, 6, 7 points: clear, although the seeds themselves differ by 10 points.
    clear = sentence(root, [0.25, 0.31, 0.37], [0.20, 0.25, 0.30])
    assert "raised Rank-1 by 6.00 ± 1.00 points" in clear and clear.endswith("(n = 3 seeds): it helps here.")
    # Differences 8, -6, 4 points: the mean of 2 is well within the spread.
    assert "not settled" in sentence(root, [0.28, 0.19, 0.34], [0.20, 0.25, 0.30])


def test_no_change_is_called_no_change(root: Path) -> None:
    assert "left Rank-1 as it was and left mAP as it was" in sentence(root, [0.2], [0.2])


def test_a_variant_that_was_not_run_is_not_judged(root: Path) -> None:
    write_records(root, "synth_sysu", study(), skip=("b_ml-t1-s0",))
    results = scores.load_results(study(), "synth_sysu", root)
    assert "ML cannot be judged" in findings.ablation_sentence(results, "b_ml")
    with pytest.raises(
        StudyError, match="variant 'b_x' is not listed for synth_sysu; study.variants has baseline, b_cc"
    ):
        findings.ablation_sentence(results, "b_x")


def test_findings_say_whether_the_baselines_last_identity_loss_is_below_one(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    assert "its last L_id is 0.75, below 1." in findings.findings(scores.load_results(study(), "synth_sysu", root))
    edit(metrics(root, "synth_sysu", "baseline-t1-s0"), lambda r: r["training"]["final"].update(L_id=2.7))
    found = findings.findings(scores.load_results(study(), "synth_sysu", root))
    assert "2.70, not below 1, so rows also rank speed of training." in found
    assert "16.0 times chance" in found and scores.SYNTHETIC_NOTE in found
    assert "Baseline 41.25 %, B + CC 41.25 %" in found


def scored(root: Path, ranks: list[float], variant: str = "b_ml_cc", baseline: list[float] | None = None) -> list[str]:
    """`against_paper` on SYSU-MM01 for these Rank-1 by seed of a variant, and of the Baseline where given."""
    chosen = study(variants=("baseline", variant), seeds=tuple(range(len(ranks))))
    for name, values in ((variant, ranks), ("baseline", baseline or [])):
        for seed, rank1 in enumerate(values):
            made = records.record("sysu", name, 1, seed, rank1)
            made["settings"]["all_single"]["mean"] = {**made["settings"]["all_single"]["mean"], "cmc1": rank1}
            atomic_write_json(metrics(root, "sysu", f"{name}-t1-s{seed}"), made)
    return findings.against_paper(scores.load_results(chosen, "sysu", root))


WHERE = "B + ML + CC, all-search, single-shot, against the paper's DANet"


@pytest.mark.parametrize(
    ("ranks", "verdict"),
    [
        # The paper has 66.89; standard deviation 0.9, so 1.80 points are two of them. Means 1.79 and 1.81 below it.
        ([0.6420, 0.6510, 0.6600], "Reproduced within two standard deviations"),
        ([0.6418, 0.6508, 0.6598], "Not reproduced"),
        ([0.6800, 0.6880, 0.6960], "Not reproduced"),  # better than the paper is not the paper's either
    ],
)
def test_a_score_is_reproduced_within_two_standard_deviations_over_seeds_and_no_further(
    root: Path, ranks: list[float], verdict: str
) -> None:
    line = next(line for line in scored(root, ranks) if f"{WHERE} (n = 3 seeds)" in line and "Rank-1 " in line)
    assert line.startswith(f"{verdict}: ")


def test_one_seed_is_not_judged_and_its_distance_is_given(root: Path) -> None:
    lines = scored(root, [0.66])
    assert (
        f"Cannot be judged: {WHERE} (n = 1, so there is no standard deviation): Rank-1 66.00 (paper 66.89, −0.89)"
        in (" ".join(lines))
    )
    assert not any(line.startswith(("Reproduced", "Not reproduced")) for line in lines)


def test_what_was_not_run_is_named_and_never_judged(root: Path) -> None:
    lines = scored(root, [0.66, 0.67])
    assert lines[-1].startswith("Cannot be judged, for it was not run: Baseline, all-search, single-shot, against")
    assert "gain of B + ML + CC over Baseline in points" in lines[-1]
    assert findings.against_paper(scores.load_results(study(), "regdb", root)) == [
        "Cannot be judged, for it was not run: B + ML + CC, thermal to visible, against the paper's DANet; "
        "B + ML + CC, visible to thermal, against the paper's DANet."
    ]


def test_gains_over_the_baseline_are_compared_seed_by_seed(root: Path) -> None:
    # The paper's CC gains 4.07 points of Rank-1. Gains here: 3, 4, 5, while the seeds themselves are 20 points apart.
    lines = scored(root, [0.43, 0.64, 0.85], "b_cc", [0.40, 0.60, 0.80])
    gain = next(line for line in lines if "gain of B + CC over Baseline" in line and "Rank-1 " in line)
    assert gain.startswith("Reproduced") and "Rank-1 4.00 ± 1.00 (paper 4.07, −0.07)" in gain


def test_with_one_seed_regdb_is_judged_by_the_spread_of_its_splits(root: Path) -> None:
    chosen = study(variants=("b_ml_cc",), trials=(1, 2, 3))
    for trial, rank1 in zip((1, 2, 3), (0.77, 0.78, 0.79), strict=True):
        made = records.record("regdb", "b_ml_cc", trial, 0, rank1)
        atomic_write_json(metrics(root, "regdb", f"b_ml_cc-t{trial}-s0"), made)
    lines = findings.against_paper(scores.load_results(chosen, "regdb", root))
    where = "B + ML + CC, thermal to visible, against the paper's DANet (n = 3 splits, one seed)"
    assert f"Reproduced within two standard deviations: {where}: Rank-1 78.00 ± 1.00 (paper 78.30, −0.30)" in (
        " ".join(lines)
    )


@pytest.mark.parametrize("marker", ["partial", "rerank", "random_seed"])
def test_scores_of_another_protocol_or_of_a_part_of_the_data_are_not_judged(root: Path, marker: str) -> None:
    def mark(record: dict[str, Any]) -> None:
        if marker == "partial":
            record["partial"] = True
            return
        for setting in record["settings"].values():
            setting |= {"rerank": {"k1": 20}} if marker == "rerank" else {"galleries": "random_seed"}

    chosen = study(seeds=(0, 1))
    write_records(root, "sysu", chosen)
    for path in (root / "results" / "sysu" / "metrics").glob("*.json"):
        edit(path, mark)
    results = scores.load_results(chosen, "sysu", root)
    assert all("the protocol or the data are not the paper's" in line for line in findings.against_paper(results))
    assert results.markers[0].split(" (")[0] in findings.findings(results)


def test_the_papers_slips_are_computed_from_its_tables(root: Path) -> None:
    sysu = " ".join(findings.paper_slips(scores.load_results(study(), "sysu", root)))
    assert "5.04 points of mAP above cm-SSFT on SYSU-MM01; its Table 1 has 64.69 and 63.20, which is +1.49" in sysu
    assert "cm-SSFT's 62.00 against its 59.53 (all-search, multi-shot)" in sysu
    assert "cm-SSFT's 72.40 against its 72.15 (indoor-search, multi-shot)" in sysu and "SIM" not in sysu
    regdb = " ".join(findings.paper_slips(scores.load_results(study(), "regdb", root)))
    assert "SIM's 78.30 against its 73.80 (thermal to visible)" in regdb
    assert "SIM's 75.20 against its 74.30 (visible to thermal)" in regdb and "cm-SSFT" not in regdb
    for text in (sysu, regdb):
        assert "leaves out L_sid" in text and "“MPANet”" in text and "Eq. 3" in text
    path = root / "results" / "paper" / "table2_regdb.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("DANet,78.3,73.8", "DANet,78.3,80.0"), encoding="utf-8")
    changed = " ".join(findings.paper_slips(scores.load_results(study(), "regdb", root)))
    assert "thermal to visible" not in changed and "visible to thermal" in changed


def test_findings_of_a_real_set_have_both_sections_and_those_of_an_embedded_set_have_neither(root: Path) -> None:
    for dataset, sections in (("sysu", 1), ("regdb", 1), ("synth_sysu", 0)):
        write_records(root, dataset, study())
        found = findings.findings(scores.load_results(study(), dataset, root))
        assert found.count(findings.AGAINST_PAPER) == found.count(findings.SLIPS) == sections
        assert ("paper" in found.replace(scores.SYNTHETIC_NOTE, "")) == bool(sections)


def test_the_modality_probe_is_told_before_and_after_training(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    found = findings.findings(scores.load_results(study(), "synth_sysu", root))
    assert "(50 % is guessing): Baseline 65.0 %, B + CC 67.0 %, B + ML 64.2 %, B + ML + CC 66.5 %; before" in found
    assert "from the pretrained backbone, 99.0 %." in found


def test_readme_block_holds_the_tables_and_findings_as_written(root: Path) -> None:
    datasets = ("synth_sysu", "synth_regdb")
    for dataset in datasets:
        write_records(root, dataset, study())
        results = scores.load_results(study(), dataset, root)
        report.write_table(report.table3(results), results.tables_folder)
        assert findings.write_findings(results) == results.tables_folder / "findings.md"
    for name in findings.README_FIGURES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    block = findings.readme_block(datasets, root)
    for dataset in datasets:
        results = scores.load_results(study(), dataset, root)
        assert f"### {dataset}\n\n{report.table3(results).markdown()}\n{findings.findings(results)}" in block


def test_a_block_is_replaced_between_its_marks_and_nothing_else_changes() -> None:
    text = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"
    once = findings.insert_block(text, "new\n")
    assert once == "before\n<!-- results:begin -->\nnew\n<!-- results:end -->\nafter\n"
    assert findings.insert_block(once, "new\n") == once
    with pytest.raises(StudyError, match="must hold the marks"):
        findings.insert_block("no marks", "new\n")
