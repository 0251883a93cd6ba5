"""DVC, papermill and the kernel killed while they work, two at once, and disks that fill up: the next run is right."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fixtures.pipeline import copy_project, edit, shell, shrink

from danet_core.config import load_study
from tests.fixtures.faults import packed_project, run, small_disk
from tools.checkout import unlock
from tools.strip import strip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and mounts are POSIX")
TRAIN, EVALUATE = "train_sysu@synth_sysu-1-baseline-0", "evaluate_sysu@synth_sysu-1-baseline-0"
RUN = Path("runs/synth_sysu/baseline-t1-s0")
METRICS = Path("results/synth_sysu/metrics/baseline-t1-s0.json")
CHECKPOINT = Path("build/checkpoints/synth_sysu/baseline-t1-s0.pt")
ALL = ("tables_sysu@synth_sysu",)


def lower(params: dict) -> None:
    """One run of one data set, of which each stage takes seconds and the training as many epochs as a kill needs."""
    shrink(params)
    params["study"].update(sysu=["synth_sysu"], regdb=[], variants=["baseline"])
    params["datasets"]["synth_sysu"]["recipe"] = {**params["recipes"]["embedded"], "epochs": 20, "milestones": [15]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that is ready to train, with a packed store that was made without the pipeline."""
    root = copy_project(tmp_path_factory.mktemp("faults") / "danet")
    edit(root, lower)
    packed_project(root)
    for name in ("02_train", "03_evaluate", "04_tables"):
        strip(root / f"notebooks/{name}.ipynb", root / f"build/notebooks/{name}.ipynb")
    return root


