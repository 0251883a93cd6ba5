"""Each open choice of the paper trains, scores, resumes and is another model than the default."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import retrieval
from safetensors.torch import load_file, save_file

from danet_core import protocols, search, slow
from danet_core.backbone import ResNet
from danet_core.config import RunConfig
from danet_core.evaluate import Features, evaluate, extract
from danet_core.files import StudyError
from danet_core.model import DANet
from danet_core.parameters import Variant
from danet_core.record import RunFolder
from danet_core.store import PackedStore
from danet_core.train import Batch, build_model, loss_terms, train
from tests.stores import make_store, small_config

TRAINED = [
    "variant.cc.equation=1",
    "variant.cc.equation=2",
    "variant.cc.negatives=center",
    "variant.cc.features=after_bn",
    "variant.cc.features=normalised",
    "variant.cc.center_gradient=False",
    "variant.ml.gradient=own",
    "variant.ml.gradient=foreign",
    "variant.ml.direction=own_foreign",
    "variant.ml.foreign_average=0.9",
    "variant.ml.lambda_2=0.0",
    "variant.ml.sid_trains=classifiers",
    "variant.ml.mutual_trains=backbone",
    "variant.streams=two",
    "variant.streams=zero_padding",
    "dataset.recipe.pooling=max",
    "dataset.recipe.pooling=gem",
    "dataset.recipe.augment.pad_crop=2",
]
VALUES: dict[str, Any] = {"False": False, "1": 1, "2": 2, "0.9": 0.9, "0.0": 0.0}


def reading(config: RunConfig, choice: str) -> RunConfig:
    """The run with one choice, `dotted.key=value`, taken otherwise."""
    path, _, value = choice.partition("=")
    return changed(config, path.split("."), VALUES.get(value, value))


def changed(row: Any, keys: list[str], value: Any) -> Any:
    key, *rest = keys
    return dataclasses.replace(row, **{key: changed(getattr(row, key), rest, value) if rest else value})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_store(root / "data/packed/synth_sysu", "sysu")
    weights = root / "data/weights/synth_sysu.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(3)
    save_file(ResNet("resnet18", 8).state_dict(), weights)
    return root


def run(project: Path, config: RunConfig, out: Path, log: Any = lambda line: None) -> tuple[RunFolder, dict[str, Any]]:
    folder = RunFolder.of(config, out / "runs", out / "build")
    places = {"packed": project / "data/packed", "weights": project / "data/weights"}
    return folder, train(config, folder, **places, device="cpu", log=log)


def score(project: Path, config: RunConfig, folder: RunFolder, out: Path) -> dict[str, Any]:
    places = {"packed": project / "data/packed", "weights": project / "data/weights", "results": out / "results"}
    return evaluate(config, folder, **places, device="cpu")


def tiny() -> RunConfig:
    """Two epochs with everything on, and a margin at which the hinges of so small a network are not all at 0."""
    return changed(small_config(variant="b_ml_cc", epochs=2, milestones=(1,)), ["variant", "cc", "margin"], 20.0)


@pytest.fixture(scope="module")
def default(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    out = tmp_path_factory.mktemp("default")
    folder, _ = run(project, tiny(), out)
    return load_file(folder.model), score(project, tiny(), folder, out)


@pytest.mark.parametrize("choice", TRAINED)
def test_a_run_with_another_reading_ends_finite_differs_from_the_default_and_can_be_scored(
    project, tmp_path, default, choice
):
    config = reading(tiny(), choice)
    folder, record = run(project, config, tmp_path)
    tensors, standard = load_file(folder.model), default[0]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(not torch.equal(tensors[name], standard[name]) for name in tensors.keys() & standard.keys())
    shown = {name for name, value in record["history"][-1].items() if name.startswith("L_") and value is not None}
    assert shown == {"L_id", "L_cc", "L_sid"} | (set() if choice == "variant.ml.lambda_2=0.0" else {"L_M"})
    scored = score(project, config, folder, tmp_path)
    assert scored["config"] == config.resolved() != default[1]["config"]
    assert scored["provenance"]["fingerprint"] != default[1]["provenance"]["fingerprint"]
    assert 0 <= scored["settings"]["all_single"]["mean"]["mAP"] <= 1


@pytest.mark.parametrize("sid_trains", ["all", "classifiers"])
@pytest.mark.parametrize("mutual_trains", ["all", "backbone"])
def test_the_gradients_of_l_sid_and_l_m_reach_what_the_choice_says_and_nothing_else(sid_trains, mutual_trains):
    config = small_config(variant="b_ml")
    chosen = dataclasses.replace(config.variant.ml, sid_trains=sid_trains, mutual_trains=mutual_trains)
    variant = dataclasses.replace(config.variant, ml=chosen)
    images, modalities = torch.rand(8, 3, 32, 16), torch.tensor([0, 1] * 4)
    batch = Batch(images, torch.arange(8) // 2, modalities)

    def model(variant: Variant) -> DANet:
        torch.manual_seed(2)
        return build_model(config.dataset, 4, None, variant)

    def gradients(loss: torch.Tensor, network: DANet) -> list[torch.Tensor]:
        """Of C_v, of C_r, and of the last weight below them."""
        below = network.classifier_visible.weight, network.classifier_infrared.weight, network.neck.weight
        return list(torch.autograd.grad(loss, below, retain_graph=True, materialize_grads=True))

    network, printed = model(variant), model(config.variant)
    terms, whole = loss_terms(network(images, modalities), batch, variant), printed(images, modalities)
    logits = whole.logits_visible.double(), whole.logits_infrared.double()
    loops = {"L_sid": slow.eq4(*logits, batch.labels, modalities), "L_M": slow.eq5(*logits, modalities)}
    reached = {"L_sid": (True, True, sid_trains == "all"), "L_M": (*[mutual_trains == "all"] * 2, True)}
    for name, parts in reached.items():
        assert terms[name].item() == pytest.approx(loops[name].item(), abs=1e-6)
        everything = gradients(loops[name], printed)
        assert all(part.abs().max() > 1e-6 for part in everything)
        for found, expected, reaches in zip(gradients(terms[name], network), everything, parts, strict=True):
            torch.testing.assert_close(found, expected if reaches else torch.zeros_like(found), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("choice", ["variant.ml.foreign_average=0.9", "variant.streams=two"])
def test_a_resumed_run_with_more_state_ends_with_the_weights_of_an_uninterrupted_one(project, tmp_path, choice):
    config = reading(small_config(variant="b_ml", epochs=3), choice)
    whole, _ = run(project, config, tmp_path / "whole")

    def interrupt(line: str) -> None:
        if line.startswith("epoch   2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(project, config, tmp_path / "cut", interrupt)
    resumed, _ = run(project, config, tmp_path / "cut")
    assert resumed.model.read_bytes() == whole.model.read_bytes()
    tensors = load_file(whole.model)
    if "average" in choice:
        assert not torch.equal(tensors["averages.0.weight"], tensors["classifier_visible.weight"])


def test_without_the_kl_nothing_of_it_is_computed(project, tmp_path, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise AssertionError("Eq. 5 was computed")

    monkeypatch.setattr("danet_core.train.mutual_learning_loss", refuse)
    _, record = run(project, reading(tiny(), "variant.ml.lambda_2=0.0"), tmp_path)
    row = record["history"][-1]
    assert row["L_M"] is None
    assert row["total"] == pytest.approx(row["L_id"] + row["L_cc"] + row["L_sid"], rel=1e-5)


def test_one_stream_is_the_baseline_bit_for_bit(project, tmp_path):
    tensors = []
    for variant in ("baseline", "one_stream"):
        folder, _ = run(project, small_config(variant=variant), tmp_path)
        tensors.append(load_file(folder.model))
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys()


def test_features_of_a_two_stream_model_do_not_depend_on_the_images_beside_them(project):
    config = small_config(variant="two_stream")
    torch.manual_seed(0)
    model = build_model(config.dataset, 6, None, config.variant)
    store = PackedStore.open(project / "data/packed/synth_sysu")
    rows = store.rows("test")
    together = extract(model, store, rows, config, "cpu")
    for index in (0, len(rows) - 1):
        alone = extract(model, store, rows[[index]], config, "cpu")
        np.testing.assert_allclose(alone.feat[0], together.feat[index], rtol=1e-4, atol=1e-5)


def test_euclidean_distance_ranks_by_the_features_as_they_are_and_marks_the_record(project, tmp_path, default):
    plain = tiny()
    folder, _ = run(project, plain, tmp_path)
    config = reading(plain, "evaluation.metric=euclidean")
    record = score(project, config, folder, tmp_path)
    assert all(setting["metric"] == "euclidean" for setting in record["settings"].values())
    assert record["queries"]["metric"] == "euclidean"
    for key in ("figure1", "probe", "training", "config"):
        assert record[key] == default[1][key]
    assert not any("metric" in setting for setting in default[1]["settings"].values())
    assert "metric" not in default[1]["queries"]
    assert record["settings"]["all_single"]["mean"] != default[1]["settings"]["all_single"]["mean"]

    features = Features.load(folder.features)
    galleries = PackedStore.open(project / "data/packed/synth_sysu").galleries["all_single"]
    query = np.flatnonzero(features.modalities == 1)
    cameras = features.camids
    for trial, scored in enumerate(record["settings"]["all_single"]["per_trial"]):
        gallery = np.searchsorted(features.rows, np.sort(galleries[trial]))
        rows = [[math.dist(features.feat_bn[q], features.feat_bn[g]) for g in gallery] for q in query]
        expected = retrieval(
            rows,
            features.pids[query].tolist(),
            features.pids[gallery].tolist(),
            lambda q, g, gallery=gallery: cameras[query[q]] == 3 and cameras[gallery[g]] == 2,
        )
        assert scored["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
        assert scored["cmc1"] == pytest.approx(expected["cmc"][0], abs=1e-9)
    shown = record["queries"]["best"][0]
    row = int(np.flatnonzero(features.rows == shown["row"])[0])
    nearest = [int(np.flatnonzero(features.rows == one)[0]) for one in shown["ranked"]["rows"]]
    expected = [math.dist(features.feat_bn[row], features.feat_bn[one]) for one in nearest]
    assert shown["ranked"]["distances"] == pytest.approx(expected, abs=1e-5)


def test_camera_pairs_are_ranked_by_the_distance_that_is_asked_for():
    # One visible image in the query's direction but far off, another nearby in another direction.
    query, gallery = np.array([[1.0, 0.0]]), np.array([[9.0, 0.0], [1.0, 0.5]])
    arguments = query, np.array([1]), np.array([3]), gallery, np.array([1, 2]), np.array([1, 1])
    assert [pair["cmc1"] for pair in protocols.camera_pairs(*arguments)] == [1.0]
    assert [pair["cmc1"] for pair in protocols.camera_pairs(*arguments, distance="euclidean")] == [0.0]


@pytest.mark.parametrize("variant", ["two_stream", "zero_padding"])
def test_search_refuses_a_network_that_asks_for_the_modality_of_a_crop(project, tmp_path, variant):
    folder, _ = run(project, small_config(variant=variant), tmp_path)
    crop = tmp_path / "gallery/1.png"
    crop.parent.mkdir()
    crop.write_bytes(b"")
    other = tmp_path / "query.png"
    other.write_bytes(b"")
    streams = {"two_stream": "two"}.get(variant, variant)
    with pytest.raises(StudyError, match=f"expected a network with one stream, found streams {streams}, which needs"):
        search.search(other, crop.parent, folder.root, device="cpu")
    config, model, _ = search.load_run(folder.root)
    assert config.variant.streams == model.backbone.streams == streams
