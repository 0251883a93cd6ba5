"""tools.verify: a result that is made again is identical, within the spread, or different, and which is said why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.pipeline import ROOT

from danet_core.files import StudyError, atomic_write_json
from tests.fixtures.records import record
from tools import verify
from tools.verify import EXIT, RETRAINED, SAME_WEIGHTS, compare, resolve


def stored_at(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A record of the Baseline with scores moved by `by`."""
    path = folder / f"baseline-t1-s{seed}.json"
    found = json.loads(json.dumps(record("synth_sysu", "baseline", seed=seed)))
    by = changes.pop("by", 0.0)
    for setting in found["settings"].values():
        setting["mean"]["cmc1"] += by
    found["provenance"] |= changes
    atomic_write_json(path, found)
    return path


def test_equal_bytes_are_identical(tmp_path: Path) -> None:
    verdict = compare(stored_at(tmp_path / "a"), stored_at(tmp_path / "b"), retrained=True)
    assert (verdict.kind, EXIT[verdict.kind]) == ("identical", 0)
    assert "byte for byte" in verdict.sentence


@pytest.mark.parametrize(
    ("by", "retrained", "kind"),
    [
        (0.9 * SAME_WEIGHTS, False, "within spread"),
        (1.1 * SAME_WEIGHTS, False, "different"),
        (1.1 * SAME_WEIGHTS, True, "within spread"),
        (-0.9 * RETRAINED, True, "within spread"),
        (1.1 * RETRAINED, True, "different"),
    ],
)
def test_scores_may_be_further_off_when_the_weights_were_made_again(
    tmp_path: Path, by: float, retrained: bool, kind: str
) -> None:
    verdict = compare(stored_at(tmp_path / "a"), stored_at(tmp_path / "b", by=by), retrained)
    assert verdict.kind == kind
    assert "4 of " in verdict.sentence and "cmc1" in verdict.sentence


def test_the_spread_of_several_stored_seeds_is_what_is_allowed(tmp_path: Path) -> None:
    stored = stored_at(tmp_path / "a")
    again = stored_at(tmp_path / "b", by=0.06)
    assert compare(stored, again, retrained=True).kind == "different"
    for seed, by in ((1, 0.05), (2, -0.05)):
        stored_at(tmp_path / "a", seed, by=by)
    assert compare(stored, again, retrained=True).kind == "within spread"
    assert compare(stored, again, retrained=False).kind == "different"


def test_a_result_of_other_data_or_numbers_is_different_however_close(tmp_path: Path) -> None:
    verdict = compare(stored_at(tmp_path / "a"), stored_at(tmp_path / "b", data_sha256="0" * 64), retrained=True)
    assert verdict.kind == "different"
    assert "was made with another data_sha256 than the project has" in verdict.sentence


def test_other_hashes_of_model_and_run_with_equal_scores_are_within_the_spread(tmp_path: Path) -> None:
    verdict = compare(stored_at(tmp_path / "a"), stored_at(tmp_path / "b", model_sha256="0" * 64), retrained=True)
    assert (verdict.kind, verdict.sentence.split(": ")[1][:5]) == ("within spread", "0 of ")


@pytest.mark.parametrize("change", ["content", "missing", "more"])
def test_a_folder_of_tables_is_identical_or_different_by_the_file_that_is(tmp_path: Path, change: str) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for name in ("table1.md", "table3.md"):
            (tmp_path / side / name).write_text("| 1 |\n")
    assert compare(tmp_path / "a", tmp_path / "b", retrained=False).kind == "identical"
    changed = tmp_path / "b" / ("table4.md" if change == "more" else "table3.md")
    changed.unlink() if change == "missing" else changed.write_text("| 2 |\n")
    verdict = compare(tmp_path / "a", tmp_path / "b", retrained=False)
    assert verdict.kind == "different" and changed.name in verdict.sentence


def test_nothing_stored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="is not stored, so there is nothing to compare with"):
        compare(tmp_path / "none.json", tmp_path / "none.json", retrained=True)


def test_training_is_verified_by_its_evaluation_and_both_come_from_dvc_yaml() -> None:
    stages = resolve("train_regdb@synth_regdb-1-b_cc-0", ROOT)
    assert [stage.name.split("@")[0] for stage in stages] == ["notebooks", "train_regdb", "evaluate_regdb"]
    assert "-p dataset synth_regdb -p variant b_cc -p trial 1 -p seed 0" in stages[1].command
    assert Path("data/packed/synth_regdb") in stages[1].needs
    assert Path("results/synth_regdb/metrics/b_cc-t1-s0.json") in stages[2].makes


def test_stages_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("tables_sysu@synth_sysu", ROOT)[1].makes == (Path("results/synth_sysu/tables"),)


def test_a_training_record_that_does_not_name_its_threads_is_an_error(tmp_path: Path) -> None:
    stages = resolve("train_sysu@synth_sysu-1-b_cc-0", ROOT)
    path = tmp_path / "runs/synth_sysu/b_cc-t1-s0/record.json"
    assert verify._threads(stages, tmp_path) == {}
    atomic_write_json(path, {"versions": {"device": {"threads": 3}}})
    assert verify._threads(stages, tmp_path) == {"OMP_NUM_THREADS": "3"}
    atomic_write_json(path, {"versions": []})
    with pytest.raises(StudyError, match="record.json has no entry versions.device.threads, so it is damaged; remove"):
        verify._threads(stages, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pack_sysu@synth_sysu", "cannot be verified; expected a name that begins with train_, evaluate_, tables_"),
        ("train_sysu@synth_sysu-1-b_c-0", "dvc.yaml has no stage"),
        ("train_sysu", "dvc.yaml has no stage"),
    ],
)
def test_a_stage_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    assert verify.main([name]) == 1
    assert words in capsys.readouterr().err


def test_an_input_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    stages = resolve("evaluate_sysu@synth_sysu-1-b_cc-0", ROOT)
    root = tmp_path / "project"
    for name in verify.CODE:
        (root / name).mkdir(parents=True)
    for stage in stages:
        for path in stage.needs:
            if path.suffix in (".py", ".ipynb"):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).touch()
    with pytest.raises(StudyError, match="is missing, from which evaluate_sysu@synth_sysu-1-b_cc-0 starts"):
        verify.run(stages, tmp_path / "copy", root)
