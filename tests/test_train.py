"""Training is exact, resumable and loud."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from danet_core import train as train_module
from danet_core.backbone import ResNet
from danet_core.files import StudyError, exclusive
from danet_core.record import RunFolder, load_finished, made_with, save_checkpoint
from danet_core.search import describe
from danet_core.train import Batch, epoch_line, loss_terms, train
from tests.stores import make_store, small_config


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with one packed store in each layout and backbone weights for both."""
    root = tmp_path_factory.mktemp("project")
    for name, layout in (("synth_sysu", "sysu"), ("synth_regdb", "regdb")):
        make_store(root / "data/packed" / name, layout)
        weights = root / "data/weights" / f"{name}.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(3)
        save_file(ResNet("resnet18", 8).state_dict(), weights)
    return root


def run(project: Path, config, out: Path, log=lambda line: None):
    folder = RunFolder.of(config, out / "runs", out / "build")
    record = train(
        config, folder, packed=project / "data/packed", weights=project / "data/weights", device="cpu", log=log
    )
    return folder, record


@pytest.mark.parametrize("dataset", ["synth_sysu", "synth_regdb"])
def test_two_equal_runs_end_with_the_same_bytes(project, tmp_path, dataset):
    config = small_config(dataset, "b_ml_cc")
    first, _ = run(project, config, tmp_path / "a")
    second, _ = run(project, config, tmp_path / "b")
    assert first.model.read_bytes() == second.model.read_bytes()


def test_another_seed_gives_another_model(project, tmp_path):
    first, _ = run(project, small_config(seed=0), tmp_path / "a")
    second, _ = run(project, small_config(seed=1), tmp_path / "b")
    assert first.model.read_bytes() != second.model.read_bytes()


