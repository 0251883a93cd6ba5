"""RegDB's trials as batch runs: a real DVC project whose stages write a line instead of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fixtures.pipeline import copy_project, edit, shell, shrink, status

from danet_core.config import load_study
from danet_core.files import StudyError
from tools import trials
from tools.profile import switch

ROOT = Path(__file__).parent.parent

# The families of the true dvc.yaml, with its matrix; `work.py` takes the place of the notebooks.
PIPELINE = """
stages:
  train_regdb: &train
    matrix: {dataset: "${study.regdb}", trial: "${study.trials}", variant: "${study.variants}", seed: "${study.seeds}"}
    cmd: >-
      python work.py train ${item.trial} ${item.variant} ${item.seed}
      model-${item.trial}-${item.variant}-${item.seed}
    params: [modules.cc.margin]
    outs:
      - model-${item.trial}-${item.variant}-${item.seed}: {cache: false}
  evaluate_regdb:
    <<: *train
    cmd: >-
      python work.py evaluate ${item.trial} ${item.variant} ${item.seed}
      scores-${item.trial}-${item.variant}-${item.seed}
    deps:
      - model-${item.trial}-${item.variant}-${item.seed}
    outs:
      - scores-${item.trial}-${item.variant}-${item.seed}: {cache: false}
"""
WORK = """
import pathlib, sys, time
from tools.parent import kill_myself, watch  # as the true stages do: a shell may outlive DVC, waiting for this process
watch(kill_myself)
what, trial, variant, seed, out = sys.argv[1:]
if pathlib.Path(f"broken-{trial}").exists():
    sys.exit("broken on purpose")
with open("log.txt", "a") as log:
    print(what, trial, variant, seed, file=log)
while pathlib.Path(f"slow-{trial}").exists():
    time.sleep(0.05)
