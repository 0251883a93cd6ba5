"""The pipeline as a user has it: what one `dvc repro` makes, and what a second one leaves alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.pipeline import ROOT, edit, finished_study, shell, status

from tools.notebook import declared_parameters


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return finished_study(tmp_path_factory)


def test_one_command_makes_every_table_and_figure_of_both_data_sets(project):
    for dataset, names in (("synth_sysu", ("table1", "table3")), ("synth_regdb", ("table2", "table3"))):
        results = project / "results" / dataset
        runs = sorted(path.stem for path in (results / "metrics").iterdir())
        assert runs == ["b_ml_cc-t1-s0", "baseline-t1-s0"]
        for name in names:
            for suffix in ("md", "csv", "tex"):
                text = next((results / "tables").glob(f"{name}*.{suffix}")).read_text()
                assert text.strip()
            markdown = next((results / "tables").glob(f"{name}*.md")).read_text()
            assert "ynthetic" in markdown
            assert "not comparable" in markdown
        assert {path.suffix for path in (results / "figures").iterdir()} == {".png", ".pdf"}
    report = (project / "results/report.html").read_text()
    assert report.count("<img ") == 6 + 5
    assert "not made on this machine" not in report and "not on this machine" not in report


def test_training_prints_one_line_per_epoch_and_no_progress_bar(project):
    log = (project / "repro.log").read_text()
    epochs = [line for line in log.splitlines() if re.search(r"epoch +\d+/2 ", line)]
    assert len(epochs) == 2 * 2 * 2  # data sets x variants x epochs
    assert all(re.search(r"L_id \d.*lr \d.*images/s.*left", line) for line in epochs)
    assert "step/s" not in log


def test_a_second_run_has_nothing_to_do(project):
    done = shell(project, "dvc", "repro")
    assert "Running stage" not in done.stdout + done.stderr
    assert status(project) == {}


def test_running_a_notebook_by_hand_leaves_every_model_up_to_date(project):
    path = project / "notebooks/02_train.ipynb"
    before = path.read_text()
    notebook = json.loads(before)
    notebook["cells"][1]["execution_count"] = 7
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello\n"]}]
    path.write_text(json.dumps(notebook))
    try:
        assert set(status(project)) == {"notebooks"}
        shell(project, "dvc", "repro")
        assert status(project) == {}
    finally:
        path.write_text(before)
        shell(project, "dvc", "repro", "notebooks")


def test_a_comment_in_the_report_retrains_nothing(project):
    path = project / "danet_core/report.py"
    before = path.read_text()
    path.write_text(before + "# polished\n")
    try:
        assert not [
            stage for stage in status(project) if stage.startswith(("train", "evaluate", "pack", "prepare", "weights"))
        ]
    finally:
        path.write_text(before)


def test_each_module_and_recipe_number_reaches_the_stages_that_read_it(project):
    before = (project / "params.yaml").read_text()
    try:
        edit(project, lambda params: params["recipes"]["embedded"].update(lr=0.003))
        touched = {stage.split("@")[0] for stage, why in status(project).items() if "params.yaml" in json.dumps(why)}
        assert touched == {"train_sysu", "train_regdb"}
    finally:
        (project / "params.yaml").write_text(before)


def test_a_damaged_store_stops_the_stage_with_one_sentence(project):
    images = project / "data/packed/synth_regdb/images.npy"
    before = images.read_bytes()
    images.write_bytes(before[:-1] + bytes([before[-1] ^ 255]))
    try:
        notebook = ("build/notebooks/03_evaluate.ipynb", "build/executed/damaged.ipynb")
        done = shell(
            project, sys.executable, "-m", "tools.notebook", *notebook, "-p", "dataset", "synth_regdb", check=False
        )
        assert done.returncode == 1
        assert re.search(
            r"data/packed/synth_regdb: content differs .* expected sha256 .* found .* pack", done.stdout + done.stderr
        )
    finally:
        images.write_bytes(before)


def test_every_parameter_that_the_pipeline_passes_is_one_the_notebook_declares():
    commands = [stage["cmd"] for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()]
    runs = [command.split() for command in commands if "tools.notebook" in command]
    assert runs
    for words in runs:
        notebook = ROOT / "notebooks" / Path(words[3]).name
        passed = {words[index + 1] for index, word in enumerate(words) if word == "-p"}
        assert passed <= set(declared_parameters(notebook))


def test_every_file_a_stage_depends_on_exists_or_is_made_by_another():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for path in stage["deps"]:
            if path.startswith(("danet_core", "data_prep", "tools", "notebooks")):
                assert (ROOT / path).is_file(), path


def test_the_committed_study_is_the_embedded_benchmark_with_all_four_variants():
    shown = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip("a copy without git has no committed study beside the one switched on")
    assert yaml.safe_load(shown.stdout)["study"] == {
        "sysu": ["synth_sysu"],
        "regdb": ["synth_regdb"],
        "trials": [1],
        "variants": ["baseline", "b_cc", "b_ml", "b_ml_cc"],
        "seeds": [0],
    }
