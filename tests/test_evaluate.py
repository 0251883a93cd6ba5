"""A run's metrics record is right, complete and the same each time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from danet_core import evaluate as evaluate_module
from danet_core.backbone import ResNet
from danet_core.evaluate import Features, evaluate, extract
from danet_core.files import StudyError
from danet_core.record import RunFolder
from danet_core.store import PackedStore
from danet_core.train import build_model, train
from tests.stores import make_store, small_config

SETTINGS = {
    "synth_sysu": {"all_single", "all_multi", "indoor_single", "indoor_multi"},
    "synth_regdb": {"thermal_to_visible", "visible_to_thermal"},
}


@pytest.fixture(scope="module", params=["synth_sysu", "synth_regdb"])
def finished(request, tmp_path_factory):
    """One trained run in a folder of its own."""
    root = tmp_path_factory.mktemp(request.param)
    config = small_config(request.param, "b_ml_cc")
    make_store(root / "data/packed" / request.param, config.dataset.layout)
    weights = root / "data/weights" / f"{request.param}.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(3)
    save_file(ResNet("resnet18", 8).state_dict(), weights)
    folder = RunFolder.of(config, root / "runs", root / "build")
    train(config, folder, packed=root / "data/packed", weights=weights.parent, device="cpu", log=lambda line: None)
    return root, config, folder


def run(finished):
    root, config, folder = finished
    return evaluate(config, folder, packed=root / "data/packed", results=root / "results", device="cpu")


def test_the_record_holds_every_setting_of_the_layout_and_the_final_losses(finished):
    record = run(finished)
    assert set(record["settings"]) == SETTINGS[record["dataset"]]
    for setting in record["settings"].values():
        assert set(setting["mean"]) == {"cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP"}
        assert len(setting["cmc"]) == 50
        assert 0 < setting["chance_rank1"] < 1
    assert all(record["training"]["final"][term] is not None for term in ("L_id", "L_cc", "L_sid", "L_M", "total"))
    assert record["synthetic"] is True
    assert record["training"]["steps"] == 6


def test_evaluating_twice_gives_the_same_bytes_and_no_clock_or_folder_in_them(finished):
    root, config, folder = finished
    path = root / "results" / config.dataset.name / "metrics" / f"{config.name}.json"
    run(finished)
    first, features = path.read_bytes(), folder.features.read_bytes()
    run(finished)
    assert path.read_bytes() == first
    assert folder.features.read_bytes() == features
    assert str(root) not in first.decode()
    assert not {"seconds", "images_per_s", "time"} & set(json.loads(first))


def test_the_stored_features_are_those_of_the_test_images_in_store_order(finished):
    root, config, folder = finished
    run(finished)
    features = Features.load(folder.features)
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    np.testing.assert_array_equal(features.rows, store.rows("test"))
    np.testing.assert_array_equal(features.pids, store.pids[features.rows])
    assert features.feat.shape == features.feat_bn.shape == (len(features.rows), 64)


def test_an_ideal_model_scores_one_everywhere_and_leaves_no_modality_gap(finished, monkeypatch):
    def ideal(model, store, rows, config, device):
        feat = np.eye(store.pids.max() + 1, dtype=np.float32)[store.pids[rows]]
        return Features(rows, feat, feat, store.pids[rows], store.camids[rows], store.modalities[rows])

    monkeypatch.setattr(evaluate_module, "extract", ideal)
    record = run(finished)
    for setting in record["settings"].values():
        assert set(setting["mean"].values()) == {1.0}
    assert record["within"]["visible"]["cmc1"] == record["within"]["infrared"]["cmc1"] == 1.0
    assert record["figure1"]["share"] == 0.0


def test_a_model_that_sees_only_the_modality_is_at_chance_across_and_figure_1_holds_for_all(finished, monkeypatch):
    def blind(model, store, rows, config, device):
        generator = np.random.default_rng(0)
        feat = generator.normal(0, 0.01, (len(rows), 16)).astype(np.float32)
        feat[:, 0] = np.where(store.modalities[rows] == 1, 1.0, -1.0)
        return Features(rows, feat, feat, store.pids[rows], store.camids[rows], store.modalities[rows])

    monkeypatch.setattr(evaluate_module, "extract", blind)
    assert run(finished)["figure1"]["share"] == 1.0


def test_features_do_not_depend_on_how_many_images_share_a_forward_pass(finished):
    root, config, _ = finished
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    torch.manual_seed(0)
    model = build_model(config.dataset, 6, None)
    together = extract(model, store, store.rows("test"), config, "cpu")
    alone = extract(model, store, store.rows("test")[:1], config, "cpu")
    np.testing.assert_allclose(together.feat[:1], alone.feat, rtol=1e-4, atol=1e-6)


def test_extraction_leaves_the_batch_statistics_alone(finished):
    root, config, _ = finished
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    model = build_model(config.dataset, 6, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extract(model.train(), store, store.rows("test"), config, "cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_trained_on_other_data_is_refused(finished, tmp_path):
    root, config, folder = finished
    make_store(tmp_path / config.dataset.name, config.dataset.layout, identities=5)
    with pytest.raises(StudyError, match="expected the data the run .* was trained on"):
        evaluate(config, folder, packed=tmp_path, results=tmp_path / "results", device="cpu")
    assert not (tmp_path / "results").exists()


def test_a_run_that_was_never_trained_says_what_makes_it(finished, tmp_path):
    root, config, _ = finished
    with pytest.raises(StudyError, match=r"record\.json is missing; .* `dvc repro`"):
        evaluate(config, RunFolder.of(config, tmp_path, tmp_path), packed=root / "data/packed", results=tmp_path)


def test_an_empty_split_is_refused_before_any_feature_is_computed(finished):
    root, config, _ = finished
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    with pytest.raises(StudyError, match="expected images to extract features of, found none"):
        extract(build_model(config.dataset, 6, None), store, np.empty(0, dtype=np.int64), config, "cpu")