pathlib.Path(out).write_text(trial)
"""
CALL = "import sys; from tools.trials import main; from pathlib import Path; sys.exit(main(sys.argv[1:], Path()))"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The study's params.yaml with synth_regdb, trials 1 to 3, one variant and one seed, above small stages."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    switch(tmp_path / "params.yaml", {"sysu": [], "regdb": ["synth_regdb"], "trials": [1, 2, 3]})
    switch(tmp_path / "params.yaml", {"variants": ["b_cc"], "seeds": [0]})
    (tmp_path / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n", encoding="utf-8")
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tools.trials` for the project; the module takes the folder as an argument."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="200")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-c", CALL, *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def log(project: Path) -> list[str]:
    path = project / "log.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def both(*of: int) -> list[str]:
    """The log of these trials: the run of each is trained and scored."""
    return [f"{what} {trial} b_cc 0" for trial in of for what in ("train", "evaluate")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-10", tuple(range(1, 11))),
        ("3", (3,)),
        ("1,4,7", (1, 4, 7)),
        ("7, 1-3 ,2", (1, 2, 3, 7)),
        ("10", (10,)),
    ],
)
def test_trials_are_ranges_and_numbers_in_ascending_order(text: str, expected: tuple[int, ...]) -> None:
    assert trials.parse_trials(text) == expected


@pytest.mark.parametrize("text", ["", "0", "11", "1-11", "3-1", "1,,2", "one", "1-", "-1", "1.5", "1 2"])
def test_anything_else_is_no_trial(text: str) -> None:
    with pytest.raises(StudyError, match="numbers from 1 to 10 such as 1-10, 3 or 1,4,7"):
        trials.parse_trials(text)


def test_trials_are_described_as_one_would_say_them() -> None:
    assert [trials.describe(one) for one in ([3], [1, 2, 3], [1, 2], [1, 4])] == [
        "trial 3",
        "trials 1 to 3",
        "trials 1, 2",
        "trials 1, 4",
    ]


def test_a_trial_that_params_lacks_is_named_with_the_edit_and_nothing_runs(project: Path) -> None:
    done = run(project, "2-5", "--dataset", "synth_regdb")
    assert done.returncode == 1
    assert "study.trials is [1, 2, 3], without trials 4, 5; set `trials: [1, 2, 3, 4, 5]`" in done.stderr
    assert not log(project) and not (project / "dvc.lock").exists()


def test_a_data_set_that_is_not_switched_on_or_has_no_trials_is_named(project: Path) -> None:
    study = load_study(project / "params.yaml")
    with pytest.raises(StudyError, match=r"study.regdb is \['synth_regdb'\], without regdb; add it there"):
        trials.check_listed(study, "regdb", [1])
    with pytest.raises(StudyError, match="sysu has layout sysu, which has one split"):
        trials.check_listed(study, "sysu", [1])


def test_asked_for_trials_run_in_order_with_the_pipelines_own_commands_and_end_clean(project: Path) -> None:
    done = run(project, "3,1", "--dataset", "synth_regdb")
    assert done.returncode == 0, done.stdout + done.stderr
    assert log(project) == both(1, 3)
    assert "> python work.py train 1 b_cc 0 model-1-b_cc-0" in done.stdout
    assert "all 2 runs are up to date; `dvc repro` makes trial 2, which params.yaml lists too" in done.stdout
    assert {name.split("@")[1].split("-")[1] for name in status(project)} == {"2"}

    again = run(project, "1-3", "--dataset", "synth_regdb")
    assert again.returncode == 0 and log(project) == both(1, 3, 2)
    assert status(project) == {}
    assert "`dvc repro` makes the tables" in again.stdout


def test_a_failed_trial_stops_the_batch_and_a_second_call_goes_on_there(project: Path) -> None:
    (project / "broken-2").touch()
    done = run(project, "1-3", "--dataset", "synth_regdb")
    assert done.returncode == 1 and "trial 2 failed" in done.stderr
    assert log(project) == both(1)
    kept = run(project, "1-3", "--dataset", "synth_regdb", "--keep-going")
    assert kept.returncode == 1 and "trial 2 failed" in kept.stderr
    assert log(project) == both(1, 3)
    (project / "broken-2").unlink()
    assert run(project, "1-3", "--dataset", "synth_regdb").returncode == 0
    assert log(project) == both(1, 3, 2) and status(project) == {}


def test_the_stages_asked_for_are_ones_of_the_true_pipeline(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "danet")
    switch(project / "params.yaml", {"regdb": ["synth_regdb", "regdb"], "trials": [1, 10]})
    known = shell(project, "dvc", "stage", "list", "--all", "--name-only").stdout.split()
    study = load_study(project / "params.yaml")
    asked = {name for data in study.study.regdb for t in (1, 10) for name in trials.stages(project, study, data, t)}
    assert asked == {name for name in known if name.startswith("evaluate_regdb@")}
    assert asked


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends what a killed process started")
@pytest.mark.parametrize("shell_does", ['eval "exec $2"', 'eval "$2"; exit $?'], ids=["becomes it", "waits for it"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_is_stopped_or_killed_takes_dvc_with_it_and_goes_on_later(
    project: Path, number: signal.Signals, shell_does: str
) -> None:
    """Shells differ in whether they become the one command of a stage (bash) or wait for it (some of dash)."""
    (project / "slow-1").touch()
    (project / "sh").write_text(f"#!/bin/sh\n{shell_does}\n", encoding="utf-8")
    (project / "sh").chmod(0o755)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), SHELL=str(project / "sh"))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"
    command = [sys.executable, "-c", CALL, "1", "--dataset", "synth_regdb"]
    child = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not log(project):
        time.sleep(0.05)
    below = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(number)
    assert child.wait(30) == (128 + number if number == signal.SIGTERM else -number)
    assert not psutil.wait_procs(below, timeout=30)[1]
    (project / "slow-1").unlink()
    assert run(project, "1", "--dataset", "synth_regdb").returncode == 0
    assert status(project).keys() == {name for name in status(project) if "synth_regdb-1-" not in name}


@pytest.mark.slow
def test_two_trials_of_the_embedded_set_run_through_the_true_pipeline(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "danet")
    edit(project, shrink)
    switch(project / "params.yaml", {"sysu": [], "regdb": ["synth_regdb"], "trials": [1, 2], "variants": ["baseline"]})
    done = shell(project, sys.executable, "-m", "tools.trials", "1-2", "--dataset", "synth_regdb")
    assert "tools.notebook build/notebooks/02_train.ipynb" in done.stdout
    metrics = project / "results/synth_regdb/metrics"
    assert sorted(path.stem for path in metrics.iterdir()) == ["baseline-t1-s0", "baseline-t2-s0"]
    stale = {name.split("@")[0] for name in status(project)}
    assert stale <= {
        "tables_regdb",
        "figures_regdb",
        "section_regdb",
        "report",
        "readme",
    }  # what `make repro` does next
    again = shell(project, sys.executable, "-m", "tools.trials", "1-2", "--dataset", "synth_regdb")
    assert "Running stage" not in again.stdout + again.stderr
