"""The pipeline as a user has it: the demo study from end to end, and what changes make stale."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from ruamel.yaml import YAML

from danet_study import determinism
from danet_study.config import load_study
from tools.variation import copy_project, override

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON"))},
    **{"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
}
TRAINING = ("train@", "evaluate@")


def call(project, *command, check=True, **environment):
    """Run a command in the project; its output."""
    environment = {**ENVIRONMENT, **environment}
    options = {"capture_output": True, "text": True, "env": environment, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=project, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def status(project):
    """Stages that are not up to date, once the configurations are written again."""
    call(project, sys.executable, "-m", "danet_study.config")
    return set(json.loads(call(project, "dvc", "status", "--json")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` makes, in a folder with a space and an umlaut; the log is demo.log."""
    project = tmp_path_factory.mktemp("project") / "d\u00e9mo study"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        copy_project(project, YAML(typ="safe").load(ROOT / "studies/demo.yaml"))
    log = call(project, sys.executable, "-m", "tools.batch")
    (project / "demo.log").write_text(log)
    return project


@pytest.fixture
def changed(demo):
    """A function that overrides parameters; they are restored afterwards."""
    before = (demo / "params.yaml").read_bytes()
    yield lambda overrides: override(demo / "params.yaml", overrides)
    (demo / "params.yaml").write_bytes(before)


def test_the_demo_makes_tables_figures_and_a_report_that_say_what_they_are(demo):
    for dataset, table in (("synth_sysu", "table1"), ("synth_regdb", "table2")):
        for name in (table, "table3"):
            assert "demo, not converged" in (demo / f"results/{dataset}/tables/{name}.md").read_text()
        assert {path.suffix for path in (demo / f"results/{dataset}/figures").iterdir()} == {".png", ".pdf"}
    assert len(list((demo / "results/records").iterdir())) == 8
    report = (demo / "results/report.html").read_text()
    assert report.count("<img ") >= 10
    assert "demo, not converged" in report
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", report)  # it works offline
    assert set(json.loads((demo / "results/scores.json").read_text())["synth_sysu"]) == set(load_study().plan.variants)


def test_the_log_has_one_line_per_epoch_with_the_name_of_the_run(demo):
    log = (demo / "demo.log").read_text()
    epochs = re.findall(r"^(\S+)  epoch +\d+/3 .*L_id \d.*lr \d.*images/s.*left$", log, re.MULTILINE)
    assert len(epochs) == 8 * 3
    assert len(set(epochs)) == 8


def test_a_second_call_has_nothing_to_do(demo):
    assert status(demo) == set()
    assert call(demo, sys.executable, "-m", "tools.batch").strip() == "up to date"


def test_a_weight_of_l_m_makes_exactly_the_runs_with_mutual_learning_stale(demo, changed):
    changed({"variants": {"b_ml": {"losses": {"L_M": {"weight": 2.0}}}}})
    trained = {stage for stage in status(demo) if stage.startswith("train@")}
    splits = ("synth_sysu-1", "synth_regdb-1")
    assert trained == {f"train@{split}-{variant}-0" for split in splits for variant in ("b_ml", "b_ml_cc")}


def test_labels_and_titles_make_no_run_stale(demo, changed):
    changed({"variants": {"b_cc": {"label": "CC"}}, "datasets": {"synth_sysu": {"title": "rendered"}}})
    stale = status(demo)
    assert "tables@synth_sysu" in stale
    assert not [stage for stage in stale if stage.startswith((*TRAINING, "pack", "weights"))]


def test_evaluation_settings_do_not_retrain(demo, changed):
    changed({"defaults": {"evaluation": {"trials": 2}}})
    assert {stage.partition("@")[0] for stage in status(demo) if stage.startswith(TRAINING)} == {"evaluate"}


def test_an_edited_module_in_own_code_makes_the_configurations_stale(demo):
    path = demo / "docs/examples/my_losses.py"
    before = path.read_bytes()
    path.write_bytes(before + b"# edited\n")
    assert status(demo) == {"configs"}
    path.write_bytes(before)


def test_a_notebook_that_was_run_leaves_every_run_up_to_date(demo):
    path = demo / "notebooks/02_train.ipynb"
    before = path.read_text()
    notebook = nbformat.reads(before, 4)
    notebook.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    for count, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count, cell.metadata["execution"] = count, {"iopub.execute_input": "2021-01-01T00:00:00Z"}
        cell.outputs = [nbformat.v4.new_output("stream", text="hello\n")]
    nbformat.write(notebook, path)
    call(demo, "dvc", "repro", "notebooks")
    assert status(demo) == set()
    path.write_text(before)


def test_a_notebook_refuses_to_run_without_its_parameters_and_under_wrong_names(demo):
    for arguments in ((), ("-p", "varaint", "b_cc"), ("-p", "split", "synth_sysu-1", "-p", "variant", "b_c")):
        command = ("papermill", "notebooks/02_train.ipynb", "build/refused.ipynb", "-k", "python3", "--cwd", ".")
        assert "StudyError" in call(demo, *command, *arguments, check=False)


