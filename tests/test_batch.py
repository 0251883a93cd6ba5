"""tools.batch on toy pipelines: order, room, failures, signals, kills, GPUs, stale locks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools import batch, job, setup

ROOT = Path(__file__).resolve().parent.parent
TOY = """
stages:
  data:
    cmd: echo 1 > data
    outs: [data: {cache: false}]
  check:
    cmd: echo 1 > inventory
    always_changed: true
    outs: [inventory: {cache: false}]
  prepare:
    cmd: echo 1 > prepared
    deps: [inventory]
    outs: [prepared: {cache: false}]
  train:
    matrix: {run: [a, b, c]}
    cmd: python toy.py ${key}
    deps: [data, prepared, toy.py]
    outs: ["${key}.model"]
  tables:
    cmd: cat *.model > table
    deps: [a.model, b.model, c.model]
    outs: [table]
"""
SCRIPT = """
import os, pathlib, sys, time
name = sys.argv[1]
pathlib.Path(f"{name}.env").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "") + " " + os.environ["OMP_NUM_THREADS"])
for epoch in range(1, 4):
    print(f"epoch   {epoch}/3  L_id 1.0", flush=True)
    time.sleep(float(os.environ.get("TOY_SECONDS", 0.05)))
if pathlib.Path(f"{name}.broken").exists():
    raise ValueError(f"{name} is broken")
pathlib.Path(f"{name}.model").write_text(name)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "dvc.yaml").write_text(TOY)
    (tmp_path / "toy.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def command(project, *arguments, **environment):
    """Start the batch in the project."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "tools.batch", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=project, env=environment, text=True, **pipes)


def finish(process, status=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def started(project, name):
    """Wait until a run has started."""
    deadline = time.monotonic() + 60
    while not (project / f"{name}.env").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left(project, seconds=15):
    """Processes that still work in the project after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()) == project and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                pass
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_stages_run_once_in_order_and_failures_do_not_stop_others(project):
    (project / "b.broken").touch()
    output = finish(command(project, "--jobs", "2"), status=1)
    assert "train@b failed: ValueError: b is broken (build/logs/train-b.log)" in output
    assert [line for line in output.splitlines() if line.startswith("a  epoch")] == [
        f"a  epoch   {epoch}/3  L_id 1.0" for epoch in (1, 2, 3)
    ]
    assert {path.name for path in project.glob("*.model")} == {"a.model", "c.model"}
    assert not (project / "table").exists()
    assert (project / "a.env").read_text().split()[-1] == "1"  # thread
    (project / "b.broken").unlink()
    output = finish(command(project))
    assert (project / "table").read_text() == "abc"
    assert "train@a" not in output  # although the always changed stage before it ran again
    assert "train@b  done" in output
    assert "prepare" not in output