def test_a_run_stopped_after_any_epoch_ends_with_the_weights_of_an_uninterrupted_one(project, tmp_path):
    config = small_config(variant="b_ml_cc", epochs=4)
    whole, record = run(project, config, tmp_path / "whole")
    for stop in (1, 3):
        out = tmp_path / f"stop{stop}"

        def interrupt(line, stop=stop):
            if line.startswith(f"epoch   {stop}/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(project, config, out, interrupt)
        lines: list[str] = []
        resumed, again = run(project, config, out, lines.append)
        assert lines[0] == f"resumed synth_sysu/b_ml_cc-t1-s0 after epoch {stop} of 4"
        assert resumed.model.read_bytes() == whole.model.read_bytes()
        timeless = [
            [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in r["history"]]
            for r in (record, again)
        ]
        assert timeless[0] == timeless[1]


def _train_slowly(project: Path, config, out: Path) -> None:
    run(project, config, out, lambda line: time.sleep(0.3))


def test_a_run_killed_by_the_system_goes_on_and_leaves_nothing_half_written(project, tmp_path):
    config = small_config(epochs=4)
    whole, _ = run(project, config, tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(
        target=_train_slowly, args=(project, config, tmp_path / "killed")
    )
    process.start()
    folder = RunFolder.of(config, tmp_path / "killed/runs", tmp_path / "killed/build")
    deadline = time.monotonic() + 120
    while not folder.checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert folder.checkpoint.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not folder.model.exists()
    assert not folder.record.exists()
    lines: list[str] = []
    run(project, config, tmp_path / "killed", lines.append)
    assert lines[0].startswith("resumed")
    assert folder.model.read_bytes() == whole.model.read_bytes()


def test_a_finished_run_leaves_no_checkpoint_and_training_again_starts_from_the_first_epoch(project, tmp_path):
    config = small_config()
    folder, _ = run(project, config, tmp_path)
    assert not folder.checkpoint.exists()
    lines: list[str] = []
    run(project, config, tmp_path, lines.append)
    assert lines[0].startswith("epoch   1/3")


def test_a_checkpoint_of_another_configuration_is_refused_and_kept(project, tmp_path):
    config = small_config()
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    other = made_with(small_config(lr=0.5), "0" * 64, "0" * 64)
    save_checkpoint(folder, {"made_with": other, "model": {}, "optimiser": {}, "history": []})
    with pytest.raises(
        StudyError,
        match=r"made with another backbone weights, configuration\.dataset\.recipe\.lr, data,.* remove .*\.pt",
    ):
        run(project, config, tmp_path)
    assert folder.checkpoint.exists()


def test_a_damaged_checkpoint_is_named(project, tmp_path):
    config = small_config()
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    folder.checkpoint.parent.mkdir(parents=True)
    folder.checkpoint.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(StudyError, match=r"baseline-t1-s0\.pt is damaged"):
        run(project, config, tmp_path)


def test_the_same_run_is_never_trained_twice_at_once(project, tmp_path):
    config = small_config()
    folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
    with exclusive(folder.lock, "a run"), pytest.raises(StudyError, match="being made by another process"):
        run(project, config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_term_step_and_epoch(project, tmp_path, monkeypatch):
    real, calls = train_module.loss_terms, []

    def broken(output, batch, variant):
        calls.append(1)
        terms = real(output, batch, variant)
        return {**terms, "L_id": terms["L_id"] * float("nan")} if len(calls) == 4 else terms

    monkeypatch.setattr(train_module, "loss_terms", broken)
    config = small_config()
    with pytest.raises(StudyError, match="L_id is nan at step 2 of epoch 2"):
        run(project, config, tmp_path)
    assert not RunFolder.of(config, tmp_path / "runs", tmp_path / "build").model.exists()


def test_the_learning_rate_falls_at_the_milestones(project, tmp_path):
    _, record = run(project, small_config(lr=0.01, decay=0.1, epochs=4, milestones=(1, 3)), tmp_path)
    assert [round(row["lr"], 9) for row in record["history"]] == [0.01, 0.001, 0.001, 0.0001]


def batch_of(config) -> Batch:
    people, images = config.dataset.recipe.ids_per_batch, config.dataset.recipe.imgs_per_modality
    labels = torch.arange(people).repeat_interleave(2 * images)
    modalities = torch.tensor([0] * images + [1] * images).repeat(people)
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(len(labels), 3, 32, 16, generator=generator), labels, modalities)


@pytest.mark.parametrize(
    ("variant", "terms"),
    [
        ("baseline", {"L_id"}),
        ("b_cc", {"L_id", "L_cc"}),
        ("b_ml", {"L_id", "L_sid", "L_M"}),
        ("b_ml_cc", {"L_id", "L_cc", "L_sid", "L_M"}),
    ],
)
def test_a_variant_has_exactly_its_terms_and_their_weighted_sum(variant, terms):
    config = small_config(variant=variant)
    torch.manual_seed(0)
    model = train_module.build_model(config.dataset, 4, None)
    batch = batch_of(config)
    values = loss_terms(model(batch.images), batch, config.variant)
    assert set(values) == terms | {"total"}
    weights = {"L_id": 1.0, "L_cc": 1.0, "L_sid": 1.0, "L_M": 2.5}  # Eq. 6, and L_sid that it omits
    expected = sum(weights[name] * values[name] for name in terms)
    torch.testing.assert_close(values["total"], expected)


def test_each_loss_reaches_the_parameters_it_should_and_no_others():
    config = small_config(variant="b_ml_cc")
    torch.manual_seed(0)
    model = train_module.build_model(config.dataset, 4, None)
    batch = batch_of(config)
    heads = {"L_id": ["classifier"], "L_cc": [], "L_sid": ["classifier_visible", "classifier_infrared"]}
    heads["L_M"] = heads["L_sid"]
    for term, expected in heads.items():
        model.zero_grad()
        loss_terms(model(batch.images), batch, config.variant)[term].backward()
        reached = {
            name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        neck = set() if term == "L_cc" else {"neck"}  # CC acts before the BN neck
        assert reached == {"backbone", *neck, *expected}


def test_training_fits_a_handful_of_identities(project, tmp_path):
    _, record = run(project, small_config(epochs=12, steps_per_epoch=10, milestones=(8,), lr=0.002), tmp_path)
    assert record["history"][-1]["L_id"] < 0.25 < record["history"][0]["L_id"]


def test_training_reads_no_test_image(project, tmp_path, monkeypatch):
    seen: list[np.ndarray] = []
    real = train_module.TrainingImages.batches

    def spy(self, positions):
        seen.append(self.rows[positions].ravel())
        return real(self, positions)

    monkeypatch.setattr(train_module.TrainingImages, "batches", spy)
    run(project, small_config(), tmp_path)
    store = train_module.PackedStore.open(project / "data/packed/synth_sysu")
    assert not set(np.concatenate(seen)) & set(store.rows("test"))


def test_a_changed_model_file_is_noticed(project, tmp_path):
    config = small_config()
    folder, _ = run(project, config, tmp_path)
    tensors = load_file(folder.model)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder.model)
    with pytest.raises(StudyError, match="expected SHA-256"):
        load_finished(folder, config)


def test_a_run_of_another_configuration_is_refused_by_the_key_that_differs(project, tmp_path):
    config = small_config()
    folder, _ = run(project, config, tmp_path)
    other = dataclasses.replace(
        config, dataset=dataclasses.replace(config.dataset, recipe=dataclasses.replace(config.dataset.recipe, lr=0.5))
    )
    with pytest.raises(StudyError, match=r"differs in dataset\.recipe\.lr"):
        load_finished(folder, other)


def test_the_record_says_where_the_weights_come_from(project, tmp_path):
    folder, record = run(project, small_config(variant="b_cc"), tmp_path)
    stored = json.loads(folder.record.read_text())
    assert stored == record
    assert stored["config"]["variant"]["cc"] == {
        "lambda_1": 1.0,
        "margin": 0.7,
        "equation": 3,
        "negatives": "anchor",
        "features": "before_bn",
        "center_gradient": True,
    }
    assert {"data_sha256", "weights_sha256", "model_sha256", "fingerprint"} <= stored["provenance"].keys()
    assert {"python", "libraries", "device", "code", "train_code_sha256"} == stored["versions"].keys()
    assert stored["versions"]["device"].keys() == {"type", "name", "threads"}
    assert stored["command"] == "dvc repro train_sysu@synth_sysu-1-b_cc-0" and stored["seconds"] > 0
    for value in (stored["provenance"]["data_sha256"], stored["versions"]["train_code_sha256"], stored["command"]):
        assert value in describe(folder.record)
    assert stored["versions"]["libraries"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__


def test_an_epoch_is_one_line_with_its_terms_rate_speed_and_time_left():
    row = {"epoch": 3, "lr": 3.5e-4, "L_id": 1.25, "L_cc": None, "L_sid": None, "L_M": None, "total": 1.25}
    line = epoch_line({**row, "images_per_s": 1234.5, "seconds": 10.0}, 14)
    assert line == "epoch   3/14  L_id 1.250  total 1.250  lr 3.50e-04  1,234 images/s  1:50 left"