@pytest.fixture(scope="module")
def expected(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model that the packed project's run ends with, trained without pipeline and interruption."""
    config = load_study(packed / "params.yaml").run("synth_sysu", "baseline", 1, 0)
    folder, _ = run(packed, config, tmp_path_factory.mktemp("whole"))
    return folder.model.read_bytes()


@pytest.fixture
def fresh(packed: Path) -> Path:
    """The packed project with nothing trained yet."""
    for name in ("runs", "results/synth_sysu", "build/checkpoints", "build/executed"):
        shutil.rmtree(packed / name, ignore_errors=True)
    return packed


def dvc(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """DVC in a process group of its own, as a batch job is; its log is in the folder."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "OMP_NUM_THREADS": "1",
    }
    with (project / "dvc.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=project,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def training(project: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the run has a checkpoint; everything that works for `process` then: shell, runner, kernel."""
    while not (project / CHECKPOINT).exists():
        assert process.poll() is None, (project / "dvc.log").read_text()
        time.sleep(0.02)
    return psutil.Process(process.pid).children(recursive=True)


def of(processes: list[psutil.Process], what: str) -> psutil.Process:
    return next(process for process in processes if what in " ".join(process.cmdline()) and process.name() != "sh")


def all_end(processes: list[psutil.Process]) -> None:
    assert psutil.wait_procs(processes, timeout=30)[1] == []


def said(project: Path) -> str:
    return (project / "dvc.log").read_text()


def nothing_half_written(project: Path) -> None:
    for folder in ("runs", "results"):
        assert [path for path in (project / folder).rglob("*partial*") if path.is_file()] == []


def goes_on(project: Path, expected: bytes) -> None:
    """The next DVC resumes the run, and it ends with the model of an uninterrupted one."""
    done = shell(project, "dvc", "repro", "--single-item", TRAIN)
    assert re.search(r"resumed synth_sysu/baseline-t1-s0 after epoch \d+ of 20", done.stdout)
    assert (project / RUN / "model.safetensors").read_bytes() == expected
    nothing_half_written(project)


# ---------------------------------------------------------------- one stage


@pytest.mark.faults
def test_a_killed_dvc_leaves_no_process_and_no_lock_and_the_next_goes_on(fresh: Path, expected: bytes) -> None:
    process = dvc(fresh, "repro", "--single-item", TRAIN)
    below = training(fresh, process)
    process.kill()
    process.wait()
    all_end(below)
    assert not (fresh / RUN / "record.json").exists()
    goes_on(fresh, expected)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["tools.notebook", "kernel.py"])
def test_a_killed_runner_or_kernel_fails_its_stage_in_a_sentence_and_the_next_goes_on(
    fresh: Path, expected: bytes, victim: str
) -> None:
    """A kernel killed for memory dies by the same signal."""
    process = dvc(fresh, "repro", "--single-item", TRAIN)
    below = training(fresh, process)
    of(below, victim).kill()
    assert process.wait(60) != 0
    all_end(below)
    if victim == "kernel.py":
        assert "02_train.ipynb, the kernel died; out of memory is the usual reason" in said(fresh)
    assert "failed to reproduce" in said(fresh)
    assert not (fresh / RUN / "record.json").exists()
    goes_on(fresh, expected)


@pytest.mark.faults
def test_a_stage_that_needs_more_memory_than_there_is_ends_in_a_sentence_and_the_next_goes_on(
    fresh: Path, expected: bytes
) -> None:
    """The limit is set on the running kernel, so that its next allocation is refused, as in a full container."""
    process = dvc(fresh, "repro", "--single-item", TRAIN)
    below = training(fresh, process)
    of(below, "kernel.py").rlimit(psutil.RLIMIT_AS, (1, 1))
    assert process.wait(120) != 0
    all_end(below)
    assert not (fresh / RUN / "record.json").exists()
    goes_on(fresh, expected)


@pytest.mark.faults
@pytest.mark.parametrize("to", ["group", "dvc"])
def test_a_batch_scheduler_s_sigterm_ends_all_with_a_checkpoint_and_the_next_goes_on(
    fresh: Path, expected: bytes, to: str
) -> None:
    process = dvc(fresh, "repro", "--single-item", TRAIN)
    below = training(fresh, process)
    if to == "group":  # as Slurm does: every process of the job
        for member in [*below, psutil.Process(process.pid)]:
            member.terminate()
    else:
        process.terminate()
    assert process.wait(60) != 0
    all_end(below)
    assert (fresh / CHECKPOINT).exists()
    goes_on(fresh, expected)


@pytest.mark.faults
def test_two_dvcs_at_once_never_train_one_run_twice(fresh: Path, expected: bytes) -> None:
    first = dvc(fresh, "repro", "--single-item", TRAIN)
    training(fresh, first)
    second = shell(fresh, "dvc", "repro", "--single-item", TRAIN, check=False)
    assert second.returncode != 0
    assert "is busy" in second.stdout + second.stderr or "lock" in second.stdout + second.stderr
    assert first.wait(120) == 0, said(fresh)
    assert (fresh / RUN / "model.safetensors").read_bytes() == expected
    assert said(fresh).count("epoch  20/20") == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("folder", "stage", "words"),
    [
        ("build/checkpoints", TRAIN, r"baseline-t1-s0\.pt cannot be written \(No space left on device\)"),
        ("runs", TRAIN, r"model\.safetensors cannot be written \(No space left on device\)"),
        ("results/synth_sysu", EVALUATE, r"baseline-t1-s0\.json cannot be written \(No space left on device\)"),
        ("build/executed", TRAIN, r"No space left on device"),
    ],
    ids=["checkpoint", "model", "metrics", "executed notebook"],
)
def test_a_stage_that_finds_the_disk_full_fails_in_a_sentence_and_is_right_once_there_is_room(
    fresh: Path, expected: bytes, folder: str, stage: str, words: str
) -> None:
    if stage == EVALUATE:
        shell(fresh, "dvc", "repro", "--single-item", TRAIN)
    with small_disk(fresh / folder, "4k" if stage == EVALUATE else "8k") as resize:
        done = shell(fresh, "dvc", "repro", "--single-item", stage, check=False)
        assert done.returncode != 0
        assert re.search(words, done.stdout + done.stderr)
        assert [path for path in (fresh / folder).rglob("*") if path.is_file() and path.suffix != ".lock"] == []
        resize("64m")
        shell(fresh, "dvc", "repro", "--single-item", stage)
        assert (fresh / RUN / "model.safetensors").read_bytes() == expected
        assert stage == TRAIN or json.loads((fresh / METRICS).read_text())["settings"]


