"""The pipeline as a user has it: real DVC, real notebooks, real training, with the numbers lowered."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.params import embedded

from tools.notebook import declared_parameters

ROOT = Path(__file__).parent.parent
CODE = ("danet_core", "data_prep", "tools", "notebooks", "results/paper")
FILES = (
    "dvc.yaml",
    "dvc.lock",
    "README.md",
    "pyproject.toml",
    ".dvcignore",
    ".dvc/config",
    ".dvc/.gitignore",
)


def copy_project(target: Path) -> Path:
    """A copy without git, data or results, as from a zip download, with the embedded study switched on."""
    for name in CODE:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in FILES:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    embedded(target / "params.yaml")
    (target / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    return target


def shell(project: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in the project, with the copy's packages first."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done


def edit(project: Path, change) -> None:
    """Change params.yaml as a mapping; aliases stay aliases."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def status(project: Path) -> dict[str, list]:
    """Stages that are not up to date, with what has changed."""
    return json.loads(shell(project, "dvc", "status", "--json").stdout)


def shrink(params: dict) -> None:
    """The embedded benchmark at the smallest size that still goes through every stage."""
    params["study"]["variants"] = ["baseline", "b_ml_cc"]
    params["recipes"]["embedded"].update(
        width=8, ids_per_batch=4, imgs_per_modality=2, epochs=2, steps_per_epoch=2, milestones=[1]
    )
    for dataset in params["datasets"].values():
        dataset["image"].update(height=32, width=16)
    params["datasets"]["synth_sysu"]["render"].update(
        train_ids=6, val_ids=2, test_ids=6, images={"train": 3, "val": 2, "test": 3}
    )
    params["datasets"]["synth_regdb"]["render"].update(ids=12)
    params["pretraining"].update(batch_size=8, steps=3)
    params["pretraining"]["render"].update(ids=6, images=3)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project after one `dvc repro` of the shrunk study."""
    root = copy_project(tmp_path_factory.mktemp("study") / "danet")
    edit(root, shrink)
    done = shell(root, "dvc", "repro")
    (root / "repro.log").write_text(done.stdout + done.stderr)
    return root


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
        edit(project, lambda params: params["recipes"]["embedded"].update(lr=0.002))
        touched = {stage.split("@")[0] for stage, why in status(project).items() if "params.yaml" in json.dumps(why)}
        assert touched == {"train_sysu", "train_regdb"}
    finally:
        (project / "params.yaml").write_text(before)


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
