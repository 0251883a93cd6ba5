"""The batch of the readings study: the pipeline's own commands, several at a time, each run once, and its notebook."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fixtures.notebooks import run_notebook
from fixtures.pipeline import copy_project, edit, shell
from safetensors.torch import save_file

from danet_core.backbone import ResNet
from danet_core.config import load_study
from danet_core.files import StudyError, sha256_file
from tests.stores import make_store
from tools import readings as batch
from tools import readme

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "readings_train@rho_half-0"
ROW = {"group": "Margin", "variant": "b_ml_cc", "choice": "rho", "reading": "half"}


def small(params: dict[str, Any]) -> None:
    """Two rows to train, one that shares the runs of the first, one seed."""
    params["recipes"]["embedded"].update(
        width=8, ids_per_batch=4, imgs_per_modality=2, epochs=2, steps_per_epoch=2, milestones=[1]
    )
    params["datasets"]["synth_sysu"]["recipe"] = params["recipes"]["embedded"]
    params["datasets"]["synth_sysu"]["image"].update(height=32, width=16)
    rows = {
        "danet": {**ROW, "group": "Variants", "against": None, "set": {}},
        "rho_half": {**ROW, "against": "danet", "set": {"variant.cc.margin": 0.35}},
        "before_bn": {**ROW, "against": "danet", "set": {"dataset.recipe.test_feature": "before_bn"}},
    }
    params["readings"].update(seeds=[0], rows=rows)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_project(tmp_path_factory.mktemp("readings") / "danet")
    (root / "docs").mkdir()
    (root / "docs/READINGS.md").write_text("Prose.\n<!-- results:begin -->\n<!-- results:end -->\nEnd.\n")
    edit(root, small)
    make_store(root / "data/packed/synth_sysu", "sysu")
    weights = root / "data/weights/synth_sysu.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(3)
    save_file(ResNet("resnet18", 8).state_dict(), weights)
    return root


def call(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return shell(project, sys.executable, "-m", *arguments, check=check)


@contextlib.contextmanager
def training(
    project: Path, log: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A command in the epochs of a long training, which it tells in `log`, and everything that works for it."""
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(project)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (
        (project / "dvc.log").open("wb") as output,
        subprocess.Popen([sys.executable, "-m", *arguments], cwd=project, env=environment, stdout=output) as running,
    ):
        while not (log.exists() and len(re.findall("^epoch", log.read_text(), re.MULTILINE)) > 2):
            assert running.poll() is None
            time.sleep(0.05)
        below = psutil.Process(running.pid).children(recursive=True)
        assert below
        yield running, below


def test_where_nothing_was_run_the_notebook_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(ROOT / "params.yaml")
    with pytest.raises(
        StudyError, match="no row of `readings` in params.yaml has been run on synth_sysu; run `make re"
    ):
        run_notebook("07_readings.ipynb", tmp_path, study, monkeypatch)


def test_one_call_makes_runs_table_plot_and_page_and_leaves_nothing_to_do(project: Path) -> None:
    done = call(project, "tools.readings", "--jobs", "2")
    assert "synth_sysu: 2 runs, 0 of them done, 2 at a time" in done.stdout
    assert "2 of 2 " in done.stdout
    folder = project / "results/synth_sysu/readings"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("table.csv", "table.md", "forest.png", "forest.pdf", "record.json"),
        *("metrics/danet-s0/danet.json", "metrics/danet-s0/before_bn.json", "metrics/rho_half-s0/rho_half.json"),
    }
    assert (project / "docs/READINGS.md").read_text().startswith("Prose.\n<!-- results:begin -->\nsynth_sysu (rendered")
    assert not list((project / "results/synth_sysu").glob("metrics/*"))
    models = {path.parent.name for path in (project / "runs").rglob("model.safetensors")}
    assert models == {"danet-s0", "rho_half-s0"}

    study = load_study(project / "params.yaml")
    store = json.loads((project / "data/packed/synth_sysu/meta.json").read_text())
    hashes = store["content_sha256"], sha256_file(project / "data/weights/synth_sysu.safetensors")
    for name in study.readings.rows:
        config = study.reading(name, 0)
        assert batch.is_scored(config, project)
        assert batch.is_trained(config.trained or config, *hashes, project)
    read = study.reading("rho_half", 0)
    assert not batch.is_trained(read, "other data", hashes[1], project)
    shorter = dataclasses.replace(read.dataset.recipe, lr=0.5)
    other = dataclasses.replace(read, dataset=dataclasses.replace(read.dataset, recipe=shorter))
    assert not batch.is_trained(other, *hashes, project)
    assert not batch.is_scored(other, project)


def test_a_failed_run_is_named_with_its_log_and_leaves_the_others(project: Path) -> None:
    edit(project, lambda params: params["readings"]["rows"]["rho_half"]["set"].update({"dataset.recipe.lr": 1e30}))
    done = call(project, "tools.readings", check=False)
    edit(project, lambda params: params["readings"]["rows"]["rho_half"]["set"].pop("dataset.recipe.lr"))
    assert done.returncode == 1
    assert "tools.readings: 1 of 1 runs failed: rho_half-s0; their logs are in build/readings" in done.stderr
    last = (project / "build/readings/rho_half-s0.log").read_text().splitlines()[-1]
    assert last.startswith("tools.reading_train: ") and "expected" in last
    assert f"rho_half-s0: status 1, {last}\n" in done.stderr


