"""A run that is killed, cut short of disk or told to stop ends, when called again, as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core import record
from danet_core.config import RunConfig, load_study
from danet_core.evaluate import Features, evaluate
from danet_core.files import StudyError, atomic_write_json, atomic_write_text, read_json
from danet_core.parameters import Checkpoints
from danet_core.record import RunFolder, load_checkpoint, made_with, save_checkpoint
from danet_core.scores import load_results
from tests.fixtures.faults import FORKS, packed_project, run, save_and_die, small_disk, start, state_of
from tests.stores import small_config

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and mounts are POSIX")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def two_seconds(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunFolder, float]:
    """A run that takes a second or two, its result without interruption, and how long a process of its own takes."""
    config = small_config(variant="b_ml_cc", epochs=12, milestones=(8,))
    out = tmp_path_factory.mktemp("whole")
    folder, _ = run(project, config, out)
    seconds = 0.0
    for _ in range(2):  # the first also starts the server of forks
        started = time.monotonic()
        child = start(project, config, tmp_path_factory.mktemp("timed"))
        child.join()
        assert child.exitcode == 0
        seconds = time.monotonic() - started
    return config, folder, seconds


def wait_for(path: Path, child: Any) -> None:
    while not path.exists():
        assert child.exitcode is None
        time.sleep(0.005)


def timeless(folder: RunFolder) -> Any:
    """A run's record without what differs between two equal runs: durations."""
    found = json.loads(folder.record.read_text())
    rows = [{key: row[key] for key in row if key not in ("seconds", "images_per_s")} for row in found["history"]]
    return {**found, "history": rows, "seconds": None}


def scores(project: Path, config: RunConfig, folder: RunFolder, out: Path) -> bytes:
    evaluate(
        config, folder, packed=project / "data/packed", weights=project / "data/weights", results=out, device="cpu"
    )
    return (out / config.dataset.name / "metrics" / f"{config.name}.json").read_bytes()


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("kills", [5, pytest.param(40, marks=pytest.mark.faults)])
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_uninterrupted_one(
    project: Path, two_seconds: tuple[RunConfig, RunFolder, float], tmp_path: Path, kills: int
) -> None:
    config, whole, seconds = two_seconds
    seed = random.SystemRandom().randrange(2**32)
    moments, killed, ended = random.Random(seed), 0, 0
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    while killed < kills or not folder.record.exists():
        if folder.record.exists():  # it was faster than the killer: once more from the start
            shutil.rmtree(folder.root)
        child = start(project, config, tmp_path)
        child.join(moments.uniform(0, seconds) if killed < kills else None)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            ended += 1
            assert folder.model.read_bytes() == whole.model.read_bytes(), f"seed {seed}"
            assert timeless(folder) == timeless(whole), f"seed {seed}"
    lines = (tmp_path / "log").read_text().splitlines()
    print(f"{kills} kills, {ended} ends, {sum(line.startswith('resumed') for line in lines)} resumptions, seed {seed}")
    assert scores(project, config, folder, tmp_path / "a") == scores(project, config, whole, tmp_path / "b")
    assert [path.name for path in folder.checkpoint.parent.iterdir() if path.suffix == ".pt"] == []


def test_whenever_a_checkpoint_is_interrupted_a_whole_one_is_there(tmp_path: Path) -> None:
    found = []
    for moment in range(1, 100):
        root = tmp_path / str(moment)
        folder = RunFolder(root, root / "run.pt")
        for epoch in (1, 2):
            save_checkpoint(folder, state_of(epoch))
        child = FORKS.Process(target=save_and_die, args=(root, moment))
        child.start()
        child.join()
        state = load_checkpoint(folder, {"code": "a"}, CPU, pytest.fail)
        found.append(len(state["history"]))
        assert state["model"]["w"].unique().tolist() == [found[-1]]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert set(found) == {2, 3} and found == sorted(found)
    assert len(found) >= 7  # touch, write, fsync, two renames, fsync of the folder, unlink


