"""Many runs at once through Ray: what is refused, what a run executes, and a cluster that loses a node in mid-run."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fixtures.params import embedded
from fixtures.pipeline import copy_project, edit, shrink

from danet_core.config import Study, load_study
from danet_core.evaluate import evaluate
from danet_core.files import StudyError
from tests.fixtures.faults import packed_project
from tests.fixtures.faults import run as train_alone
from tools import batch
from tools.batch import Run, Stage, chosen_runs, enter, inputs, planned, watch, work
from tools.strip import strip
from tools.trials import stale

ROOT = Path(__file__).parent.parent
EPOCHS = 40


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of a few seconds, ready to train: the true train and evaluate stages above a small packed store."""

    def lower(params: dict) -> None:
        shrink(params)
        params["study"].update(sysu=["synth_sysu"], regdb=[], variants=["baseline"], seeds=[0, 1, 2])
        recipe = {**params["recipes"]["embedded"], "epochs": EPOCHS, "milestones": [EPOCHS // 2]}
        params["datasets"]["synth_sysu"]["recipe"] = recipe

    root = copy_project(tmp_path_factory.mktemp("batch") / "danet")
    edit(root, lower)
    packed_project(root)
    for name in ("02_train", "03_evaluate"):
        strip(root / f"notebooks/{name}.ipynb", root / f"build/notebooks/{name}.ipynb")
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    kept = {name: stage for name, stage in pipeline["stages"].items() if name.startswith(("train", "evaluate"))}
    scores = [f"results/synth_sysu/metrics/baseline-t1-s{seed}.json" for seed in range(3)]
    kept["tables_sysu"] = {
        "cmd": f"cat {' '.join(scores)} > table",
        "deps": scores,
        "outs": [{"table": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}, sort_keys=False), encoding="utf-8")
    (root / "dvc.lock").unlink(missing_ok=True)
    return root


def some_runs(project: Path) -> list[Run]:
    study = load_study(project / "params.yaml")
    return planned(project, study, chosen_runs(study, ["synth_sysu"], ["baseline"], [1], [0, 1, 2]))


# ---------------------------------------------------------------- which runs


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(embedded(tmp_path / "params.yaml"))


def test_runs_are_all_combinations_and_a_set_of_one_split_has_trial_1_only(study: Study) -> None:
    found = chosen_runs(study, ["synth_sysu", "synth_regdb"], ["baseline", "b_cc"], [1], [0])
    assert found == [
        (dataset, variant, 1, 0) for dataset in ("synth_sysu", "synth_regdb") for variant in ("baseline", "b_cc")
    ]


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ((["regdb"], ["baseline"], [1], [0]), r"study.regdb is \['synth_regdb'\], without regdb; add it there"),
        ((["synth_regdb"], ["baseline"], [1, 2, 3], [0]), r"study.trials is \[1\], without trials 2, 3; set `trials: "),
        ((["synth_regdb"], ["baseline"], [1], [0, 1, 2]), r"without 1, 2; set `seeds: \[0, 1, 2\]` in its block"),
        ((["synth_sysu"], ["baseline_2x"], [1], [0]), r"set `variants: \[baseline, b_cc, b_ml, b_ml_cc, baseline_2x\]"),
        ((["synth_sysu"], ["bcc"], [1], [0]), "bcc"),
        ((["market"], ["baseline"], [1], [0]), "market"),
    ],
    ids=["data set", "trials", "seeds", "variant not listed", "no such variant", "no such data set"],
)
def test_a_run_that_the_pipeline_does_not_know_is_refused_with_the_key_to_set(
    study: Study, lists: Any, words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        chosen_runs(study, *lists)


def test_without_ray_one_sentence_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert batch.main([]) == 1
    assert re.fullmatch(r"tools.batch: .* needs ray, .*`make extras`, or `pip install .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cpus-per-run", "0"], "--cpus-per-run: expected a whole number of at least 1, found '0'"),
        (["--gpus-per-run", "-1"], "--gpus-per-run: expected a number of at least 0, found '-1'"),
        (["--retries", "-1"], "--retries: expected a whole number of at least 0, found '-1'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_number_that_no_run_can_have_is_wrong_usage_before_ray_starts(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "start_ray", None)
    with pytest.raises(SystemExit, match="2"):
        batch.main(words)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("key", ["datasets", "variants", "trials", "seeds"])
def test_an_empty_list_is_an_error_and_not_everything(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "start_ray", None)
    assert batch.main([f"--{key}", ""]) == 1
    assert re.fullmatch("tools.batch: .*''.*\n", capsys.readouterr().err)


# ---------------------------------------------------------------- what a run executes


def test_a_run_executes_the_pipelines_resolved_commands(project: Path) -> None:
    first, *_ = some_runs(project)
    assert first.name == "synth_sysu/baseline-t1-s0"
    train, score = first.stages
    assert train.name == "train_sysu@synth_sysu-1-baseline-0"
    assert train.command == (
        "python -m tools.notebook build/notebooks/02_train.ipynb build/executed/train-synth_sysu-baseline-t1-s0.ipynb "
        "-p dataset synth_sysu -p variant baseline -p trial 1 -p seed 0"
    )
    assert train.outs == (
        "runs/synth_sysu/baseline-t1-s0/model.safetensors",
        "runs/synth_sysu/baseline-t1-s0/record.json",
    )
    assert score.outs[-1] == "results/synth_sysu/metrics/baseline-t1-s0.json"


def stage_that_writes(name: str, out: str) -> Stage:
    code = f"import pathlib; pathlib.Path('{out}').write_text('new'); print('epoch 2/3  L_id 1')"
    return Stage(name, f'python -c "{code}"', (out,))


TRAIN, EVALUATE = stage_that_writes("train_sysu@a", "model"), stage_that_writes("evaluate_sysu@a", "scores")


def test_old_outputs_do_not_pass_for_new_ones_when_the_first_attempt_was_lost_before_it_began(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    log = tmp_path / "log"
    log.touch()
    assert work(tmp_path, [TRAIN, EVALUATE], log, 2, 0, {}) is None
    assert (tmp_path / "model").read_text() == (tmp_path / "scores").read_text() == "new"


def test_a_second_attempt_leaves_a_finished_training_alone(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("made by the first attempt")
    (tmp_path / "scores").write_text("old")
    log = tmp_path / "log"
    log.write_text("batch: train_sysu@a starts, attempt 1 on there, process 1\n")
    assert work(tmp_path, [TRAIN, EVALUATE], log, 2, 0, {}) is None
    assert (tmp_path / "model").read_text() == "made by the first attempt"
    assert (tmp_path / "scores").read_text() == "new"
    assert "batch: train_sysu@a had been finished before attempt 2" in log.read_text()


def test_a_command_that_fails_and_a_folder_that_is_not_shared_are_sentences(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "every machine needs the project's folder" in str(work(tmp_path, [TRAIN], log, 1, 0, {}))
    log.touch()
    fails = Stage("train_sysu@b", 'python -c "raise SystemExit(3)"', ("model",))
    assert work(tmp_path, [fails, EVALUATE], log, 1, 0, {}) == "train_sysu@b ended with 3"
    assert not (tmp_path / "scores").exists()


def test_a_runs_log_says_where_it_is_and_an_attempt_that_waits_is_not_called_running(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    run = Run("a/b", (TRAIN,), log)
    watch(run)
    assert run.state == "waiting"
    work(tmp_path, [TRAIN], log, 1, 0, {})
    watch(run)
    assert run.state == "running"
    assert run.where.endswith("train  epoch 2/3")
    again = Run("a/b", (TRAIN,), log, read_from=log.stat().st_size)
    watch(again)
    assert again.state == "waiting"


def test_a_run_whose_code_was_edited_meanwhile_is_not_entered_in_dvc_lock(project: Path) -> None:
    run = some_runs(project)[0]
    before = inputs(project, run.stages)
    assert "params.yaml" in before[run.stages[0].name] and "danet_core/losses.py" in before[run.stages[0].name]
    path = project / "danet_core/losses.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "# edited\n", encoding="utf-8")
    try:
        run.state = "done"
        enter(project, [run], before)
    finally:
        path.write_text(text, encoding="utf-8")
    assert (run.state, run.where) == ("failed", "danet_core/losses.py changed while it ran; call this again")
    assert not (project / "dvc.lock").exists()


# ---------------------------------------------------------------- the document


def test_the_hours_and_costs_in_the_document_follow_from_its_assumptions(study: Study) -> None:
    text = (ROOT / "docs/SCALE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    assert "60 s" in text and "$3 an hour" in text
    of = {name: study.dataset(name).recipe for name in ("sysu", "regdb")}
    for ms, seeds, number, cells in rows:
        lasts = {name: recipe.epochs * recipe.steps_per_epoch * int(ms) / 1000 + 60 for name, recipe in of.items()}
        runs = [lasts["sysu"]] * 4 * int(seeds) + [lasts["regdb"]] * 40 * int(seeds)
        assert len(runs) == int(number)
        for gpus, cell in zip((1, 8, 64), cells.split(" | "), strict=True):
            free = [0.0] * gpus
            for run in runs:
                heapq.heapreplace(free, free[0] + run)
            hours = max(free) / 3600
            assert cell == f"{hours:.1f} h, ${gpus * hours * 3:.0f}"


# ---------------------------------------------------------------- a cluster


@pytest.fixture
def ended() -> Iterator[contextlib.ExitStack]:
    """Takes what has to be called at the test's end, however it ends."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two Ray nodes of one CPU each on this machine; the second is the one to lose."""
    pytest.importorskip("ray", reason="Ray is not installed: make extras")
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has 107 characters at most
    (folder / "ray").mkdir()  # where Ray notes the address of a cluster
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    # As a driver sees this machine: without a route, and tests have none (see `offline`), Ray takes it for 127.0.0.1.
    ask = [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"]
    address = subprocess.run(ask, capture_output=True, text=True, check=True)
    node = {
        "num_cpus": 1,
        "node_ip_address": address.stdout.split()[-1],
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "temp_dir": str(folder / "ray"),
    }
    found = Cluster()
    try:
        while len(found.list_all_nodes()) < 2:
            try:
                found.add_node(**node)
            except Exception as error:  # a bare one: a node has 30 s to start, too few on a machine at its limit
                if "timed out during startup" not in str(error):
                    raise
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)  # a process that is about to end may still write its log


LONG = 300  # seconds; without an end, a cluster that lost its way would hold up every other test


def text_of(project: Path, seed: int) -> str:
    path = project / f"build/batch/synth_sysu/baseline-t1-s{seed}.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.skipif(os.name != "posix", reason="Ray's clusters are tested on POSIX")
def test_a_node_killed_in_mid_run_costs_no_run_and_no_epoch_twice_and_changes_no_result(
    project: Path, cluster: Any, tmp_path: Path, ended: contextlib.ExitStack
) -> None:
    (lost,) = cluster.worker_nodes
    raylet = lost.all_processes["raylet"][0].process.pid
    call = (
        "import sys; from pathlib import Path; from tools import batch; batch.PAUSE = 1; "
        "sys.exit(batch.main(sys.argv[1:], Path.cwd()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-c", call, "--address", cluster.address, "--cpus-per-run", "1"]
    output = tmp_path / "output"
    with output.open("w") as stream:
        process = subprocess.Popen(command, cwd=project, env=environment, stdout=stream, stderr=stream)
    ended.callback(process.kill)
    victim, deadline = None, time.monotonic() + LONG
    while victim is None:
        assert process.poll() is None, output.read_text()
        for seed in range(3):
            trains = re.search(r"process (\d+)\n[^@]*\nepoch ", text_of(project, seed))
            if trains and psutil.Process(int(trains[1])).ppid() == raylet:
                victim = seed
        assert time.monotonic() < deadline, f"no training began on the second node\n{output.read_text()}"
        time.sleep(0.05)
    cluster.remove_node(lost, allow_graceful=False)
    assert process.wait(LONG) == 0, output.read_text()

    # Each stage was finished once, and started once but for the training that was lost, which began no epoch anew.
    starts, ends = Counter[str](), Counter[str]()
    for seed in range(3):
        text = text_of(project, seed)
        starts.update(re.findall(r"^batch: (\S+) starts", text, re.MULTILINE))
        ends.update(re.findall(r"^batch: (\S+) is done", text, re.MULTILINE))
        epochs = [int(number) for number in re.findall(r"^epoch +(\d+)/", text, re.MULTILINE)]
        assert epochs == sorted(set(epochs)) and epochs[-1] == EPOCHS
    names = [f"{family}_sysu@synth_sysu-1-baseline-{seed}" for seed in range(3) for family in batch.FAMILIES]
    assert ends == Counter(names)
    assert starts - ends == Counter([f"train_sysu@synth_sysu-1-baseline-{victim}"])
    assert re.search(rf"resumed synth_sysu/baseline-t1-s{victim} after epoch \d+ of {EPOCHS}", text_of(project, victim))

    # Bit for bit the models and scores of runs that were made one after the other, without Ray and pipeline.
    study = load_study(project / "params.yaml")
    for seed in range(3):
        config = study.run("synth_sysu", "baseline", 1, seed)
        folder, _ = train_alone(project, config, tmp_path)
        places = {"packed": project / "data/packed", "weights": project / "data/weights"}
        evaluate(config, folder, **places, results=tmp_path / "results", device="cpu")
        made = project / "runs/synth_sysu" / config.name
        assert (made / "model.safetensors").read_bytes() == folder.model.read_bytes()
        scores = f"results/synth_sysu/metrics/{config.name}.json"
        assert (project / scores).read_bytes() == (tmp_path / scores).read_bytes()

    assert "all 3 runs are up to date" in output.read_text()
    assert (project / "table").exists() and stale(project) == []


@pytest.mark.parametrize("missing", [None, "train_sysu@synth_sysu-1-baseline-2"])
def test_tables_are_made_of_the_runs_unless_one_that_is_listed_is_missing(
    tmp_path: Path, missing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(batch, "stale", lambda _: ["report", "tables_sysu@synth_sysu", *([missing] if missing else [])])
    monkeypatch.setattr(batch, "dvc", lambda _, *words: asked.append(words) or 0)
    batch.make_the_rest(tmp_path)
    assert asked == ([] if missing else [("repro",)])
    assert ("lists others, 1 of their stages" in capsys.readouterr().out) == bool(missing)
    monkeypatch.setattr(batch, "dvc", lambda *_: 255)
    if not missing:
        with pytest.raises(StudyError, match="`dvc repro` of the tables ended with 255"):
            batch.make_the_rest(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="Ray's clusters are tested on POSIX")
def test_a_killed_batch_on_this_machine_leaves_nothing_training(
    project: Path, tmp_path: Path, ended: contextlib.ExitStack
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make extras")
    edit(project, lambda params: params["datasets"]["synth_sysu"]["recipe"].update(epochs=4000))
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has 107 characters at most
    ended.callback(shutil.rmtree, folder, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(project), "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "tools.batch", "--seeds", "0", "--cpus-per-run", "1"]
    (project / "build/batch/synth_sysu/baseline-t1-s0.log").unlink(missing_ok=True)
    output, deadline, process = tmp_path / "output", time.monotonic() + LONG, None
    while not re.search("^epoch ", text_of(project, 0), re.MULTILINE):
        if process is None or process.poll() is not None:
            # A node has 30 s to start, too few on a machine at its limit.
            assert process is None or "timed out during startup" in output.read_text(), output.read_text()
            with output.open("w") as stream:
                process = subprocess.Popen(command, cwd=project, env=environment, stdout=stream, stderr=stream)
            ended.callback(process.kill)
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    assert process is not None
    below = psutil.Process(process.pid).children(recursive=True)
    runs = [each for each in below if re.search("tools.notebook|kernel.py|ray::work", " ".join(each.cmdline()))]
    assert len(runs) >= 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(runs, timeout=60)[1] == []  # Ray's idle agents may take minutes to notice
