"""The pipeline after a change: other numbers, other seeds, a data set that is not there."""

from __future__ import annotations

import re
import sys

import pytest
from fixtures.pipeline import edit, finished_study, shell, status


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return finished_study(tmp_path_factory)


def test_a_real_data_set_that_is_absent_fails_by_name_and_leaves_the_others_tables(project):
    before, lock = (project / "params.yaml").read_text(), (project / "dvc.lock").read_text()
    edit(project, lambda params: params["study"].update(sysu=["sysu", "synth_sysu"]))
    try:
        done = shell(project, "dvc", "repro", "--keep-going", check=False)
        said = done.stdout + done.stderr
        assert done.returncode != 0
        assert "SYSU-MM01" in said
        assert "cam1" in said
        assert list((project / "results/synth_sysu/tables").iterdir())
        assert not (project / "data/prepared/sysu").exists()
        assert not (project / "data/packed/sysu").exists()
    finally:
        (project / "params.yaml").write_text(before)
        (project / "dvc.lock").write_text(lock)


def test_the_reference_trains_the_other_seeds_only_and_leaves_the_project_as_it_is(project):
    before = (project / "params.yaml").read_text()
    edit(project, lambda params: params["study"].update(sysu=[], variants=["baseline"]))
    kept = [project / name for name in ("params.yaml", "dvc.lock", "results/synth_regdb/tables/table3.md")]
    kept = {path: path.read_bytes() for path in kept}
    try:
        done = shell(project, sys.executable, "-m", "tools.reference")
        assert "2 to train: about 0 minutes" in done.stdout
        trained = {f"train_regdb@synth_regdb-1-baseline-{seed}" for seed in (1, 2)}
        assert set(re.findall(r"Running stage '(train[^']+)'", done.stdout + done.stderr)) == trained
        made = project / "results/reference/synth_regdb"
        assert "n = 3 seeds" in (made / "tables/table3.md").read_text()
        assert (made / "figures/cmc.png").exists()
        (first, *others) = [(made / f"metrics/baseline-t1-s{seed}.json").read_bytes() for seed in (0, 1, 2)]
        assert first == (project / "results/synth_regdb/metrics/baseline-t1-s0.json").read_bytes()
        assert first not in others
        assert {path: path.read_bytes() for path in kept} == kept
        again = shell(project, sys.executable, "-m", "tools.reference")
        assert "Running stage" not in again.stdout + again.stderr
        assert "3 of 3 runs are there, 0 to train" in again.stdout
    finally:
        (project / "params.yaml").write_text(before)


def test_changing_lambda_2_makes_exactly_the_ml_variants_stale_and_what_follows_from_them(project):
    """Last in this file: it leaves the copy with another lambda_2."""
    edit(project, lambda params: params["modules"]["ml"].update(lambda_2=9.0))
    trained = {"train_sysu@synth_sysu-1-b_ml_cc-0", "train_regdb@synth_regdb-1-b_ml_cc-0"}
    made = ("tables", "figures", "section")
    shown = {f"{what}_{layout}@synth_{layout}" for what in made for layout in ("sysu", "regdb")}
    assert set(status(project)) == trained | shown
    done = shell(project, "dvc", "repro")
    ran = set(re.findall(r"Running stage '([^']+)'", done.stdout + done.stderr))
    evaluated = {stage.replace("train", "evaluate") for stage in trained}
    assert ran - {"readme"} == trained | evaluated | shown | {"report"}
