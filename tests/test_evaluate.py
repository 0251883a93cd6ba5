"""The record of a run is right, complete and the same each time; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from stores import make_project, small_run

from danet_core import INFRARED, VISIBLE
from danet_core.backbone import ResNet
from danet_study import protocols
from danet_study.checkpoint import build_model, save_run
from danet_study.evaluate import FEATURES, RANKINGS, Features, evaluate, extract
from danet_study.files import StudyError, sha256_file
from danet_study.protocols import PROTOCOLS, Protocol, evaluate_regdb, evaluate_sysu
from danet_study.store import MANIFEST, META, PackedStore, content_sha256

SPLITS = ("synth_sysu-1", "synth_regdb-1")


def finish(root, config):
    """A finished run with random weights and plausible statistics in its BN layers."""
    store = PackedStore.open(root / "data/packed" / config.dataset.name)
    torch.manual_seed(config.seed)
    backbone = root / "data/weights" / f"{config.dataset.name}.safetensors"
    model = build_model(config.resolved(), len(np.unique(store.pids[store.rows("train")])), backbone)
    model.neck.running_mean.normal_(0.5, 0.2)
    history = [{"epoch": 1, "lr": 0.1, **dict.fromkeys(config.losses, 1.23456789), "total": 2.0, "seconds": 3.0}]
    names = {"run": config.name, "dataset": config.dataset.name, "trial": config.trial, "variant": config.variant}
    provenance = {"data_sha256": store.meta["content_sha256"], "weights_sha256": sha256_file(backbone)}
    rest = {"seed": config.seed, "config": config.resolved(), "history": history, "versions": {"python": "3"}}
    save_run(root / "runs" / config.name, model, {**names, **rest, "provenance": provenance})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = make_project(tmp_path_factory.mktemp("study") / "project")
    for split in SPLITS:
        finish(root, small_run(split=split))
    return root


def run(root, config):
    folders = {"runs": root / "runs", "packed": root / "data/packed", "weights": root / "data/weights"}
    return evaluate(config, **folders, results=root, device="cpu")


def changed(config, **evaluation):
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def test_only_variants_that_train_c_v_and_c_r_measure_them(project):
    finish(project, small_run("b_cc"))
    assert "classifiers" not in run(project, small_run("b_cc"))
    measured = run(project, small_run())["classifiers"]
    assert measured.keys() == {"cosine", "accuracy", "gradient"} and measured["gradient"].keys() == {
        "L_sid",
        "L_M",
        "L_cc",
    }


@pytest.mark.parametrize("split", SPLITS)
def test_the_record_holds_every_setting_of_the_protocol_and_is_what_is_written(project, split):
    config = small_run(split=split)
    record = run(project, config)
    assert json.loads((project / "records" / f"{config.name}.json").read_text()) == record
    protocol = PROTOCOLS[record["protocol"]]
    assert list(record["settings"]) == list(protocol.settings)
    for setting in record["settings"].values():
        trials = config.evaluation.trials if record["protocol"] == "sysu_mm01" else 1
        assert set(setting["mean"]) == {"cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP"}
        assert len(setting["cmc"]) == 20
        for key, values in setting["per_trial"].items():
            assert len(values) == trials and np.mean(values) == pytest.approx(setting["mean"][key], abs=2e-6)
        assert not {"galleries", "metric"} & setting.keys()
        assert 0 < setting["chance_rank1"] < 1
    assert record["run"] == config.name and record["split"] == "test" and record["synthetic"] is True
    assert record["training"] == {"steps": 6, "epochs": 3, "final": dict.fromkeys(config.losses, 1.234568)}
    assert set(record["within"]) == {"visible", "infrared"}
    for gap in (record["modality_gap"], record["modality_gap"]["pretrained"]):
        assert {"nearest", "median", "mean", "n"} <= gap.keys() and gap["n"] == 6
    assert set(record["probe"]) == {"pretrained", "before_bn", "after_bn"}
    assert ("camera_pairs" in record) == (record["protocol"] == "sysu_mm01")
    assert record["config"] == config.resolved()
    assert record["provenance"].keys() >= {"data_sha256", "weights_sha256", "model_sha256", "config_sha256"}


@pytest.mark.parametrize("split", SPLITS)
def test_evaluating_twice_gives_the_same_bytes(project, split):
    config = small_run(split=split)
    paths = [project / "records" / f"{config.name}.json"]
    paths += [project / "runs" / config.name / name for name in (FEATURES, RANKINGS)]
    run(project, config)
    first = [path.read_bytes() for path in paths]
    run(project, config)
    assert [path.read_bytes() for path in paths] == first
    assert str(project) not in first[0].decode()


@pytest.mark.parametrize("split", SPLITS)
def test_scores_are_those_of_the_stored_features_and_the_means_of_those_per_identity(project, split):
    config = small_run(split=split)
    record = run(project, config)
    features = Features.load(project / "runs" / config.name / FEATURES)
    store = PackedStore.open(project / "data/packed" / config.dataset.name)
    np.testing.assert_array_equal(features.rows, store.rows("test"))
    images = features.images("after_bn")
    query, visible = images.of_modality(INFRARED), images.of_modality(VISIBLE)
    if record["protocol"] == "sysu_mm01":
        galleries = np.searchsorted(visible.rows, store.galleries["all_single"])
        sides = query.feat, query.pids, query.camids, visible.feat, visible.pids, visible.camids
        result = evaluate_sysu(*sides, galleries)
    else:
        result = evaluate_regdb(query.feat, query.pids, visible.feat, visible.pids)
    assert record["settings"][PROTOCOLS[record["protocol"]].ablation]["mean"] == pytest.approx(result.mean, abs=1e-6)
    kept, setting = record["per_identity"], record["settings"][PROTOCOLS[record["protocol"]].ablation]
    assert kept["pids"] == [2, 4, 6, 8, 10, 12] and sum(kept["n"]) == setting["n_valid"]
    for key, metric in (("cmc1", "cmc1"), ("ap", "mAP")):
        assert np.average(kept[key], weights=kept["n"]) == pytest.approx(setting["mean"][metric], abs=2e-6)


def test_rankings_name_rows_of_the_store(project):
    config = small_run()
    run(project, config)
    found = json.loads((project / "runs" / config.name / RANKINGS).read_text())
    store = PackedStore.open(project / "data/packed/synth_sysu")
    assert found["setting"] == "all_single"
    for one in found["best"] + found["worst"]:
        assert store.modalities[one["row"]] == INFRARED
        rows = np.array(one["ranked"]["rows"])
        assert set(rows) <= set(store.galleries["all_single"][0])
        assert (store.pids[rows] == store.pids[one["row"]]).tolist() == one["ranked"]["right"]
        if store.camids[one["row"]] == 3:
            assert 2 not in store.camids[rows]


def test_features_do_not_depend_on_the_batch_and_the_model_is_in_evaluation_mode(project):
    config = small_run()
    store, rows = PackedStore.open(project / "data/packed/synth_sysu"), np.arange(20, 40)
    torch.manual_seed(0)
    model = build_model(config.resolved(), 6, None).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [extract(model, store, rows, config.recipe, batch_size=size, device="cpu") for size in (1, 7, 20)]
    for one in found[1:]:
        np.testing.assert_allclose(one.feat_bn, found[0].feat_bn, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(found[0].pids, store.pids[rows])


def test_another_metric_and_other_galleries_are_marked_where_they_apply(project):
    record = run(project, changed(small_run(), metric="euclidean", galleries="random_seed", trials=3))
    assert list(record["settings"]) == ["all_single", "indoor_single"]
    for setting in record["settings"].values():
        assert (setting["metric"], setting["galleries"]) == ("euclidean", "random_seed")
        assert len(setting["per_trial"]["mAP"]) == 3
    regdb = run(project, changed(small_run(split="synth_regdb-1"), galleries="random_seed"))
    assert "galleries" not in regdb["settings"]["thermal_to_visible"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_new_data_set_with_a_known_protocol_needs_no_change(project, tmp_path, split):
    config = small_run(split=split)
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"name": "campus"})})
    source = split.removesuffix("-1")
    shutil.copytree(project / "data/packed" / source, tmp_path / "data/packed/campus")
    (tmp_path / "data/weights").mkdir()
    shutil.copy(project / f"data/weights/{source}.safetensors", tmp_path / "data/weights/campus.safetensors")
    finish(tmp_path, config)
    assert run(tmp_path, config)["dataset"] == "campus"


def test_a_new_protocol_is_one_entry(project, monkeypatch):
    """As LLCM's: a random visible image of each identity and camera; own camera and identity ignored."""

    def score(images, store, evaluation):
        query, pool = images.of_modality(INFRARED), images.of_modality(VISIBLE)
        paths = store.manifest["path"].iloc[pool.rows].tolist()
        drawn = protocols.random_seed_gallery(pool.pids, pool.camids, paths, (1, 2, 4, 5), evaluation.trials)
        ignore = protocols.same_identity_and_camera
        return protocols.score_settings(query, pool, {"nir": drawn}, ignore, "identity", evaluation.metric)

    entry = Protocol({"nir": "infrared to visible"}, "nir", {"nir": (INFRARED, VISIBLE)}, score)
    monkeypatch.setitem(PROTOCOLS, "llcm", entry)
    config = small_run()
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"protocol": "llcm"})})
    record = run(project, config)
    assert (record["protocol"], list(record["settings"])) == ("llcm", ["nir"])
    assert len(record["settings"]["nir"]["per_trial"]["cmc1"]) == 10