def test_a_target_brings_what_it_depends_on_and_nothing_else(project):
    finish(command(project, "train@c"))
    assert {path.name for path in project.glob("*.model")} == {"c.model"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(project, number):
    process = command(project, TOY_SECONDS="60")
    started(project, "a")
    process.send_signal(number)
    finish(process, status={signal.SIGINT: 130, signal.SIGTERM: 143}[number])
    assert not left(project, 5)


def test_a_killed_dvc_is_a_failed_run_and_the_next_call_finishes(project):
    process = command(project, "train@a", TOY_SECONDS="2")
    started(project, "a")
    (dvc,) = psutil.Process(process.pid).children()
    dvc.kill()
    finish(process, status=1)
    assert not left(project)
    finish(command(project, "train@a"))


def test_a_second_batch_in_the_same_folder_is_refused(project):
    process = command(project, TOY_SECONDS="60")
    started(project, "a")
    assert "in use" in finish(command(project), status=1)
    process.terminate()
    finish(process, status=143)


def test_each_run_has_a_gpu_to_itself(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert batch.visible_gpus() == ["2", "5"]
    used = []
    monkeypatch.setattr(batch, "start", lambda stage, command, gpu, ray_gpus: used.append((stage, gpu)))

    class Toy:
        order = ["train@a", "tables", "train@b", "train@c"]
        needs = dict.fromkeys(order, set())
        commands = dict.fromkeys(order, "")

        def changed(self, stages):
            return set(stages)

    batch.Batch(Toy(), 8, ["2", "5"], None).start_ready(lambda line: None)
    assert used == [("train@a", "2"), ("tables", None), ("train@b", "5")]


def test_the_last_error_of_a_log_is_found(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "\x1b[31mTraceback\x1b[0m\ndanet_study.files.StudyError: first\n\x1b[31mStudyError\x1b[39m: lr is too high\n"
        "ERROR: failed to reproduce 'train@a': failed to run: papermill, exited with 1\n\n"
    )
    assert job.Job("train@a", None, log).error() == "StudyError: lr is too high"


def test_a_stale_lock_of_dvc_is_removed_and_that_of_a_running_one_stays(tmp_path):
    path = tmp_path / "rwlock"
    for content in (
        '{"write": {"/x": {"pid": 4',
        json.dumps({"write": {"/x": {"pid": os.getpid(), "cmd": "dvc repro"}}}),
    ):
        path.write_text(content)
        setup.remove_stale_lock(path)
        assert not path.exists()
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "dvc", "repro"]
    with subprocess.Popen(sleeper) as running:
        path.write_text(json.dumps({"read": {"/x": [{"pid": running.pid, "cmd": "dvc repro"}]}}))
        setup.remove_stale_lock(path)
        assert path.exists()
        running.kill()


def test_a_call_waits_for_a_stage_that_a_killed_batch_has_left(project):
    sleeper = [sys.executable, "-c", "import time; time.sleep(12)", "dvc", "repro"]
    with subprocess.Popen(sleeper) as running:
        held = {"write": {str(project / "data"): {"pid": running.pid, "cmd": "dvc repro"}}}
        (project / ".dvc/tmp/rwlock").write_text(json.dumps(held))
        finish(command(project))
        assert running.poll() == 0
    assert (project / "table").exists()


def test_set_up_gives_a_clone_a_filter_without_shell_and_a_zip_copy_no_scm(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".dvc").mkdir()
    setup.main(tmp_path)
    get = ["git", "-C", str(tmp_path), "config", "--get", "filter.nbstripout.clean"]
    clean = subprocess.run(get, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(clean)  # as git's shell and DVC's git library without one read it
    assert program == Path(sys.executable).as_posix()
    assert arguments[:2] == ["-m", "nbstripout"]
    assert not (tmp_path / ".dvc/config.local").exists()


def test_waiting_threads_leave_the_cores_to_others_in_make_jobs_tests_and_jupyterlab():
    assert os.environ["OMP_WAIT_POLICY"] == job.child_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    lab = "import os, runpy, unittest.mock as m; runpy.run_path('tools/lab.py', {'c': m.MagicMock()})"
    calls = {"make": ["make", "-s", "--eval", "print: ; @echo $$OMP_WAIT_POLICY", "print"]}
    calls["lab"] = [sys.executable, "-c", f"{lab}; print(os.environ['OMP_WAIT_POLICY'])"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for words in calls.values():
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "PASSIVE\n"


def test_set_up_says_that_git_refuses_a_folder_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / ".git").touch()
    (tmp_path / ".dvc").mkdir()
    for path in (os.environ["PATH"], str(tmp_path)):  # a broken repository, and no git at all
        monkeypatch.setenv("PATH", path)
        setup.main(tmp_path)
        assert capsys.readouterr().err.startswith("setup: ")


def test_ray_runs_the_command_of_a_stage_and_enters_it(project):
    pytest.importorskip("ray")
    output = finish(command(project, "--ray", "local"))
    assert "train@a  done" in output
    assert (project / "table").read_text() == "abc"
