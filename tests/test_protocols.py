"""The protocols' rules, one test each, against golden values and slow loops."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from danet_core import INFRARED, VISIBLE
from danet_study import metrics, protocols
from danet_study.metrics import retrieval_metrics
from danet_study.protocols import PROTOCOLS, Images, evaluate_regdb, evaluate_sysu
from tests.test_metrics import slow_retrieval

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = ("all_1", "all_10", "indoor_1", "indoor_10")
SCORES = ("cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP")


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{name}_expected.json").read_text())


def sysu_sides(arrays, dtype=np.float32):
    sides = [[arrays[f"{side}_{key}"] for key in ("feat", "id", "cam")] for side in "qg"]
    return [value.astype(dtype) if value.ndim == 2 else value for side in sides for value in side]


def check(found, expected, tolerance):
    assert set(found) == set(SCORES)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=tolerance), key


def cosine(q, g):
    return [[1 - float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b)) for b in g] for a in q]


def along(*degrees):
    """Unit vectors at these angles: the cosine distance to `along(0)` rises with the angle."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def sysu_case(q_camid, g_camids, g_pids):
    """One query of identity 1 against a gallery at rising distance."""
    gallery = along(*range(10, 10 + len(g_pids))), np.array(g_pids), np.array(g_camids)
    return evaluate_sysu(along(0), np.array([1]), np.array([q_camid]), *gallery, np.arange(len(g_pids))[None])


@pytest.mark.parametrize("name", ["sysu_mini", "sysu_full"])
def test_sysu_equals_the_golden_values_in_all_settings_and_trials(name):
    arrays, expected = golden(name)
    q_feat, q_pids, q_camids, g_feat, g_pids, g_camids = sysu_sides(arrays)
    query, pool = Images.of(q_feat, q_pids, q_camids), Images.of(g_feat, g_pids, g_camids)
    galleries = {setting: arrays[f"gallery_{setting}"] for setting in SETTINGS}
    ignore = PROTOCOLS["sysu_mm01"].ignore
    for setting, found in protocols.score_settings(query, pool, galleries, ignore, "identity", "cosine").items():
        wanted = expected[setting]
        check(found.mean, wanted["mean"], 1e-6)
        for trial, per_trial in zip(found.per_trial, wanted["per_trial"], strict=True):
            check(trial, per_trial, 1e-6)
        assert found.n_valid == wanted["n_valid_query"] == found.trials[0].n_valid
        assert (found.n_query, found.gallery_size) == (wanted["n_query"], wanted["gallery_size"])
    alone = evaluate_sysu(*sysu_sides(arrays), galleries["indoor_1"])
    check(alone.mean, expected["indoor_1"]["mean"], 1e-6)