@pytest.fixture
def copy(project, tmp_path):
    """A copy to break, and the configuration of its run on RegDB's layout."""
    return shutil.copytree(project, tmp_path / "copy"), small_run(split="synth_regdb-1")


def edit_manifest(root, change, dataset="synth_regdb"):
    """Change the manifest of a data set and make the store consistent again."""
    folder = root / "data/packed" / dataset
    change(pd.read_csv(folder / MANIFEST)).to_csv(folder / MANIFEST, index=False)
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "content_sha256": content_sha256(folder, meta["files"])}))


def refused(root, config):
    shutil.rmtree(root / "records", ignore_errors=True)
    with pytest.raises(StudyError):
        run(root, config)
    assert not (root / "records").exists()


def test_validation_identities_are_scored_with_galleries_drawn_at_random(tmp_path):
    """As in the rendered data: validation identities are seen by cameras 3, 4 and 5 only."""
    root = make_project(tmp_path, ("synth_sysu",))
    edit_manifest(
        root,
        lambda table: table.assign(
            split_1=table["split_1"]
            .mask(table["pid"].isin((2, 4, 6)) & table["camid"].isin((3, 4, 5)), "val")
            .mask(table["pid"].isin((2, 4, 6)) & table["camid"].isin((1, 2, 6)), "")
        ),
        "synth_sysu",
    )
    config = changed(small_run(), split="val", galleries="random_seed")
    assert config.resolved() == small_run().resolved()  # the same weights
    finish(root, config)
    record = run(root, config)
    assert (record["split"], record["evaluation"]["split"], list(record["settings"])) == ("val", "val", ["all_single"])
    assert record["per_identity"]["pids"] == [2, 4, 6]
    assert record["settings"]["all_single"]["gallery_size"] == 3 * 2  # one image per identity and visible camera
    assert record["settings"]["all_single"]["galleries"] == "random_seed"
    features = Features.load(root / "runs" / config.name / FEATURES)
    np.testing.assert_array_equal(features.rows, PackedStore.open(root / "data/packed/synth_sysu").rows("val"))
    refused(root, changed(config, galleries="rand_perm"))  # stored galleries are of test images
    both = config.dataset.model_copy(update={"train_splits": ["train", "val"]})
    leaking = config.model_copy(update={"dataset": both})
    finish(root, leaking)
    refused(root, leaking)


