"""Training is exact, resumable and loud."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from danet_study import train as train_module
from danet_study.checkpoint import CHECKPOINTS, MODEL, RECORD, build_model, load_checkpoint, load_run, save_checkpoint
from danet_study.config import RunConfig
from danet_study.data import TrainingImages
from danet_study.determinism import derived_seed, deterministic, resolve_device, versions
from danet_study.files import StudyError, exclusive, read_json
from danet_study.store import PackedStore
from danet_study.train import epoch_line, train
from tests.stores import ROOT, make_project, small_run

CPU = torch.device("cpu")
silent = functools.partial(train, device="cpu", log=lambda line: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A working directory with the project's data."""
    (tmp_path / "data").symlink_to(project / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bytes_of(config: RunConfig, runs: str) -> bytes:
    return (Path(runs) / config.name / MODEL).read_bytes()


def timeless(record: dict) -> dict:
    """A record without durations."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in record["history"]]
    return {**record, "history": rows, "seconds": None}


def stop_after(epoch: int):
    def log(line: str) -> None:
        if line.split("/")[0].split() == ["epoch", str(epoch)]:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize("split", ["synth_sysu-1", "synth_regdb-1"])
def test_equal_runs_end_with_equal_bytes_and_another_seed_with_others(here, split):
    config = small_run("b_ml_cc", split)
    first, second = (silent(config, runs=runs) for runs in ("a", "b"))
    assert bytes_of(config, "a") == bytes_of(config, "b") and timeless(first) == timeless(second)
    other = small_run("b_ml_cc", split, seed=1)
    silent(other, runs="a")
    assert load_run(f"a/{other.name}")[0].state_dict().keys() == load_run(f"a/{config.name}")[0].state_dict().keys()
    assert bytes_of(other, "a") != bytes_of(config, "a")
    assert not list(CHECKPOINTS.glob("*.pt"))


def test_training_learns_a_handful_of_identities(here):
    record = silent(small_run("b_ml_cc", epochs=10, steps_per_epoch=10, milestones=[8], lr=0.002))
    first, last = record["history"][0], record["history"][-1]
    assert last["L_id"] < 0.3 < first["L_id"]
    assert last["total"] < first["total"] / 2


@pytest.mark.parametrize("variant", ["b_ml_cc", "teacher_ema"])
def test_a_run_stopped_after_any_epoch_ends_like_one_that_was_not(here, variant):
    config = small_run(variant, epochs=4)
    whole = silent(config, runs="whole")
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            silent(config, runs=f"stop{epoch}", log=stop_after(epoch))
        lines: list[str] = []
        resumed = silent(config, runs=f"stop{epoch}", log=lines.append)
        assert lines[0].startswith("resumed") and len(lines) == 1 + 4 - epoch
        assert bytes_of(config, f"stop{epoch}") == bytes_of(config, "whole")
        assert timeless(resumed) == timeless(whole)


CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.stores import small_run
from danet_study.train import train
config = small_run("b_ml_cc", epochs=8, steps_per_epoch=3)
train(config, device="cpu", runs="killed", log=lambda line: print(line, flush=True))
"""


def test_a_run_killed_with_sigkill_after_a_random_epoch_ends_with_the_same_model(here):
    config, epoch = small_run("b_ml_cc", epochs=8, steps_per_epoch=3), random.SystemRandom().randrange(1, 7)
    silent(config, runs="whole")
    command = [sys.executable, "-c", CHILD.format(root=str(ROOT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.split("/")[0].split() == ["epoch", str(epoch)]:
                child.send_signal(signal.SIGKILL)
                break
    assert child.wait() == -signal.SIGKILL
    assert not (Path("killed") / config.name / RECORD).exists()
    lines: list[str] = []
    silent(config, runs="killed", log=lines.append)
    assert lines[0].startswith("resumed")
    assert bytes_of(config, "killed") == bytes_of(config, "whole"), f"killed after epoch {epoch}"


class Mischief:
    """A pickle that would run a command."""

    def __reduce__(self):
        return Path.touch, (Path("mischief"),)


@pytest.mark.parametrize("damage", ["truncated", "changed byte", "no checkpoint", "pickle", "weights only"])
def test_a_damaged_checkpoint_is_refused_and_kept(here, damage):
    config = small_run()
    with pytest.raises(KeyboardInterrupt):
        silent(config, log=stop_after(1))
    path = CHECKPOINTS / f"{config.name}.pt"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed byte":
        weight = torch.load(path, weights_only=True)["model"]["neck.weight"].numpy().tobytes()
        path.write_bytes(content.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    elif damage == "weights only":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        torch.save(Mischief(), path) if damage == "pickle" else path.write_bytes(b"no checkpoint")
    kept = path.read_bytes()
    with pytest.raises(StudyError, match=config.name):
        silent(config)
    assert path.read_bytes() == kept and not (Path("runs") / config.name).exists() and not Path("mischief").exists()


@pytest.mark.parametrize("difference", ["config", "data", "weights", "code"])
def test_a_foreign_checkpoint_is_refused_by_what_differs(here, project, difference, monkeypatch):
    config = small_run()
    with pytest.raises(KeyboardInterrupt):
        silent(config, log=stop_after(1))
    if difference == "config":
        config = small_run(lr=0.5)
    elif difference == "code":
        monkeypatch.setattr(train_module, "code_sha256", lambda: "0" * 64)
    else:
        Path("data").unlink()
        make_project(here, ("synth_sysu",), identities=6 + (difference == "data"))
        if difference == "weights":
            path = Path("data/weights/synth_sysu.safetensors")
            save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(StudyError, match={"config": "lr"}.get(difference, difference)):
        silent(config)
    assert (CHECKPOINTS / f"{config.name}.pt").exists()


def test_a_checkpoint_is_whole_or_absent_and_equal_fingerprints_are_accepted(tmp_path):
    path = tmp_path / "a.pt"
    assert load_checkpoint(path, {}, CPU) is None
    save_checkpoint(path, {"fingerprint": {"a": {"b": 1}}, "history": [1]})
    assert load_checkpoint(path, {"a": {"b": 1}}, CPU)["history"] == [1]
    for other in ({"a": {"b": 2}}, {"a": {}}, {"a": {"b": 1}, "c": 1}, {}):
        with pytest.raises(StudyError):
            load_checkpoint(path, other, CPU)


def test_a_second_trainer_of_the_same_run_is_refused(here):
    config = small_run()
    with exclusive(CHECKPOINTS / f"{config.name}.lock", "it"), pytest.raises(StudyError, match=config.name):
        silent(config)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(here, monkeypatch):
    real, calls = train_module.weighted_sum, []

    def broken(*arguments):
        calls.append(1)
        terms = real(*arguments)
        return {**terms, "L_cc": terms["L_cc"] * float("nan")} if len(calls) == 4 else terms

    monkeypatch.setattr(train_module, "weighted_sum", broken)
    config = small_run()
    with pytest.raises(StudyError, match=r"L_cc is nan at step 2, epoch 2"):
        silent(config)
    assert not (Path("runs") / config.name).exists()


def test_weights_that_are_not_finite_after_the_last_step_are_never_saved(here, monkeypatch):
    def poison(model):
        with torch.no_grad():
            model.backbone.bn1.running_mean[0] = torch.inf

    monkeypatch.setattr(train_module.DANet, "update_teachers", poison)
    with pytest.raises(StudyError):
        silent(small_run(epochs=1))
    assert not Path("runs").exists()


def test_missing_data_or_weights_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="synth_sysu"):
        silent(small_run())
    make_project(tmp_path, ("synth_sysu",))
    Path("data/weights/synth_sysu.safetensors").unlink()
    with pytest.raises(StudyError, match=r"synth_sysu\.safetensors"):
        silent(small_run())


def test_a_batch_that_does_not_fit_the_device_names_the_parameter_to_lower(here, monkeypatch):
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_module, "weighted_sum", full)
    with pytest.raises(StudyError, match="ids_per_batch"):
        silent(small_run())


def test_the_learning_rate_falls_at_the_milestones_and_the_record_says_what_was_done(here):
    config = small_run("b_cc", lr=0.01, epochs=4, milestones=[1, 3])
    record = silent(config)
    assert [round(row["lr"], 9) for row in record["history"]] == [0.01, 0.001, 0.001, 0.0001]
    assert record == read_json(Path("runs") / config.name / RECORD)
    assert record["config"] == json.loads(json.dumps(config.resolved()))
    assert record["history"][0].keys() == {"epoch", "lr", "L_id", "L_cc", "total", "images_per_s", "seconds"}
    assert record["provenance"].keys() == {"data_sha256", "weights_sha256", "fingerprint", "model_sha256"}
    assert record["versions"].keys() >= {"python", "libraries", "device", "commit", "training_code_sha256"}
    assert (record["run"], record["trial"], record["variant"]) == ("synth_sysu-1-b_cc-0", 1, "b_cc")


def test_training_reads_images_of_its_splits_only_and_others_in_each_epoch(here, monkeypatch):
    seen = []
    real = TrainingImages.batches

    def spy(self, positions):
        seen.append(self.rows[positions])
        return real(self, positions)

    monkeypatch.setattr(TrainingImages, "batches", spy)
    silent(small_run())
    assert len({rows.tobytes() for rows in seen}) == 3
    assert set(np.concatenate(seen).ravel()) <= set(PackedStore.open("data/packed/synth_sysu").rows("train"))


def test_a_finished_run_is_loaded_in_evaluation_mode_and_only_as_what_it_is(here):
    config = small_run("teacher_ema")
    silent(config)
    folder = Path("runs") / config.name
    model, record = load_run(folder, config)
    assert not any(module.training for module in model.modules()) and record["run"] == config.name
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(folder / MODEL).items())
    with deterministic(derived_seed(0, "initial weights")):
        first = build_model(config.resolved(), 6, None)
    assert not torch.equal(first.teachers[0].weight, model.teachers[0].weight)  # they were updated
    with pytest.raises(StudyError, match="lr"):
        load_run(folder, small_run("teacher_ema", lr=0.5))
    with pytest.raises(StudyError):
        load_run("runs/absent")
    whole = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StudyError, match=MODEL):
        load_run(folder)
    shutil.rmtree(CHECKPOINTS)
    silent(config)  # trained again from the start, over the damaged one
    assert (folder / MODEL).read_bytes() == whole


def test_an_epoch_is_one_line():
    row = {"epoch": 3, "lr": 3.5e-4, "L_id": 1.25, "total": 1.25, "images_per_s": 1234.5, "seconds": 10.0}
    line = epoch_line(row, 14)
    assert "3/14" in line and "L_id 1.250" in line and "1:50" in line and "\n" not in line


# Precision and devices


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_start_at_nearly_the_loss_of_float32_and_learn_in_float32_weights(here, precision):
    first = {"epochs": 1, "milestones": [], "steps_per_epoch": 1}
    exact, narrow = (silent(small_run(**first, precision=name))["history"][0] for name in ("float32", precision))
    assert narrow["total"] == pytest.approx(exact["total"], rel=0.02) and narrow["total"] != exact["total"]
    numbers = {"epochs": 6, "milestones": [5], "lr": 0.002, "steps_per_epoch": 6}
    narrow = silent(small_run(**numbers, precision=precision))
    assert narrow["history"][-1]["total"] < narrow["history"][0]["total"] / 2
    tensors = load_file(f"runs/{narrow['run']}/{MODEL}")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_float16_run_that_was_stopped_keeps_the_scale_of_its_loss(here):
    config = small_run(precision="float16", epochs=4)
    silent(config, runs="whole")
    with pytest.raises(KeyboardInterrupt):
        silent(config, runs="stopped", log=stop_after(2))
    silent(config, runs="stopped")
    assert bytes_of(config, "stopped") == bytes_of(config, "whole")


def test_the_memory_format_changes_rounding_only(here):
    losses_of = {}
    for channels_last in (True, False):
        config = small_run(channels_last=channels_last)
        weight = build_model(config.resolved(), 4, None).backbone.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
        losses_of[channels_last] = silent(config)["history"][0]["total"]
    assert losses_of[True] == pytest.approx(losses_of[False], rel=1e-3)


def test_deterministic_restores_the_callers_settings_and_seeds_only_inside():
    def settings() -> tuple:
        backends = (
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.benchmark,
        )
        return *backends, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    before, state = settings(), torch.get_rng_state()
    for tf32 in (False, True):
        with pytest.raises(RuntimeError), deterministic(3, tf32=tf32):
            assert settings() == (tf32, tf32, False, 1, True)
            first = torch.rand(3)
            raise RuntimeError
        with deterministic(3):
            assert torch.equal(torch.rand(3), first)
    assert settings() == before and torch.equal(torch.get_rng_state(), state)
    seeds = {derived_seed(seed, word, epoch) for seed in range(3) for word in ("a", "b") for epoch in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_device_or_precision_that_is_absent_is_refused():
    assert resolve_device("cpu", "bfloat16") == resolve_device("cpu", "float16") == CPU
    assert versions(CPU)["device"]["type"] == "cpu"
    with pytest.raises(StudyError):
        resolve_device("cpu", "tf32")
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:1"):
            with pytest.raises(StudyError):
                resolve_device(name)
    for name in ("gpu", "cuda:x", "mps", "meta"):
        with pytest.raises(StudyError):
            resolve_device(name)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_resumed_bit_for_bit(here):
    config = small_run(epochs=4)
    train(config, device="cuda", runs="whole", log=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train(config, device="cuda", runs="stopped", log=stop_after(2))
    train(config, device="cuda", runs="stopped", log=lambda line: None)
    assert bytes_of(config, "stopped") == bytes_of(config, "whole")