@pytest.mark.parametrize("level", ["image", "identity"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("query", "gallery"), [("thermal", "visible"), ("visible", "thermal")])
def test_regdb_equals_the_golden_values(query, gallery, metric, level):
    arrays, expected = golden("regdb")
    wanted = expected[f"{query}_to_{gallery}"]["euclidean_raw" if metric == "euclidean" else metric]
    sides = [arrays[f"{one}_{key}"] for one in (query, gallery) for key in ("feat", "id")]
    found = evaluate_regdb(*sides, cmc=level, metric=metric)
    check(found.mean, {**wanted[f"{level}_level_cmc"], "mAP": wanted["mAP"], "mINP": wanted["mINP"]}, 1e-6)
    assert found.per_trial == (found.mean,)
    assert (found.n_query, found.n_valid, found.gallery_size, found.cmc_level) == (2060, 2060, 2060, level)


def test_camera_3_query_ignores_camera_2_gallery_images_of_every_identity():
    # 9 (camera 1) and 1 (camera 4) are left: the match is second of two, AP 1/2.
    result = sysu_case(3, g_camids=[2, 2, 1, 4], g_pids=[8, 1, 9, 1])
    check(result.mean, {"cmc1": 0, "cmc5": 1, "mAP": 1 / 2, "mINP": 1 / 2}, 1e-12)
    assert result.chance_rank1 == 1 / 2


def test_camera_6_query_keeps_camera_2_gallery_images():
    # Matches at 2 and 4 of four images: AP = (1/2 + 2/4) / 2, INP = 2/4. Identity-level: second.
    result = sysu_case(6, g_camids=[2, 2, 1, 4], g_pids=[8, 1, 9, 1])
    check(result.mean, {"cmc1": 0, "cmc5": 1, "mAP": 1 / 2, "mINP": 1 / 2}, 1e-12)
    assert result.cmc[:3].tolist() == [0, 1, 1]


def test_sysu_ranks_count_identities_and_regdb_ranks_images():
    # Five images of one other identity come first: rank 2 by identity, rank 6 by image.
    result = sysu_case(6, g_camids=[1] * 6, g_pids=[9, 9, 9, 9, 9, 1])
    assert result.cmc.tolist() == [0] + [1] * 19  # the last value is held
    arguments = along(0), np.array([1]), along(*range(10, 16)), np.array([9, 9, 9, 9, 9, 1])
    assert evaluate_regdb(*arguments).cmc[:6].tolist() == [0, 0, 0, 0, 0, 1]
    assert evaluate_regdb(*arguments, cmc="identity").cmc[:2].tolist() == [0, 1]


def test_score_is_the_unweighted_mean_over_trials_and_n_valid_the_fewest():
    # Trial 0 has matches of both queries, at ranks 1 and 2; trial 1 of the first query only, at rank 2.
    query = along(0, 0), np.array([1, 2]), np.array([6, 6])
    pool = along(10, 20, 5), np.array([1, 2, 9]), np.array([1, 1, 1])
    result = evaluate_sysu(*query, *pool, np.array([[0, 1], [0, 2]]))
    assert [trial["cmc1"] for trial in result.per_trial] == [1 / 2, 0]
    assert result.mean["cmc1"] == 1 / 4
    assert result.mean["mAP"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert (result.n_valid, result.n_query) == (1, 2)
    valid, rank1, ap = result.per_query()  # the second query's over trial 0 alone
    assert (valid.tolist(), rank1.tolist(), ap.tolist()) == ([True, True], [1 / 2, 0], [3 / 4, 1 / 2])


def test_order_within_a_trial_does_not_matter_and_ties_go_to_the_lower_pool_index():
    feat, pids, camids = np.tile(along(30), (9, 1)), np.arange(9), np.ones(9, dtype=int)
    for gallery in (np.arange(9), np.arange(9)[::-1].copy()):
        result = evaluate_sysu(along(0), np.array([2]), np.array([6]), feat, pids, camids, gallery[None])
        assert result.cmc[:4].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_gallery_features_tie_however_the_matrix_product_rounds(metric, dtype):
    rng = np.random.default_rng(0)
    feat = np.tile(rng.normal(size=100), (53, 1)).astype(dtype)
    query = rng.normal(size=(33, 100)).astype(dtype)
    result = evaluate_regdb(query, np.full(33, 17), feat, np.arange(53), metric=metric)
    assert result.cmc[16] == 0 and result.cmc[17] == 1


def test_cosine_distance_ignores_length_and_survives_extreme_lengths():
    arrays, _ = golden("sysu_mini")
    q_feat, q_pids, q_camids, g_feat, *rest = sysu_sides(arrays, np.float64)
    plain = evaluate_sysu(q_feat, q_pids, q_camids, g_feat, *rest, arrays["gallery_all_1"])
    scale = 2.0 ** np.random.default_rng(0).integers(-600, 600, (len(g_feat), 1))  # squares overflow
    scaled = evaluate_sysu(q_feat * 2.0**300, q_pids, q_camids, g_feat * scale, *rest, arrays["gallery_all_1"])
    assert scaled.mean == pytest.approx(plain.mean, abs=1e-12)


def test_euclidean_distance_in_float32_survives_a_far_origin():
    rng = np.random.default_rng(0)
    q_feat, g_feat = ((rng.integers(-64, 64, (n, 8)) / 64 + 1000).astype(np.float32) for n in (20, 60))  # exact
    q_pids, g_pids = np.arange(20) % 5, np.arange(60) % 5
    near = evaluate_regdb(q_feat - 1000, q_pids, g_feat - 1000, g_pids, metric="euclidean")
    far = evaluate_regdb(q_feat, q_pids, g_feat, g_pids, metric="euclidean")
    assert far.mean == pytest.approx(near.mean, abs=0.01)


def test_perfect_features_score_one_and_random_features_the_chance_level():
    arrays, _ = golden("sysu_mini")
    q_feat, q_pids, q_camids, g_feat, g_pids, g_camids = sysu_sides(arrays)
    one_hot, galleries = np.eye(1 + max(q_pids.max(), g_pids.max())), arrays["gallery_indoor_10"]
    result = evaluate_sysu(one_hot[q_pids], q_pids, q_camids, one_hot[g_pids], g_pids, g_camids, galleries)
    assert set(result.mean.values()) == {1.0}
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(q_feat), 64)), rng.normal(size=(len(g_feat), 64))
    result = evaluate_sysu(noise[0], q_pids, q_camids, noise[1], g_pids, g_camids, arrays["gallery_indoor_1"])
    assert result.mean["cmc1"] == pytest.approx(result.chance_rank1, abs=0.02)  # 4 standard errors