def test_a_run_killed_between_its_record_and_the_removal_of_its_checkpoints_ends_the_same_again(
    project: Path, two_seconds: tuple[RunConfig, RunFolder, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, _ = two_seconds
    with monkeypatch.context() as patch:
        patch.setattr("danet_core.train.remove_checkpoints", lambda folder: None)
        folder, _ = run(project, config, tmp_path)
    assert folder.checkpoint.exists()
    lines: list[str] = []
    run(project, config, tmp_path, lines.append)
    assert lines == ["resumed synth_sysu/b_ml_cc-t1-s0 after epoch 12 of 12"]
    assert folder.model.read_bytes() == whole.model.read_bytes()
    assert not folder.checkpoint.exists() and not folder.previous.exists()


# ---------------------------------------------------------------- damaged and foreign checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, bytes]:
    """A run's folder with checkpoints of epochs 1 and 2, and the bytes of the second."""
    root = tmp_path_factory.mktemp("checkpoints")
    folder = RunFolder(root, root / "run.pt")
    for epoch in (1, 2):
        save_checkpoint(folder, state_of(epoch))
    return folder, folder.checkpoint.read_bytes()


@given(st.data())
@settings(max_examples=60)
def test_a_checkpoint_cut_at_any_length_is_named_and_the_one_before_it_used(
    two_checkpoints: tuple[RunFolder, bytes], data: st.DataObject
) -> None:
    folder, content = two_checkpoints
    folder.checkpoint.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    said: list[str] = []
    state = load_checkpoint(folder, {"code": "a"}, CPU, said.append)
    assert len(state["history"]) == 1
    assert len(said) == 1 and "run.pt is damaged (" in said[0]
    assert said[0].endswith("going on from the one before it, run.previous.pt")


@given(st.data())
@settings(max_examples=100)
def test_a_checkpoint_with_any_bit_turned_is_noticed_or_holds_the_same(
    two_checkpoints: tuple[RunFolder, bytes], data: st.DataObject
) -> None:
    """The gaps that torch leaves between the tensors, to align them, have no check sum and no meaning."""
    folder, content = two_checkpoints
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder.checkpoint.write_bytes(changed)
    said: list[str] = []
    state = load_checkpoint(folder, {"code": "a"}, CPU, said.append)
    assert len(state["history"]) == (1 if said else 2)
    assert torch.equal(state["model"]["w"], torch.full((5000,), 1 if said else 2))


class _Mischief:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("mischief"),)


@pytest.mark.parametrize("kind", ["a file of weights", "a pickle with a command in it", "text"])
def test_a_file_that_is_no_checkpoint_is_named_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path, tmp_path / "run.pt")
    if kind == "a file of weights":
        torch.save({"w": torch.zeros(3)}, folder.checkpoint)
    elif kind == "text":
        folder.checkpoint.write_text("<html>404</html>")
    else:
        torch.save(_Mischief(), folder.checkpoint)
        pickle.dumps(_Mischief())
    with pytest.raises(
        StudyError, match=r"run\.pt is damaged \(.*\); remove .*run\.pt to train from the start"
    ) as caught:
        load_checkpoint(folder, {"code": "a"}, CPU, print)
    assert "\n" not in str(caught.value)
    assert not Path("mischief").exists()


def test_where_both_checkpoints_are_damaged_both_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, tmp_path / "run.pt")
    for path in (folder.checkpoint, folder.previous):
        path.write_bytes(b"PK")
    with pytest.raises(StudyError, match=r"run\.pt is damaged .* and .*run\.previous\.pt is damaged"):
        load_checkpoint(folder, {"code": "a"}, CPU, print)


def test_a_loss_edited_while_its_run_was_interrupted_is_named_and_nothing_is_trained(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(project, config, tmp_path, interrupt)
    with monkeypatch.context() as patch:
        patch.setitem(record.SOURCES, "losses.py", "0" * 64)
        with pytest.raises(
            StudyError, match=r"was made with another code\.losses\.py, and .* undo the change, or remove"
        ):
            run(project, config, tmp_path)
    lines: list[str] = []
    run(project, config, tmp_path, lines.append)
    assert lines[0] == "resumed synth_sysu/baseline-t1-s0 after epoch 1 of 3"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "configuration.dataset.recipe.lr"),
        ({"epochs": 4}, "configuration.dataset.recipe.epochs"),
        ({"width": 16}, "configuration.dataset.recipe.width"),
    ],
)
def test_a_changed_parameter_never_goes_on_from_the_old_ones_weights(tmp_path: Path, change: dict, named: str) -> None:
    folder = RunFolder(tmp_path, tmp_path / "run.pt")
    save_checkpoint(folder, {**state_of(1), "made_with": made_with(small_config(), "a", "b")})
    with pytest.raises(StudyError, match=f"another {named.replace('.', '[.]')},"):
        load_checkpoint(folder, made_with(small_config(**change), "a", "b"), CPU, print)


