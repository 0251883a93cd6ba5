"""An exported run gives PyTorch's features from raw pixels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from danet_study import export as module
from danet_study.checkpoint import build_model, load_run, save_run
from danet_study.export import export, main
from danet_study.files import StudyError
from tests.stores import SIDE, small_run

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="the packages of the extra `export` are not installed")
KINDS = {
    "one": {"test_feature": "after_bn"},
    "two": {"stem": "two", "pooling": "gem", "test_feature": "before_bn"},
}


def make_run(folder: Path, **options: str) -> Path:
    config = small_run().resolved()
    config["model"] |= options
    torch.manual_seed(0)
    model = build_model(config, 5, None)
    for module_ in model.modules():  # so that no batch norm is the identity
        if isinstance(module_, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module_.running_mean, -0.2, 0.2)
    save_run(folder, model, {"run": folder.name, "config": config, "history": [], "provenance": {}})
    return folder


def expected(run: Path, images: torch.Tensor, modalities: torch.Tensor) -> torch.Tensor:
    """The test feature, from pixels that are normalized by hand."""
    model, record = load_run(run)
    augment = record["config"]["recipe"]["augment"]
    mean, std = (torch.tensor(augment[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        feat, feat_bn = model.embed((images / 255 - mean) / std, modalities)
    return feat if record["config"]["model"]["test_feature"] == "before_bn" else feat_bn


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return images, torch.randint(2, (n,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_runs_test_feature_for_any_number_of_images(tmp_path, kind):
    run, path = make_run(tmp_path / "run", **KINDS[kind]), tmp_path / "model.pt2"
    assert main([str(run), "--program", str(path)]) == 0
    network = torch.export.load(path).module()
    for n in (1, 7):
        images, modalities = batch(n)
        found = network(images) if kind == "one" else network(images, modalities)
        torch.testing.assert_close(found, expected(run, images, modalities), rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_gives_the_runs_test_feature_for_any_number_of_images(tmp_path, kind):
    import onnxruntime

    run, path = make_run(tmp_path / "run", **KINDS[kind]), tmp_path / "model.onnx"
    assert export(run, onnx=path)[path] < 1e-5
    session = onnxruntime.InferenceSession(path.read_bytes())
    assert [node.name for node in session.get_inputs()] == ["images", "modalities"][: 1 + (kind != "one")]
    for n in (1, 7):
        images, modalities = batch(n)
        given = {"images": images.numpy()} | ({} if kind == "one" else {"modalities": modalities.numpy()})
        (found,) = session.run(["features"], given)
        np.testing.assert_allclose(found, expected(run, images, modalities), rtol=1e-4, atol=1e-5)


def test_features_that_differ_are_refused_and_no_file_is_left(tmp_path, monkeypatch):
    run, path = make_run(tmp_path / "run"), tmp_path / "model.pt2"
    write = module.write_program
    monkeypatch.setattr(module, "write_program", lambda traced, path, given: 1.001 * write(traced, path, given))
    with pytest.raises(StudyError):
        export(run, program=path)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_the_command_says_in_one_sentence_what_is_missing(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path / "absent"), "--program", str(tmp_path / "model.pt2")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StudyError, match="onnxruntime"):
        module.write_onnx(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), tmp_path / "model.onnx", ())