def test_inputs_are_unchanged_tensors_score_as_arrays_and_blocks_as_one(monkeypatch):
    arrays, _ = golden("sysu_mini")
    sides = [*sysu_sides(arrays), arrays["gallery_all_1"]]
    copies = [part.copy() for part in sides]
    plain = evaluate_sysu(*sides)
    assert all(np.array_equal(part, copy) for part, copy in zip(sides, copies, strict=True))
    assert evaluate_sysu(*(torch.from_numpy(part) for part in sides)).mean == plain.mean
    monkeypatch.setattr(metrics, "PAIRS", 1)  # 128 queries at a time
    assert evaluate_sysu(*sides).mean == pytest.approx(plain.mean, abs=1e-12)


def test_within_one_camera_an_image_ignores_only_itself():
    # At 0, 1, 10 with identities 1, 2, 1: from 0 the match is second, from 10 too; 1 has no match.
    result = protocols.within_modality(Images.of(along(0, 1, 10), np.array([1, 2, 1]), np.array([4, 4, 4])))
    assert (result.n_query, result.n_valid) == (3, 2)
    assert (result.mean["cmc1"], result.mean["mAP"]) == pytest.approx((0, 1 / 2))


def test_within_several_cameras_an_image_ignores_its_identity_in_its_own_camera():
    # Identity 1 at 0 and 1 (camera 1) and 20 (camera 2), identity 2 at 10 (camera 1). The queries at 0 and 1 ignore
    # each other and see 10 then 20, AP 1/2; query 20 sees 10, 1, 0: AP = (1/2 + 2/3) / 2. Identity 2 has no match.
    images = Images.of(along(0, 1, 20, 10), np.array([1, 1, 1, 2]), np.array([1, 1, 2, 1]))
    result = protocols.within_modality(images)
    assert result.n_valid == 3
    assert result.mean["mAP"] == pytest.approx((1 / 2 + 1 / 2 + 7 / 12) / 3)


def test_a_camera_pair_is_scored_as_its_images_alone():
    rng = np.random.default_rng(5)
    query = Images.of(rng.normal(size=(40, 8)), rng.integers(0, 5, 40), rng.choice([3, 6], 40))
    gallery = Images.of(rng.normal(size=(60, 8)), rng.integers(0, 5, 60), rng.choice([1, 2, 4, 5], 60))
    gallery.pids[gallery.camids == 5] = 9  # no query has this identity
    pairs = protocols.camera_pairs(query, gallery)
    assert [(p["query_camera"], p["gallery_camera"]) for p in pairs] == [(q, g) for q in (3, 6) for g in (1, 2, 4)]
    for pair in pairs:
        one, other = query[query.camids == pair["query_camera"]], gallery[gallery.camids == pair["gallery_camera"]]
        alone = retrieval_metrics(np.array(cosine(one.feat, other.feat)), one.pids, other.pids, cmc="image")
        assert (pair["mAP"], pair["cmc1"]) == pytest.approx((alone.mAP, alone.cmc[0]))
        assert (pair["n_query"], pair["n_valid"], pair["gallery_size"]) == (len(one), alone.n_valid, len(other))


def test_random_seed_galleries_are_those_of_the_global_generator_over_sorted_folders():
    counts = {(3, 1): 12, (3, 2): 4, (20, 1): 1, (101, 2): 11, (101, 4): 7, (7, 1): 10, (7, 2): 10}
    rows = [(pid, cam, f"cam{cam}/{pid:04d}/{n}.jpg") for (pid, cam), count in counts.items() for n in range(count)]
    random.Random(0).shuffle(rows)
    pids, camids, paths = (list(column) for column in zip(*rows, strict=True))
    state = random.getstate()
    found = inspect.unwrap(protocols.random_seed_gallery)(np.array(pids), np.array(camids), paths, (1, 2), 3)
    assert random.getstate() == state  # the caller's generator is left alone
    for trial, gallery in enumerate(found):
        random.seed(trial)
        wanted = []
        for folder in ("cam1/0003", "cam2/0003", "cam1/0007", "cam2/0007", "cam1/0020", "cam2/0101"):
            wanted.append(random.choice(sorted(path for path in paths if path.startswith(folder))))
        assert gallery.tolist() == sorted(paths.index(path) for path in wanted)
    random.setstate(state)


def test_every_protocol_names_sides_for_each_setting():
    for protocol in PROTOCOLS.values():
        assert protocol.ablation in protocol.settings
        assert protocol.sides.keys() == protocol.settings.keys()
        assert all(set(sides) == {VISIBLE, INFRARED} for sides in protocol.sides.values())
        assert len(protocol.caption.split()) <= 25


def made_up_llcm(n_ids=4):
    """Test images of identities with 1 to 3 images per camera, shuffled; camera 3 has no infrared. Their paths."""
    rng, rows = np.random.default_rng(11), []
    for pid in range(7, 7 + n_ids):
        for modality, cameras in ((VISIBLE, (1, 2, 3)), (INFRARED, (1, 2, 4))):
            for camera in cameras:
                rows += [(pid, camera, modality, f"{modality}/{pid}_c{camera}_s{n}") for n in range(rng.integers(1, 4))]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    *columns, paths = zip(*rows, strict=True)
    return Images.of(rng.normal(size=(len(rows), 6)), *map(np.array, columns)), list(paths)