def test_a_checkpoints_code_is_the_modules_that_the_train_stage_lists() -> None:
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train_sysu"]["deps"]
    modules = {Path(path).name for path in listed if path.startswith("danet_core/")}
    assert set(record.SOURCES) == modules


def test_checkpoints_are_written_every_so_many_epochs_and_after_the_last(project: Path, tmp_path: Path) -> None:
    plain = small_config(epochs=5)
    config = dataclasses.replace(plain, checkpoints=Checkpoints(every_epochs=2, share_of_time=1))
    assert config.resolved() == plain.resolved()
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    kept: list[int] = []

    def look(line: str) -> None:
        state = torch.load(folder.checkpoint, weights_only=True) if folder.checkpoint.exists() else {"history": []}
        kept.append(len(state["history"]))

    run(project, config, tmp_path, look)
    assert kept == [0, 2, 2, 4, 5]


def test_saving_takes_no_more_than_its_share_of_the_time() -> None:
    rarely = Checkpoints(every_epochs=1, share_of_time=0.02)
    assert rarely.due(1, 0.0, 0.0)  # nothing saved yet, so nothing is known of what it takes
    assert not rarely.due(2, 1.0, 48.9)
    assert rarely.due(2, 1.0, 49.1)  # 1 s of 50.1
    assert not Checkpoints(every_epochs=2, share_of_time=0.02).due(3, 1.0, 49.1)
    assert Checkpoints(every_epochs=1, share_of_time=1).due(2, 1.0, 0.0)