def test_a_failed_run_is_named_with_its_reason_and_log_and_the_others_finish(demo, changed):
    changed({"defaults": {"recipe": {"weight_decay": 0.0004}}, "datasets": {"synth_sysu": {"recipe": {"lr": 1e30}}}})
    wanted = [f"train@{split}-baseline-0" for split in ("synth_sysu-1", "synth_regdb-1")]
    done = call(demo, sys.executable, "-m", "tools.batch", *wanted, check=False)
    assert re.search(r"train@synth_sysu-1-baseline-0 failed: StudyError: .*lr.*build.logs.train-synth_sysu", done)
    assert "train@synth_regdb-1-baseline-0  done" in done
    record = json.loads((demo / "runs/synth_regdb-1-baseline-0/record.json").read_text())
    assert record["config"]["recipe"]["weight_decay"] == 0.0004


def test_dvc_shows_every_plot(demo, tmp_path):
    assert "failed" not in call(demo, "dvc", "plots", "show", "--out", str(tmp_path))
    assert len(list(tmp_path.rglob("*.png"))) == 3


# -------------------- habits: a zip copy in another repository, or `dvc exp run`; no locale, no home folder

TINY = {
    "study": {"datasets": ["synth_sysu"], "splits": ["synth_sysu-1"], "variants": ["baseline", "b_ml_cc"]},
    "datasets": {"synth_sysu": {"recipe": {"epochs": 2, "steps_per_epoch": 3, "milestones": [1]}}},
}
BARE = {"HOME": "/proc/none", "LANG": "C", "LC_ALL": "C"}


def repository(folder):
    """Commit all files of a folder; the commit."""
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "x")):
        call(folder, "git", *words)
    return call(folder, "git", "rev-parse", "HEAD").strip()


@pytest.mark.slow
@pytest.mark.parametrize("habit", ["zip", "exp"])
def test_a_shrunk_study_runs_to_the_end(tmp_path, habit):
    project = tmp_path / "K\u00e4se & Gr\u00f6\u00dfe"
    for name in call(ROOT, "git", "ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).exists():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    for overrides in (YAML(typ="safe").load(ROOT / "studies/demo.yaml"), TINY):
        override(project / "params.yaml", overrides)
    head = repository(project if habit == "exp" else tmp_path)
    call(project, sys.executable, "-m", "tools.setup", **BARE)
    command = {"zip": [sys.executable, "-m", "tools.batch"], "exp": ["dvc", "exp", "run", "-S", "bootstrap.seed=1"]}
    call(project, *command[habit], **BARE)
    record = json.loads((project / "results/records/synth_sysu-1-b_ml_cc-0.json").read_text())
    assert record["versions"]["commit"] == {"zip": "", "exp": f"{head}+changes"}[habit]
    assert (project / "results/report.html").exists()
    assert "up to date" in call(project, "dvc", "status", **BARE)


# -------------------- without running it


def test_a_record_names_the_commit_of_the_projects_own_repository_only(tmp_path, monkeypatch):
    def commit(root):
        monkeypatch.setattr(determinism, "ROOT", root)
        return determinism.versions(torch.device("cpu"))["commit"]

    project = tmp_path / "project"
    for name in determinism.TRAINING_CODE:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    foreign = shutil.copytree(project, tmp_path / "foreign/copy").parent
    head = repository(project)
    (foreign / "README").touch()
    repository(foreign)
    assert commit(project) == head
    assert commit(foreign / "copy") == ""
    assert commit(shutil.copytree(project, project / "build/published", ignore=lambda *_: [".git", "build"])) == head
    (project / "danet_study/train.py").write_text("# edited\n")
    assert commit(project) == head + "+changes"


def test_papermill_is_given_parameters_that_the_notebooks_have():
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    for command in [stage["cmd"] for stage in stages if "papermill" in stage["cmd"]]:
        (name,) = re.findall(r"build/notebooks/(\w+\.ipynb)", command)
        known = papermill.inspect_notebook(str(ROOT / "notebooks" / name))
        assert set(re.findall(r"-p (\w+) \$", command)) <= set(known)


def test_train_depends_on_all_code_that_a_checkpoint_is_checked_against():
    dependencies = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["train"]["deps"]
    assert all(name in dependencies or name.split("/")[0] in dependencies for name in determinism.TRAINING_CODE)


def test_paper_yaml_and_the_sensitivity_rows_are_studies(tmp_path):
    from tools.variation import sensitivity

    for overrides in (YAML(typ="safe").load(ROOT / "studies/paper.yaml"), sensitivity()):
        path = tmp_path / "params.yaml"
        shutil.copy(ROOT / "params.yaml", path)
        override(path, overrides)
        assert load_study(path).runs()


def test_params_stay_as_they_were_if_the_overrides_are_refused(tmp_path):
    from danet_study.files import StudyError

    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    with pytest.raises(StudyError):
        override(path, {"defaults": {"recipe": {"learning_rate": 1.0}}})
    assert path.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_conda_environment_names_the_packages_and_takes_the_locked_versions():
    pip = YAML(typ="safe").load(ROOT / "environment.yml")["dependencies"][-1]["pip"]
    assert pip[0] == "-r requirements.lock"
    wanted = {"torch", "torchvision", "jupyterlab", "papermill", "matplotlib", "pandas", "seaborn", "dvc"}
    assert wanted <= set(pip)
    lock = (ROOT / "requirements.lock").read_text()
    assert all(re.search(rf"^{name}==", lock, re.MULTILINE) for name in wanted)