@pytest.mark.parametrize("setting", ["infrared_to_visible", "visible_to_infrared"])
def test_llcm_equals_slow_loops_over_the_published_draws(setting):
    images, paths = made_up_llcm()
    store = SimpleNamespace(manifest=pd.DataFrame({"path": paths}))
    found = PROTOCOLS["llcm"].score(images, store, SimpleNamespace(trials=4, metric="cosine"))[setting]
    sampled = VISIBLE if setting == "infrared_to_visible" else INFRARED
    for trial, scores in enumerate(found.per_trial):
        generator, drawn = random.Random(trial), []  # draws as after random.seed(trial)
        for pid in sorted(set(images.pids.tolist())):
            for camera in range(1, 10):
                here = (images.pids == pid) & (images.camids == camera) & (images.modalities == sampled)
                if here.any():
                    drawn.append(generator.choice(sorted((paths[row], row) for row in np.flatnonzero(here)))[1])
        infrared, visible = (np.flatnonzero(images.modalities == one).tolist() for one in (INFRARED, VISIBLE))
        q, g = (images[infrared], images[sorted(drawn)]) if sampled == VISIBLE else (images[drawn], images[visible])
        same = (q.pids[:, None] == g.pids) & (q.camids[:, None] == g.camids)
        dist = cosine(q.feat, g.feat)
        wanted = slow_retrieval(dist, q.pids.tolist(), g.pids.tolist(), lambda i, j, same=same: same[i, j], "identity")
        assert (scores["cmc1"], scores["mAP"]) == pytest.approx((wanted["cmc"][0], wanted["mAP"]), abs=1e-12)
        assert scores["mINP"] == pytest.approx(wanted["mINP"], abs=1e-12)
        assert (found.trials[trial].n_valid, len(found.trials[trial].valid)) == (wanted["n_valid"], len(q))
    assert (found.n_query, found.gallery_size, found.cmc_level) == (len(q), len(g), "identity")


def test_both_ways_ranks_all_images_of_the_other_modality_and_ignores_none():
    images, _ = made_up_llcm()
    infrared, visible = images.of_modality(INFRARED), images.of_modality(VISIBLE)
    found = PROTOCOLS["both_ways"].score(images, None, SimpleNamespace(metric="cosine"))
    for setting, q, g in (("infrared_to_visible", infrared, visible), ("visible_to_infrared", visible, infrared)):
        wanted = retrieval_metrics(np.array(cosine(q.feat, g.feat)), q.pids, g.pids, cmc="image")
        assert (found[setting].mean["cmc1"], found[setting].mean["mAP"]) == pytest.approx((wanted.cmc[0], wanted.mAP))
        assert (found[setting].n_query, found[setting].cmc_level) == (len(q), "image")


Q = along(0, 5), np.array([1, 2]), np.array([3, 6])
G = along(1, 2, 3), np.array([1, 2, 3]), np.array([1, 4, 5])
T = np.array([[0, 1], [0, 2]])
NAN = np.array([[1.0, 0.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate_sysu(*G, *Q, T[:, :1]),  # swapped sides
        lambda: evaluate_sysu(*Q, *G, T + 1),  # an index beyond the pool
        lambda: evaluate_sysu(*Q, *G, T - 1),
        lambda: evaluate_sysu(*Q, *G, np.array([[0, 1], [2, 2]])),  # an image twice
        lambda: evaluate_sysu(*Q, *G, T[:, :0]),  # empty gallery
        lambda: evaluate_sysu(*Q, *G, T[:0]),
        lambda: evaluate_sysu(*Q, *G, T[:, 1:]),  # trial 1 without a match
        lambda: sysu_case(3, g_camids=[2, 1], g_pids=[1, 9]),  # camera 3 with matches in camera 2 only
        lambda: evaluate_sysu(NAN, *Q[1:], *G, T),
        lambda: evaluate_regdb(*Q[:2], NAN, np.array([1, 2])),
        lambda: evaluate_regdb(*Q[:2], along(1), np.array([9])),
        lambda: evaluate_regdb(*Q[:2], along()[:0], np.array([], int)),
        lambda: evaluate_regdb(along()[:0], np.array([], int), *G[:2]),
        lambda: protocols.within_modality(Images.of(*Q)),
        lambda: protocols.random_seed_gallery(G[1], G[2], ["a", "b", "c"], (7,)),
        lambda: Images.of(G[0], G[1][:2]),
    ],
)
def test_what_cannot_be_scored_raises_a_value_error(call):
    with pytest.raises(ValueError):
        call()
