"""The precision of a recipe: what it changes in a run, what it leaves alone, and which devices have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from danet_core import train as train_module
from danet_core.backbone import ResNet
from danet_core.files import StudyError
from danet_core.model import DANet
from danet_core.precision import autocast, loss_scaler, require_precision
from danet_core.record import RunFolder
from danet_core.repro import deterministic
from danet_core.store import PackedStore
from danet_core.train import LossesOf, TrainingImages, build_model, build_optimiser, train, training_step
from tests.stores import make_store, small_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    make_store(root / "data/packed/synth_sysu", "sysu")
    (root / "data/weights").mkdir()
    torch.manual_seed(3)
    save_file(ResNet("resnet18", 8).state_dict(), root / "data/weights/synth_sysu.safetensors")
    return root


def run(project, config, out, log=lambda line: None, device="cpu"):
    folder = RunFolder.of(config, out / "runs", out / "build")
    record = train(
        config, folder, packed=project / "data/packed", weights=project / "data/weights", device=device, log=log
    )
    return load_file(folder.model), record


def interrupted(project, config, out, after: int) -> None:
    def stop(line: str) -> None:
        if line.startswith(f"epoch   {after}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(project, config, out, stop)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_start_at_nearly_the_loss_of_float32_and_learn_and_the_record_says_so(
    project, tmp_path, precision
):
    recipe = {"epochs": 12, "milestones": (8,), "lr": 0.002, "steps_per_epoch": 10}
    first, exact = (
        run(project, small_config(variant="b_ml_cc", epochs=1, milestones=(), steps_per_epoch=1, precision=name), tmp)
        for name, tmp in ((precision, tmp_path / "sixteen"), ("float32", tmp_path / "thirty-two"))
    )
    found, expected = first[1]["history"][0]["total"], exact[1]["history"][0]["total"]
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected
    tensors, record = run(project, small_config(precision=precision, **recipe), tmp_path)
    assert record["history"][-1]["L_id"] < 0.4 < record["history"][0]["L_id"]
    assert record["config"]["dataset"]["recipe"]["precision"] == precision
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}


def test_only_float16_scales_its_loss(project, tmp_path):
    for precision, scaled in (("float32", False), ("bfloat16", False), ("float16", True)):
        _, record = run(project, small_config(precision=precision, epochs=2, milestones=()), tmp_path / precision)
        assert [("loss_scale" in row) for row in record["history"]] == [scaled, scaled]


def test_a_float16_run_that_was_stopped_ends_with_the_weights_and_scales_of_an_uninterrupted_one(project, tmp_path):
    config = small_config(precision="float16", epochs=4)
    whole, record = run(project, config, tmp_path / "whole")
    interrupted(project, config, tmp_path / "stopped", after=2)
    resumed, again = run(project, config, tmp_path / "stopped")
    scales = [row["loss_scale"] for row in record["history"]]
    assert scales == [row["loss_scale"] for row in again["history"]] and len(set(scales)) > 1
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_float16_step_whose_gradient_overflows_changes_no_weight_and_halves_the_scale(project):
    config = small_config(precision="float16")
    torch.manual_seed(0)
    model = build_model(config.dataset, 6, None)
    optimiser = build_optimiser(model, config.dataset.recipe)
    images = TrainingImages(PackedStore.open(project / "data/packed/synth_sysu"), ("train",), 1, CPU)
    batch = next(images.batches(np.arange(36).reshape(1, 36)))
    before = [parameter.clone() for parameter in model.parameters()]
    scaler = loss_scaler("float16", CPU, 100, last_scale=2.0**120)
    training_step(LossesOf(model, config), optimiser, scaler, batch, config, torch.Generator().manual_seed(0))
    assert scaler.get_scale() == 2.0**119
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_under_autocast_the_convolutions_are_narrow_and_all_behind_the_pooling_is_float32():
    model = DANet(5, "resnet18", width=8)
    seen = {}
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(maps=output.dtype))
    with autocast("bfloat16", CPU):
        output = model(torch.rand(4, 3, 32, 16))
    assert seen["maps"] == torch.bfloat16
    assert {part.dtype for part in output if part is not None} == {torch.float32}


def test_tf32_is_refused_where_there_is_none_before_anything_is_written(project, tmp_path):
    with pytest.raises(StudyError, match=r"precision tf32 on device cpu: expected a CUDA GPU of compute capability 8"):
        run(project, small_config(precision="tf32"), tmp_path)
    assert not list(tmp_path.iterdir())
    for precision in ("float32", "bfloat16", "float16"):
        require_precision(precision, CPU)


def test_float32_rounds_nothing_to_tf32_and_the_callers_settings_come_back():
    def settings() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = settings()
    with deterministic(0):
        assert settings() == (False, False)
        with deterministic(0, tf32=True):
            assert settings() == (True, True)
        assert settings() == (False, False)
    assert settings() == before


def test_memory_is_not_filled_before_it_is_written_and_the_callers_setting_comes_back():
    def filled() -> bool:
        return bool(torch.empty(64).isnan().all())  # what torch fills with

    torch.use_deterministic_algorithms(True)
    try:
        torch.empty(64).zero_()
        with deterministic(0):
            torch.empty(64).zero_()  # the memory that the next one gets
            assert not filled()
        assert filled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_batch_that_does_not_fit_the_device_names_the_parameter_to_lower(project, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_module, "loss_terms", full)
    with pytest.raises(StudyError, match="4 identities x 4 images in float32; lower `ids_per_batch`.* to bfloat16"):
        run(project, small_config(), tmp_path)
    with pytest.raises(StudyError, match="in bfloat16; lower `ids_per_batch` of the recipe in params.yaml$"):
        run(project, small_config(precision="bfloat16"), tmp_path)


def test_the_memory_format_is_the_recipes_and_changes_rounding_only(project, tmp_path):
    for channels_last in (True, False):
        config = small_config(channels_last=channels_last)
        weight = build_model(config.dataset, 4, None).backbone.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    first, record = run(project, small_config(), tmp_path / "last")
    other, again = run(project, small_config(channels_last=False), tmp_path / "first")
    assert record["history"][0]["total"] == pytest.approx(again["history"][0]["total"], rel=1e-3)
    assert first.keys() == other.keys()


@pytest.mark.parametrize("wanted", [False, True])
def test_the_network_is_compiled_when_the_recipe_says_so_and_its_tensors_keep_their_names(
    project, tmp_path, monkeypatch, wanted
):
    calls = []
    monkeypatch.setattr(DANet, "compile", lambda self: calls.append(self))
    tensors, _ = run(project, small_config(compile=wanted), tmp_path)
    assert len(calls) == wanted
    assert "classifier.weight" in tensors


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_training_step_on_a_gpu_never_waits_for_it(project, precision):
    config = small_config(variant="b_ml_cc", precision=precision)
    device = torch.device("cuda")
    with deterministic(0):
        model = build_model(config.dataset, 6, None).to(device).train()
        optimiser = build_optimiser(model, config.dataset.recipe)
        scaler = loss_scaler(precision, device, 100, None)
        chance = torch.Generator(device).manual_seed(0)
        images = TrainingImages(PackedStore.open(project / "data/packed/synth_sysu"), ("train",), 1, device)
        batches = images.batches(np.tile(np.arange(36), (4, 1)))
        training_step(
            LossesOf(model, config), optimiser, scaler, next(batches), config, chance
        )  # makes what is made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                training_step(LossesOf(model, config), optimiser, scaler, batch, config, chance)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_gpu_gets_the_same_batches_from_its_own_memory_as_through_pinned_buffers(project, monkeypatch, share):
    monkeypatch.setattr(train_module, "_RESIDENT_SHARE", share)
    store = PackedStore.open(project / "data/packed/synth_sysu")
    positions = np.random.default_rng(0).integers(0, 100, (7, 12))
    there = TrainingImages(store, ("train",), 1, torch.device("cuda"))
    here = TrainingImages(store, ("train",), 1, CPU)
    for one, other in zip(there.batches(positions), here.batches(positions), strict=True):
        for field in one._fields:
            assert torch.equal(getattr(one, field).cpu(), getattr(other, field))