def test_the_pipeline_has_no_stage_of_the_study_until_rows_are_listed(project: Path) -> None:
    listing = ("dvc", "stage", "list", "--all", "--name-only")
    assert "readings" not in shell(project, *listing).stdout
    edit(project, lambda params: params["readings"].update(run=["danet", "rho_half"], table=["synth_sysu"]))
    names = [name for name in shell(project, *listing).stdout.split() if name.startswith("readings")]
    assert sorted(names) == [
        "readings@synth_sysu",
        *(f"readings_score@{row}-0" for row in ("danet", "rho_half")),
        *(f"readings_train@{row}-0" for row in ("danet", "rho_half")),
    ]
    # The batch resolves the same commands as DVC does.
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(project)) as repo:
        resolved = {stage.name: stage.cmd for stage in repo.index.stages if isinstance(stage, PipelineStage)}
    for stage, item in (
        ("readings_train", {"row": "danet", "seed": 0}),
        ("readings_score", {"row": "danet", "seed": 0}),
        ("readings", {"dataset": "synth_sysu"}),
    ):
        theirs = resolved[f"{stage}@{'-'.join(map(str, item.values()))}"]
        theirs = [theirs] if isinstance(theirs, str) else theirs
        ours = batch.commands(project, stage, item, "synth_sysu")
        assert [" ".join(["python", *words[1:]]) for words in ours] == [" ".join(one.split()) for one in theirs]


def test_rows_come_with_what_they_are_compared_with_and_train_once() -> None:
    study = load_study(ROOT / "params.yaml")
    assert batch.rows_of(study, "rho_half") == ["b_ml_cc", "rho_half"]
    assert batch.rows_of(study, "test_before_bn") == ["b_ml_cc"]
    assert batch.rows_of(study, "sid_alone_baseline") == ["baseline", "sid_alone"]
    everything = batch.rows_of(study, "all")
    assert everything == [name for name in study.readings.rows if study.trained_row(name) == name]
    with pytest.raises(StudyError, match="unknown reading 'rho_third'"):
        batch.rows_of(study, "rho_half,rho_third")


def test_a_stopped_batch_ends_its_processes_and_starts_no_other(tmp_path: Path) -> None:
    running = batch.Batch(tmp_path)
    mark = tmp_path / "started"
    waits = [sys.executable, "-c", f"import time; open({str(mark)!r}, 'w').close(); time.sleep(600)"]
    never = [sys.executable, "-c", f"open({str(tmp_path / 'second')!r}, 'w').close()"]
    ended: list[str | None] = []
    thread = threading.Thread(target=lambda: ended.append(running.call([waits, never], tmp_path / "log")))
    thread.start()
    while not mark.exists():
        time.sleep(0.02)
    running.stop()
    thread.join(60)
    assert ended == [f"status {-signal.SIGTERM}, without a word"]
    assert running.call([never], tmp_path / "log") == "stopped"
    assert not (tmp_path / "second").exists()


def test_a_run_has_one_thread(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    assert batch.Batch(tmp_path).call([words], tmp_path / "log") is None
    assert (tmp_path / "log").read_text() == "1\n"


def test_an_earlier_attempts_last_line_is_never_taken_for_the_reason(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("tools.reading_train: the reason of yesterday\n")
    silent = [sys.executable, "-c", "raise SystemExit(3)"]
    assert batch.Batch(tmp_path).call([silent], tmp_path / "log") == "status 3, without a word"


def test_a_damaged_record_beside_a_model_is_an_error_that_names_it(project: Path) -> None:
    path = project / "runs/readings/synth_sysu/rho_half-s0/record.json"
    before = path.read_bytes()
    path.write_text("{}")
    done = call(project, "tools.readings", "--rows", "rho_half", check=False)
    path.write_bytes(before)
    assert done.returncode == 1
    assert re.fullmatch(r"tools\.readings: .*/record\.json has no entry provenance\.fingerprint, .*\n", done.stderr)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends what a killed process started")
def test_a_killed_batch_leaves_nothing_training_and_the_next_goes_on_and_ends_by_sigterm_with_a_checkpoint(
    project: Path,
) -> None:
    longer = {"dataset.recipe.epochs": 4000}
    edit(project, lambda params: params["readings"]["rows"]["rho_half"]["set"].update(longer))
    log = project / "build/readings/rho_half-s0.log"
    with training(project, log, "tools.readings", "--rows", "rho_half") as (running, below):
        running.kill()
        assert psutil.wait_procs(below, timeout=30)[1] == []
    with training(project, log, "tools.readings", "--rows", "rho_half") as (running, _):
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 128 + signal.SIGTERM
    assert re.match(r"resumed readings/synth_sysu/rho_half-s0 after epoch \d+ of 4000", log.read_text())
    assert "stopped by SIGTERM after epoch" in log.read_text().splitlines()[-1]
    assert (project / "build/checkpoints/readings/synth_sysu/rho_half-s0.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_killed_dvc_leaves_no_reading_training(project: Path) -> None:
    edit(project, lambda params: params["readings"].update(run=["danet", "rho_half"], table=["synth_sysu"]))
    with training(project, project / "dvc.log", "dvc", "repro", "--single-item", TRAIN) as (running, below):
        running.kill()
        assert psutil.wait_procs(below, timeout=30)[1] == []


def test_the_projects_page_shows_what_its_results_hold() -> None:
    page = (ROOT / "docs/READINGS.md").read_text(encoding="utf-8")
    block = readme.PAGES["docs/READINGS.md"](ROOT)
    assert readme.insert_block(page, block, "docs/READINGS.md") == page, "run `python -m tools.readme --readings`"
