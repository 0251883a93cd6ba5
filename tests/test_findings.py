"""The sentences about the tables, and the README's section."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fixtures import records
from fixtures.records import edit, metrics, study, write_records

from danet_core import findings, report
from danet_core.files import StudyError, atomic_write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with the paper's tables and nothing else."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    return tmp_path


def test_sentences_say_for_each_module_whether_it_helped(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    assert findings.ablation_sentences(report.load_results(study(), "synth_sysu", root)) == [
        "On synth_sysu, CC raised Rank-1 by 7.80 points and mAP by 7.41 points (n = 1 seed): it helps here, as far as "
        "one seed can tell.",
        "On synth_sysu, ML lowered Rank-1 by 3.10 points and mAP by 2.95 points (n = 1 seed): it does not help here, "
        "as far as one seed can tell.",
        "On synth_sysu, CC and ML together raised Rank-1 by 5.90 points and mAP by 5.60 points (n = 1 seed): "
        "it helps here, as far as one seed can tell.",
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
    return findings.ablation_sentence(report.load_results(chosen, "synth_sysu", root), "b_cc")


def test_a_small_change_with_one_seed_is_not_called_a_gain(root: Path) -> None:
    assert sentence(root, [0.21], [0.20]).endswith("(n = 1 seed): one seed cannot tell a change this small from noise.")


def test_scores_that_disagree_are_said_to(root: Path) -> None:
    found = sentence(root, [0.25], [0.20], maps=[0.15])
    assert "raised Rank-1 by 5.00 points and lowered mAP by 4.00 points (n = 1 seed): the two scores disagree." in found


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
    results = report.load_results(study(), "synth_sysu", root)
    assert "ML cannot be judged" in findings.ablation_sentence(results, "b_ml")
    with pytest.raises(
        StudyError, match="variant 'b_x' is not listed for synth_sysu; study.variants has baseline, b_cc"
    ):
        findings.ablation_sentence(results, "b_x")


def test_findings_say_when_the_baseline_is_not_trained_to_convergence(root: Path) -> None:
    write_records(root, "synth_sysu", study())
    assert "0.75: trained to convergence" in findings.findings(report.load_results(study(), "synth_sysu", root))
    edit(metrics(root, "synth_sysu", "baseline-t1-s0"), lambda r: r["training"]["final"].update(L_id=2.7))
    found = findings.findings(report.load_results(study(), "synth_sysu", root))
    assert "2.70: not trained to convergence" in found
    assert "16.0 times chance" in found and report.SYNTHETIC_NOTE in found
    assert "Baseline 41.25 %, B + CC 41.25 %" in found


def test_findings_on_real_data_give_the_distance_to_the_paper(root: Path) -> None:
    write_records(root, "sysu", study())
    found = findings.findings(report.load_results(study(), "sysu", root))
    assert "all-search, single-shot: ours minus the paper's DANet, in points: Rank-1 −40.99" in found


def test_readme_block_holds_the_tables_and_findings_as_written(root: Path) -> None:
    datasets = ("synth_sysu", "synth_regdb")
    for dataset in datasets:
        write_records(root, dataset, study())
        results = report.load_results(study(), dataset, root)
        report.write_table(report.table3(results), results.tables_folder)
        assert findings.write_findings(results) == results.tables_folder / "findings.md"
    block = findings.readme_block(datasets, root)
    for dataset in datasets:
        results = report.load_results(study(), dataset, root)
        assert f"### {dataset}\n\n{report.table3(results).markdown()}\n{findings.findings(results)}" in block


def test_a_block_is_replaced_between_its_marks_and_nothing_else_changes() -> None:
    text = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"
    once = findings.insert_block(text, "new\n")
    assert once == "before\n<!-- results:begin -->\nnew\n<!-- results:end -->\nafter\n"
    assert findings.insert_block(once, "new\n") == once
    with pytest.raises(StudyError, match="must hold the marks"):
        findings.insert_block("no marks", "new\n")