def test_a_row_that_only_changes_the_test_scores_the_weights_of_another_run(project):
    trained = small_run()
    network = trained.model.model_copy(update={"test_feature": "before_bn"})
    row = changed(trained.model_copy(update={"variant": "row", "model": network}), metric="euclidean")
    folders = {"runs": project / "runs", "packed": project / "data/packed", "weights": project / "data/weights"}
    record = evaluate(row, trained=trained, **folders, results=project, device="cpu")
    plain = run(project, trained)
    assert (record["run"], record["config"], record["variant"]) == (row.name, row.resolved(), "row")
    assert record["provenance"]["model_sha256"] == plain["provenance"]["model_sha256"]
    assert record["probe"] == plain["probe"]
    images = Features.load(project / "runs" / row.name / FEATURES).images("before_bn")
    expected = protocols.within_modality(images.of_modality(VISIBLE), "euclidean").mean["mAP"]
    assert record["within"]["visible"]["mAP"] == pytest.approx(expected, abs=1e-6)


def test_another_store_and_other_or_missing_weights_are_refused(copy):
    root, config = copy
    weights = root / "data/weights/synth_regdb.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused(root, config)
    save_file(ResNet("resnet18", 8).state_dict(), weights)
    refused(root, config)
    weights.write_bytes(content)
    run(root, config)
    edit_manifest(root, lambda table: table.assign(path="moved/" + table["path"]))
    refused(root, config)


def test_a_test_identity_that_was_trained_on_is_refused(copy):
    root, config = copy
    edit_manifest(root, lambda table: table.replace({"pid": {2: 1}}))
    finish(root, config)
    refused(root, config)


def test_a_model_of_another_trial_or_configuration_is_refused(copy):
    root, config = copy
    edit_manifest(root, lambda table: table.assign(split_2=table["split_1"].map({"train": "test", "test": "train"})))
    finish(root, config)
    second = config.model_copy(update={"trial": 2})
    shutil.copytree(root / "runs" / config.name, root / "runs" / second.name)
    refused(root, second)
    refused(root, config.model_copy(update={"losses": {"L_id": {"weight": 2.0}}}))
    refused(root, config.model_copy(update={"seed": 5}))  # not trained


@pytest.mark.parametrize("protocol", ["regbd", "sysu_mm01"])  # unknown; without galleries in the store
def test_a_protocol_that_cannot_score_the_data_set_is_refused(copy, protocol):
    root, config = copy
    refused(root, config.model_copy(update={"dataset": config.dataset.model_copy(update={"protocol": protocol})}))


def test_a_damaged_model_and_features_that_are_not_finite_are_refused(copy):
    root, config = copy
    path = root / "runs" / config.name / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(root, config)
    numbers = np.arange(3)
    features = Features(numbers, np.ones((3, 2)), np.array([[1, 0], [np.nan, 0], [0, 1]]), numbers, numbers, numbers)
    features.save(root / FEATURES)
    found = Features.load(root / FEATURES)
    np.testing.assert_array_equal(found.images("before_bn").feat, features.feat)
    with pytest.raises(StudyError):
        found.images("after_bn")
    for broken in ("none.npz", "data/weights/synth_regdb.safetensors"):
        with pytest.raises(StudyError):
            Features.load(root / broken)