def test_a_run_whose_saving_takes_long_saves_its_first_and_last_epochs_and_few_between(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(folder: RunFolder, state: dict[str, Any]) -> None:
        save_checkpoint(folder, state)
        saved.append(len(state["history"]))
        time.sleep(2)

    saved: list[int] = []
    monkeypatch.setattr("danet_core.train.save_checkpoint", slowly)
    config = dataclasses.replace(small_config(epochs=5), checkpoints=Checkpoints(every_epochs=1, share_of_time=0.02))
    run(project, config, tmp_path)
    assert saved == [1, 5]


# ---------------------------------------------------------------- SIGTERM


def test_a_run_told_to_stop_ends_after_the_epoch_with_its_checkpoint_and_a_sentence(
    project: Path, two_seconds: tuple[RunConfig, RunFolder, float], tmp_path: Path
) -> None:
    config, whole, _ = two_seconds
    rarely = dataclasses.replace(config, checkpoints=Checkpoints(every_epochs=100, share_of_time=1))
    child = start(project, rarely, tmp_path, pause=0.2)
    wait_for(tmp_path / "log", child)
    for _ in range(2):  # from the scheduler, and from the notebook's runner, which got it too
        os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 1
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    said = (tmp_path / "log").read_text().splitlines()[-1]
    done = len(torch.load(folder.checkpoint, weights_only=True)["history"])
    assert said.startswith(f"stopped by SIGTERM after epoch {done} of 12, whose checkpoint is whole; the same command")
    lines: list[str] = []
    run(project, config, tmp_path, lines.append)
    assert lines[0] == f"resumed synth_sysu/b_ml_cc-t1-s0 after epoch {done} of 12"
    assert folder.model.read_bytes() == whole.model.read_bytes()


def test_sigterm_that_comes_again_later_ends_the_run_at_once(project: Path, tmp_path: Path) -> None:
    child = start(project, small_config(epochs=100), tmp_path, pause=30)
    wait_for(tmp_path / "log", child)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(record.SAME_NOTICE + 0.2)
    assert child.exitcode is None
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == -signal.SIGTERM


# ---------------------------------------------------------------- full disks


def test_a_checkpoint_that_finds_the_disk_full_is_a_sentence_and_the_one_before_it_is_gone_on_from(
    project: Path, two_seconds: tuple[RunConfig, RunFolder, float], tmp_path: Path
) -> None:
    config, whole, _ = two_seconds
    out = tmp_path / "out"
    size = checkpoint_size(config)
    with small_disk(
        out / "build", str(2 * size + size // 2)
    ) as resize:  # two of them fit, a third beside them does not
        with pytest.raises(
            StudyError, match=r"b_ml_cc-t1-s0\.pt cannot be written \(No space left on device\); make room"
        ):
            run(project, config, out)
        folder = RunFolder.of(config, out / "runs", out / "build")
        assert not folder.record.exists()
        assert sorted(path.suffix for path in folder.checkpoint.parent.iterdir()) == [".lock", ".pt", ".pt"]
        resize(str(8 * size))
        lines: list[str] = []
        run(project, config, out, lines.append)
        assert lines[0] == "resumed synth_sysu/b_ml_cc-t1-s0 after epoch 2 of 12"
        assert folder.model.read_bytes() == whole.model.read_bytes()


def checkpoint_size(config: RunConfig) -> int:
    """Bytes of the run's checkpoint, rounded up to whole pages: three float32 numbers for each parameter."""
    from danet_core.train import build_model

    numbers = sum(tensor.numel() for tensor in build_model(config.dataset, 6, None).state_dict().values())
    return int(3 * 4 * numbers * 1.1)


def test_a_model_that_finds_the_disk_full_leaves_no_record_and_the_run_goes_on_later(
    project: Path, two_seconds: tuple[RunConfig, RunFolder, float], tmp_path: Path
) -> None:
    config, whole, _ = two_seconds
    with small_disk(tmp_path / "runs", "64k") as resize:
        with pytest.raises(StudyError, match=r"model\.safetensors cannot be written \(No space left on device\)"):
            run(project, config, tmp_path)
        folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
        assert list(folder.root.iterdir()) == []
        resize("64m")
        lines: list[str] = []
        run(project, config, tmp_path, lines.append)
        assert lines == ["resumed synth_sysu/b_ml_cc-t1-s0 after epoch 12 of 12"]
        assert folder.model.read_bytes() == whole.model.read_bytes()


def test_a_table_a_record_and_features_that_find_the_disk_full_leave_what_stood_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "results", "64k"):
        folder = tmp_path / "results"
        atomic_write_text(folder / "table3.md", "| 12.3 |\n")
        atomic_write_json(folder / "run.json", {"rank1": 0.123})
        many = np.arange(100_000)
        for write in (
            lambda: atomic_write_text(folder / "table3.md", "| 45.6 |\n" * 100_000),
            lambda: atomic_write_json(folder / "run.json", many.tolist()),
            lambda: Features(many, many[:, None] * 1.0, many[:, None] * 1.0, many, many, many).save(folder / "f.npz"),
        ):
            with pytest.raises(StudyError, match=r"No space left on device\); make room on its disk"):
                write()
        assert sorted(path.name for path in folder.iterdir()) == ["run.json", "table3.md"]
        assert (folder / "table3.md").read_text() == "| 12.3 |\n"
        assert read_json(folder / "run.json") == {"rank1": 0.123}


def test_a_record_that_a_kill_left_half_written_is_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "results/synth_sysu/metrics"
    folder.mkdir(parents=True)
    (folder / ".baseline-t1-s0.partial.json").write_text('{"dataset": "synth')
    assert not load_results(load_study(ROOT / "params.yaml"), "synth_sysu", tmp_path).records


# ---------------------------------------------------------------- nothing is ever unpickled


def test_no_code_of_the_study_unpickles_a_file() -> None:
    for folder in ("danet_core", "data_prep", "tools"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "pickle.load" not in text and "allow_pickle=True" not in text and "read_pickle" not in text, path
            loads = text.count("torch.load(")
            assert loads == text.count("weights_only=True"), path


def test_the_checkpoint_interval_stands_in_params() -> None:
    listed = yaml.safe_load((ROOT / "params.yaml").read_text())["checkpoints"]
    assert dataclasses.asdict(load_study(ROOT / "params.yaml").checkpoints) == listed
