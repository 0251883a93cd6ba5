"""What a GPU does, without one: training and evaluation on tensors that have a device and a shape, but no values.

Operands on two devices, and a value that is read, which makes a GPU wait, are errors there.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from danet_study import data, evaluate
from danet_study import train as train_module
from danet_study.checkpoint import build_model
from danet_study.config import RunConfig, load_study
from danet_study.data import PKSampler, TrainingImages
from danet_study.determinism import deterministic
from danet_study.store import PackedStore
from danet_study.train import build_optimizer, train_step
from tests.stores import PARAMS, make_store, shrunk, small_run
from tools import gpu

CUDA = torch.device("cuda", 0)
STUDY = load_study(PARAMS)
RUNS = [STUDY.run("sysu-1", row, 0) for row in STUDY.rows]
KINDS = {  # that differ in more than numbers
    re.sub(r"[\d.]+", "0", f"{run.losses} {run.model} {run.recipe.augment}"): run.variant for run in reversed(RUNS)
}
CASES = [
    *((variant, "float32") for variant in KINDS.values()),
    *((variant, precision) for variant in ("b_ml_cc", "two_stream") for precision in ("tf32", "bfloat16", "float16")),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PackedStore:
    return PackedStore.open(make_store(tmp_path_factory.mktemp("packed") / "synth_sysu"))


def backward(total: torch.Tensor, **options: object) -> None:
    """`Tensor.backward` by hand: the real one asks the driver for a stream."""
    waiting = {total.grad_fn: [torch.ones_like(total)]}
    with torch.no_grad():
        while waiting:  # the node that was made last first; leaves last
            node = max(waiting, key=lambda node: -1 if hasattr(node, "variable") else node._sequence_nr())
            gradients = waiting.pop(node)
            if hasattr(node, "variable"):
                node.variable.grad = gradients[0]
                continue
            results = node(*gradients)
            results = results if isinstance(results, tuple) else (results,)
            for (target, position), result in zip(node.next_functions, results, strict=True):
                if target is not None and result is not None:
                    expected, slots = target._input_metadata[position], waiting.setdefault(target, [])
                    slots += [None] * (len(target._input_metadata) - len(slots))
                    assert result.device == expected.device, f"{node}: gradient on {result.device}"
                    result = result.sum_to_size(expected.shape).to(expected.dtype)
                    slots[position] = result if slots[position] is None else slots[position] + result


def zeros(tensor: torch.Tensor) -> np.ndarray:
    """`Tensor.numpy`, of a tensor without values."""
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Replace what asks the driver, or needs a value outside training and evaluation."""
    monkeypatch.setattr(data, "_statistics", data._statistics.__wrapped__)  # keep fake tensors out of the cache
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "numpy", zeros)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(evaluate, "resolve_device", lambda *arguments: CUDA)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *arguments, **options: self)


def fake_model(config: RunConfig, mode: FakeTensorMode) -> torch.nn.Module:
    with torch.device("meta"):
        model = build_model(config.resolved(), 6, None).train()
    for tensors in (tensors for module in model.modules() for tensors in (module._parameters, module._buffers)):
        for name, tensor in tensors.items():
            if tensor is not None:
                fake = FakeTensor(mode, tensor.detach(), CUDA)
                leaf = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if leaf else fake
    return model


def fake_steps(config: RunConfig, store: PackedStore) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the store is real
    model = fake_model(config, mode)
    with mode:
        images = TrainingImages(store, ["train"], 1, CUDA)
        batches = images.batches(PKSampler(images.pids, images.modalities, 4, 2).epoch(2, np.random.default_rng(0)))
        optimizer = build_optimizer(model, config.recipe)
        scaler = torch.amp.GradScaler("cuda", enabled=config.recipe.precision == "float16")
        return model, [train_step(model, optimizer, scaler, batch, config, torch.Generator()) for batch in batches]


