"""Backbone weights are pretrained on identities of their own, or are exactly torchvision's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet50

from danet_core.config import load_study
from danet_core.files import StudyError, sha256_file
from danet_core.model import DANet
from danet_core.parameters import Image
from data_prep import weights

STUDY = load_study(Path(__file__).parent.parent / "params.yaml")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's download folder, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The embedded pretraining with its numbers lowered, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    render = dataclasses.replace(STUDY.pretraining.render, ids=4, images=3)
    pretraining = dataclasses.replace(STUDY.pretraining, render=render, batch_size=6, steps=3)
    recipe = dataclasses.replace(STUDY.datasets["synth_sysu"].recipe, width=8)
    return pretraining, Image(32, 16), recipe


def test_pretraining_twice_gives_the_same_bytes_and_data_sets_share_one(tiny, tmp_path, capsys):
    weights.rendered(*tiny, Path("a.safetensors"), device="cpu")
    assert capsys.readouterr().out.count("pretraining step") == 3
    weights.rendered(*tiny, Path("b.safetensors"), device="cpu")
    assert capsys.readouterr().out == ""
    first = Path("a.safetensors").read_bytes()
    assert Path("b.safetensors").read_bytes() == first
    for kept in Path("build/pretrained").glob("*.safetensors"):
        kept.unlink()
    weights.rendered(*tiny, Path("c.safetensors"), device="cpu")
    assert Path("c.safetensors").read_bytes() == first
    DANet(5, "resnet18", Path("a.safetensors"), width=8)


def test_a_changed_number_pretrains_anew(tiny):
    pretraining, image, recipe = tiny
    weights.rendered(pretraining, image, recipe, Path("a.safetensors"), device="cpu")
    weights.rendered(dataclasses.replace(pretraining, seed=1), image, recipe, Path("b.safetensors"), device="cpu")
    assert Path("a.safetensors").read_bytes() != Path("b.safetensors").read_bytes()


def test_a_pretraining_that_diverges_stops_and_leaves_no_file(tiny):
    pretraining, image, recipe = tiny
    with pytest.raises(StudyError, match="pretraining loss is nan at step"):
        weights.rendered(dataclasses.replace(pretraining, lr=1e30), image, recipe, Path("a.safetensors"), device="cpu")
    assert not Path("a.safetensors").exists()
    assert not list(Path("build/pretrained").glob("*.safetensors"))


def test_imagenet_weights_in_torchs_folder_are_checked_and_taken_without_the_classifier(hub, tmp_path, monkeypatch):
    hub.mkdir(parents=True)
    torch.manual_seed(0)
    state = resnet50().state_dict()
    torch.save(state, hub / weights.IMAGENET_FILE)
    monkeypatch.setattr(weights, "IMAGENET_SHA256", sha256_file(hub / weights.IMAGENET_FILE))
    out = tmp_path / "sysu.safetensors"
    weights.make_weights(STUDY.datasets["sysu"], STUDY.pretraining, out)
    model = DANet(395, weights=out)
    assert torch.equal(model.backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_imagenet_weights_with_another_hash_are_refused(hub, tmp_path):
    hub.mkdir(parents=True)
    (hub / weights.IMAGENET_FILE).write_bytes(b"not a network")
    with pytest.raises(StudyError, match=f"expected SHA-256 {weights.IMAGENET_SHA256}, found"):
        weights.make_weights(STUDY.datasets["sysu"], STUDY.pretraining, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_without_a_network_the_message_says_which_file_belongs_where(hub, tmp_path):
    with pytest.raises(StudyError) as caught:
        weights.make_weights(STUDY.datasets["sysu"], STUDY.pretraining, tmp_path / "out.safetensors")
    message = str(caught.value)
    assert f"put it at {hub / weights.IMAGENET_FILE}, its SHA-256 is {weights.IMAGENET_SHA256}" in message
    assert "\n" not in message
    assert list(hub.iterdir()) == []


def test_imagenet_weights_are_refused_for_another_network(tmp_path):
    recipe = dataclasses.replace(STUDY.datasets["sysu"].recipe, backbone="resnet18", width=24)
    with pytest.raises(StudyError, match="are those of resnet50 of width 64, found resnet18 of width 24"):
        weights.imagenet(tmp_path / "out.safetensors", recipe)


def test_the_pinned_hash_is_the_one_torchvision_puts_into_the_file_name():
    assert weights.IMAGENET_SHA256.startswith(Path(weights.IMAGENET_FILE).stem.split("-")[1])