@pytest.mark.faults
def test_a_result_made_again_is_identical_and_one_that_was_altered_is_different(fresh: Path, expected: bytes) -> None:
    for stage in (TRAIN, EVALUATE):
        shell(fresh, "dvc", "repro", "--single-item", stage)
    done = shell(fresh, sys.executable, "-m", "tools.verify", TRAIN)
    assert done.stdout.splitlines()[-1].startswith(f"identical: {METRICS} came out byte for byte")
    altered = json.loads((fresh / METRICS).read_text())
    altered["settings"]["all_single"]["mean"]["mAP"] /= 4
    (fresh / METRICS).write_text(json.dumps(altered))
    done = shell(fresh, sys.executable, "-m", "tools.verify", EVALUATE, check=False)
    assert done.returncode == 4
    assert f"different: {METRICS}: 1 of " in done.stdout and "all_single mAP" in done.stdout
    assert (fresh / RUN / "model.safetensors").read_bytes() == expected


# ---------------------------------------------------------------- the whole pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A small project without anything made, and what its pipeline makes uninterrupted."""
    root = tmp_path_factory.mktemp("pipeline")
    whole = copy_project(root / "whole")
    edit(whole, lower)
    shell(whole, "dvc", "repro", *ALL)
    project = copy_project(root / "danet")
    edit(project, lower)
    yield project, results(whole)


def results(project: Path) -> dict[str, bytes]:
    """Tables, metrics and model by name."""
    paths = [*(project / "results/synth_sysu").rglob("*"), project / RUN / "model.safetensors"]
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def forget(project: Path) -> None:
    """Back to a fresh download."""
    for name in ("data", "runs", "results/synth_sysu", "build", "dvc.lock", ".dvc/tmp"):
        path = project / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.faults
def test_a_pipeline_killed_at_random_moments_ends_with_the_tables_of_an_uninterrupted_one(
    pipeline: tuple[Path, dict[str, bytes]],
) -> None:
    project, expected = pipeline
    seed = random.SystemRandom().randrange(2**32)
    moments, kills, killed, stages = random.Random(seed), 12, 0, set()
    while killed < kills:
        process = dvc(project, "repro", *ALL)
        try:
            status = process.wait(moments.uniform(2, 25))
        except subprocess.TimeoutExpired:
            below = psutil.Process(process.pid).children(recursive=True)
            victim = moments.choice([psutil.Process(process.pid), *below])
            victim.kill()
            process.wait(90)
            all_end(below)
            killed += 1
        else:
            assert status == 0, f"seed {seed}: {said(project)}"
            assert results(project) == expected, f"seed {seed}"
            forget(project)
        stages |= set(re.findall(r"Running stage '(\w+)", said(project)))
    shell(project, "dvc", "repro", *ALL)
    assert results(project) == expected, f"seed {seed}"
    nothing_half_written(project)
    print(f"{kills} kills in the stages {', '.join(sorted(stages))}, seed {seed}")


@pytest.mark.faults
def test_two_whole_pipelines_at_once_end_with_the_tables_of_one(pipeline: tuple[Path, dict[str, bytes]]) -> None:
    project, expected = pipeline
    forget(project)
    both = [dvc(project, "repro", *ALL) for _ in range(2)]
    for process in both:
        process.wait(300)
    shell(project, "dvc", "repro", *ALL)
    assert results(project) == expected
    nothing_half_written(project)


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize("content", ["", '{"write": {', "[]", "number of another program", "dead"])
def test_a_lock_that_a_killed_dvc_left_is_removed(tmp_path: Path, content: str) -> None:
    path = tmp_path / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True)
    other = subprocess.Popen(["sleep", "60"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    try:
        pids = {"number of another program": other.pid, "dead": gone.pid}
        if content in pids:
            content = json.dumps({"write": {"runs": {"pid": pids[content], "cmd": "dvc repro"}}, "read": {}})
        path.write_text(content)
        unlock(tmp_path)
        assert not path.exists()
    finally:
        other.kill()
        other.wait()


def test_a_lock_of_a_running_dvc_is_kept(tmp_path: Path) -> None:
    path = tmp_path / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True)
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc", "repro"])
    try:
        while not psutil.Process(running.pid).cmdline():  # it is no Python yet
            time.sleep(0.01)
        path.write_text(json.dumps({"read": {"data": [{"pid": running.pid, "cmd": "dvc repro"}]}, "write": {}}))
        unlock(tmp_path)
        assert path.exists()
    finally:
        running.kill()
        running.wait()