@pytest.mark.parametrize(("variant", "precision"), CASES)
def test_training_and_evaluation_stay_on_the_gpu_and_never_wait_for_it(fake_gpu, store, variant, precision):
    config = shrunk(STUDY.run("sysu-1", variant, 0), precision=precision)
    model, steps = fake_steps(config, store)
    assert all(step.keys() == {*config.losses, "total"} for step in steps)
    assert all(term.device == CUDA for step in steps for term in step.values())
    trained = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert "backbone.conv1.weight" in trained and all(gradient.device == CUDA for gradient in trained.values())
    rows, mode = store.rows("test"), model.neck.weight.fake_mode
    with mode:
        found = evaluate.extract(model, store, rows, config.recipe)
    assert found.feat.shape == found.feat_bn.shape == (len(rows), 64)


def test_images_that_do_not_fit_the_gpu_are_copied_batch_by_batch(fake_gpu, store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    _, steps = fake_steps(small_run(), store)
    assert steps[1]["total"].device == CUDA


@pytest.mark.parametrize(
    "mistake",
    [
        lambda output: output.logits.sum() * output.feat.sum().item(),
        lambda output: output.feat[output.feat[:, 0] > 0].sum(),  # as many rows as a value says
        lambda output: (output.feat * torch.ones(16, 64)).sum(),
    ],
)
def test_a_value_that_is_read_and_a_tensor_on_another_device_are_noticed(fake_gpu, store, monkeypatch, mistake):
    monkeypatch.setattr(train_module, "weighted_sum", lambda output, *arguments: {"total": mistake(output)})
    with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero|device"):
        fake_steps(small_run(), store)


def test_gradients_by_hand_are_those_of_the_engine():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True), torch.nn.Flatten()
    network, images = torch.nn.Sequential(*layers, torch.nn.Linear(144, 2)), torch.randn(5, 3, 8, 8)
    found = []
    for differentiate in (torch.Tensor.backward, backward):
        network.zero_grad()
        first, second = network(images).unbind(1)
        differentiate((first * second.exp() + first).square().sum())
        found.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*found)


# `make test-gpu`


def test_the_table_has_a_line_for_each_precision_and_format_and_finds_equal_bits(monkeypatch):
    monkeypatch.setattr(gpu, "PRECISIONS", ("float32", "tf32"))
    lines = gpu.report(small_run(), torch.device("cpu"), repeats=1)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:] for line in line.split("\n")]
    assert len(cells) == 2 + 2 * 2 and {len(line) for line in cells} == {8}
    for precision, form, again, resumed, *_, rate in cells[2:]:
        assert form in ("channels_last", "contiguous")
        if precision != "tf32":  # refused on a CPU
            assert again == resumed == gpu.SAME and float(rate) > 0


def test_other_bits_are_reported(store, monkeypatch):
    monkeypatch.setattr(gpu, "trained", lambda config, store, device, checkpoint: [checkpoint.name])
    assert gpu.exactness(small_run(), store, torch.device("cpu"))[:2] == [gpu.DIFFERENT, gpu.DIFFERENT]


def test_without_a_gpu_the_command_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["b_ml_cc", "two_stream"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_no_step_on_a_gpu_waits_for_it(store, variant, precision):
    config = small_run(variant, precision=precision)
    with deterministic(0):
        images = TrainingImages(store, ["train"], 1, CUDA)
        model = build_model(config.resolved(), images.n_classes, None).to(CUDA).train()
        optimizer, scaler = build_optimizer(model, config.recipe), torch.amp.GradScaler(enabled=precision == "float16")
        generator = torch.Generator(CUDA).manual_seed(0)
        order = PKSampler(images.pids, images.modalities, 4, 2).epoch(4, np.random.default_rng(0))
        batches = images.batches(order)
        train_step(model, optimizer, scaler, next(batches), config, generator)  # makes what is made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                train_step(model, optimizer, scaler, batch, config, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
