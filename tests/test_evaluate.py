"""A run's metrics record is right, complete and the same each time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.records import training_record
from safetensors.torch import load_file, save_file

from danet_core import INFRARED
from danet_core import evaluate as evaluate_module
from danet_core.backbone import ResNet
from danet_core.evaluate import Features, evaluate, extract
from danet_core.files import StudyError, atomic_write_json
from danet_core.parameters import Rerank
from danet_core.protocols import evaluate_regdb, evaluate_sysu
from danet_core.record import RunFolder
from danet_core.scores import ABLATION_SETTING
from danet_core.store import META, PackedStore, content_names, content_sha256, read_manifest
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


def run(finished, **evaluation):
    root, config, folder = finished
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **evaluation))
    return evaluate(config, folder, **folders(root), device="cpu")


def folders(root):
    return {"packed": root / "data/packed", "weights": root / "data/weights", "results": root / "results"}


def test_the_record_holds_every_setting_of_the_layout_and_the_final_losses(finished):
    record = run(finished)
    assert set(record["settings"]) == SETTINGS[record["dataset"]]
    for setting in record["settings"].values():
        assert set(setting["mean"]) == {"cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP"}
        assert len(setting["cmc"]) == 50
        if len(setting["per_trial"]) == 1:  # RegDB: the range would be the curve
            assert "cmc_range" not in setting
            continue
        low, high = setting["cmc_range"]
        assert [low[0], high[0]] == [one([trial["cmc1"] for trial in setting["per_trial"]]) for one in (min, max)]
        assert len(low) == len(high) == 50
        np.testing.assert_array_less(low, np.array(setting["cmc"]) + 1e-9)
        np.testing.assert_array_less(setting["cmc"], np.array(high) + 1e-9)
    assert all(record["training"]["final"][term] is not None for term in ("L_id", "L_cc", "L_sid", "L_M", "total"))
    assert record["synthetic"] is True
    assert record["training"]["steps"] == 6


def test_the_ablations_setting_keeps_what_each_query_scored_and_its_mean_is_the_printed_score(finished):
    root, config, _ = finished
    record = run(finished)
    (name,) = [name for name, setting in record["settings"].items() if "per_query" in setting]
    assert name == ABLATION_SETTING[record["layout"]]
    setting = record["settings"][name]
    kept, store = setting["per_query"], PackedStore.open(root / "data/packed" / config.dataset.name)
    assert len(kept["rows"]) == setting["n_valid"] == len(set(kept["rows"]))
    assert kept["pids"] == store.pids[kept["rows"]].tolist()
    assert set(store.modalities[kept["rows"]]) == {INFRARED}
    assert set(kept["rows"]) <= set(store.rows("test"))
    for key, metric in (("cmc1", "cmc1"), ("ap", "mAP")):
        assert np.mean(kept[key]) == pytest.approx(setting["mean"][metric], abs=1e-6)


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


def test_the_probe_tells_trained_from_untrained_and_sits_at_chance_for_an_ideal_model(finished, monkeypatch):
    probe = run(finished)["probe"]
    assert set(probe) == {"pretrained", "before_bn", "after_bn"}
    assert all(0 <= value <= 1 for value in probe.values())

    def told_apart(model, store, rows, config, device):
        modality = np.where(store.modalities[rows] == 1, 1.0, -1.0).astype(np.float32)
        alike = np.ones((len(rows), 2), dtype=np.float32)
        seen = np.stack([modality, np.ones_like(modality)], axis=1)
        trained = "pretrained" if torch.equal(model.backbone.conv1.weight, start) else "trained"
        feat, feat_bn = (seen, seen) if trained == "pretrained" else (alike, seen)
        return Features(rows, feat, feat_bn, store.pids[rows], store.camids[rows], store.modalities[rows])

    root, config, _ = finished
    start = load_file(root / "data/weights" / f"{config.dataset.name}.safetensors")["conv1.weight"]
    monkeypatch.setattr(evaluate_module, "extract", told_apart)
    assert run(finished)["probe"] == {"pretrained": 1.0, "before_bn": 0.5, "after_bn": 1.0}


def test_camera_pairs_stand_in_the_record_of_sysus_layout_only(finished):
    record = run(finished)
    if record["layout"] == "regdb":
        assert "camera_pairs" not in record
        return
    pairs = [(pair["query_camera"], pair["gallery_camera"]) for pair in record["camera_pairs"]]
    assert pairs == [(query, gallery) for query in (3, 6) for gallery in (1, 2, 4, 5)]


def test_the_queries_of_the_record_are_infrared_and_their_gallery_is_the_first_of_the_first_setting(finished):
    root, config, _ = finished
    record = run(finished)
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    sysu = record["layout"] == "sysu"
    assert record["queries"]["setting"] == ("all_single" if sysu else "thermal_to_visible")
    gallery = store.galleries["all_single"][0] if sysu else np.flatnonzero(store.modalities == 0)
    for one in record["queries"]["best"] + record["queries"]["worst"]:
        assert store.modalities[one["row"]] == 1
        rows = np.array(one["ranked"]["rows"])
        assert np.isin(rows, gallery).all()
        assert one["ranked"]["right"] == (store.pids[rows] == store.pids[one["row"]]).tolist()
        assert not (sysu and store.camids[one["row"]] == 3 and (store.camids[rows] == 2).any())


def test_backbone_weights_that_the_run_did_not_start_from_are_refused(finished, tmp_path):
    root, config, folder = finished
    elsewhere = {**folders(root), "results": tmp_path / "results", "weights": tmp_path}
    with pytest.raises(StudyError, match="expected the backbone weights that the run .* started from .* found no file"):
        evaluate(config, folder, **elsewhere, device="cpu")
    save_file(ResNet("resnet18", 8).state_dict(), tmp_path / f"{config.dataset.name}.safetensors")
    with pytest.raises(StudyError, match="started from .* found [0-9a-f]{12}; run `dvc repro`"):
        evaluate(config, folder, **elsewhere, device="cpu")
    assert not (tmp_path / "results").exists()


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


@pytest.fixture
def two_trials(tmp_path: Path):
    """A RegDB-like store with identities 1..12: trial 1 trains on the odd ones, trial 2 on 1..6; a run of trial 1."""
    root = make_store(tmp_path / "packed" / "synth_regdb", "regdb")
    manifest = read_manifest(root / "manifest.csv")
    manifest["split_2"] = np.where(manifest["pid"] <= 6, "train", "test")
    manifest.to_csv(root / "manifest.csv", index=False)
    meta = json.loads((root / META).read_text())
    atomic_write_json(root / META, {**meta, "content_sha256": content_sha256(root, content_names("regdb"))})

    def score(trained: int, configured: int, split_trial: int | None = None):
        config = small_config("synth_regdb", trial=configured)
        folder = RunFolder.of(config, tmp_path / "runs", tmp_path / "build")
        atomic_write_json(folder.record, training_record("synth_regdb", "baseline", trained))
        return evaluate(config, folder, packed=root.parent, results=tmp_path / "results", split_trial=split_trial)

    return score


# Trial 1 trains on 1 3 5 7 9 11 and tests on 2 4 6 8 10 12; trial 2 trains on 1..6 and tests on 7..12.
@pytest.mark.parametrize(
    ("trained", "configured", "split_trial", "asked"), [(1, 2, None, 2), (1, 1, 2, 2), (2, 1, None, 1), (2, 1, 1, 1)]
)
def test_a_model_of_one_trial_is_refused_the_test_images_of_another(
    two_trials, tmp_path, trained, configured, split_trial, asked
):
    with pytest.raises(StudyError) as caught:
        two_trials(trained, configured, split_trial)
    sentence = f"a model of trial {trained}, asked to score the test images of trial {asked}: it was trained on 3 of "
    assert sentence + "their 6 identities" in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_trial_that_the_store_lacks_is_refused_too(two_trials):
    with pytest.raises(StudyError, match="no split of trial 3; this store has trial 1, 2"):
        two_trials(1, 1, 3)


def test_asking_for_the_runs_own_trial_is_what_happens_without_asking(finished):
    root, config, folder = finished
    assert evaluate(config, folder, **folders(root), device="cpu", split_trial=config.trial) == run(finished)


def test_a_default_record_does_not_mention_what_was_not_used(finished):
    for setting in run(finished)["settings"].values():
        assert not {"galleries", "rerank"} & set(setting)


def test_galleries_by_random_seed_are_single_shot_and_named_in_every_setting(finished):
    default, record = run(finished), run(finished, galleries="random_seed")
    assert record.pop("evaluation") == {**default.pop("evaluation"), "galleries": "random_seed"}
    if record["layout"] == "regdb":  # has no random galleries
        assert record == default
        return
    assert set(record["settings"]) == {"all_single", "indoor_single"}
    for name, setting in record["settings"].items():
        usual = default["settings"][name]
        assert setting["galleries"] == "random_seed"
        assert set(setting) - {"galleries"} == set(usual)
        assert setting["per_trial"] != usual["per_trial"]
        for key in ("gallery_size", "n_query", "n_valid"):
            assert setting[key] == usual[key]
    left_out = {"settings": None, "queries": None}
    assert {**record, **left_out} == {**default, **left_out}


def by_protocol(finished, rerank):
    """Means of every setting as the protocol gives them for the features that the run left."""
    root, config, folder = finished
    features, store = Features.load(folder.features), PackedStore.open(root / "data/packed" / config.dataset.name)
    feat, pids, camids = features.feat_bn, features.pids, features.camids
    infrared = features.modalities == INFRARED
    query, gallery = (feat[infrared], pids[infrared]), (feat[~infrared], pids[~infrared])
    if config.dataset.layout == "regdb":
        directions = {"thermal_to_visible": (*query, *gallery), "visible_to_thermal": (*gallery, *query)}
        return {name: evaluate_regdb(*sides, rerank=rerank).mean for name, sides in directions.items()}
    galleries = {name: np.searchsorted(features.rows[~infrared], rows) for name, rows in store.galleries.items()}
    sides = (*query, camids[infrared], *gallery, camids[~infrared])
    return {name: evaluate_sysu(*sides, one, rerank=rerank).mean for name, one in galleries.items()}


def test_a_reranked_record_says_so_in_every_setting_and_only_settings_change(finished):
    default, record = run(finished), run(finished, rerank=Rerank(20, 6, 0.3))
    assert set(record["settings"]) == set(default["settings"])
    for name, setting in record["settings"].items():
        assert setting["rerank"] == {"k1": 20, "k2": 6, "lambda_value": 0.3}
        assert setting["chance_rank1"] == default["settings"][name]["chance_rank1"]
    assert {name: one["mean"] for name, one in record["settings"].items()} == by_protocol(finished, Rerank(20, 6, 0.3))
    assert {name: one["mean"] for name, one in default["settings"].items()} == by_protocol(finished, None)
    assert by_protocol(finished, Rerank(20, 6, 0.3)) != by_protocol(finished, None)
    assert record.pop("evaluation") == {**default.pop("evaluation"), "rerank": dataclasses.asdict(Rerank(20, 6, 0.3))}
    left_out = {"settings": None}
    assert {**record, **left_out} == {**default, **left_out}


def test_a_run_that_was_never_trained_says_what_makes_it(finished, tmp_path):
    root, config, _ = finished
    with pytest.raises(StudyError, match=r"record\.json is missing; .* `dvc repro`"):
        evaluate(config, RunFolder.of(config, tmp_path, tmp_path), packed=root / "data/packed", results=tmp_path)


def test_an_empty_split_is_refused_before_any_feature_is_computed(finished):
    root, config, _ = finished
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    with pytest.raises(StudyError, match="expected images to extract features of, found none"):
        extract(build_model(config.dataset, 6, None), store, np.empty(0, dtype=np.int64), config, "cpu")
