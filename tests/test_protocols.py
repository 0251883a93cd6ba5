from __future__ import annotations

import inspect
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core import metrics, protocols, similarity
from danet_core.files import StudyError
from danet_core.parameters import Rerank
from danet_core.protocols import ProtocolResult
from danet_core.rerank import rerank

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = ("all_1", "all_10", "indoor_1", "indoor_10")
TOLERANCE = {np.float64: 1e-6, np.float32: 1e-5}


def bare(function: Callable) -> Callable:
    """The function without the shape check that conftest.py puts before it: what a user's wrong call meets."""
    return inspect.unwrap(function)


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{name}_expected.json").read_text())


def sysu_sides(arrays: dict[str, np.ndarray], dtype: type) -> list[np.ndarray]:
    return [
        arrays[f"{side}_{key}"].astype(dtype) if key == "feat" else arrays[f"{side}_{key}"]
        for side in "qg"
        for key in ("feat", "id", "cam")
    ]


def assert_equal(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    assert set(found) == set(expected) == {"cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP"}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=tolerance), key


def assert_equal_results(found: ProtocolResult, expected: ProtocolResult) -> None:
    np.testing.assert_allclose(found.cmc, expected.cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.cmc_range, expected.cmc_range, rtol=0, atol=1e-12)
    for one, other in zip((found.mean, *found.per_trial), (expected.mean, *expected.per_trial), strict=True):
        assert one == pytest.approx(other, abs=1e-12)
    for key, values in expected.per_query.items():
        np.testing.assert_allclose(found.per_query[key], values, rtol=0, atol=1e-12)
    left_out = dict.fromkeys(("cmc", "cmc_range", "mean", "per_trial", "per_query"))
    assert {**vars(found), **left_out} == {**vars(expected), **left_out}


def cosine(q: np.ndarray, g: np.ndarray) -> list[list[float]]:
    return [[1 - float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b)) for b in g] for a in q]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sysu_mini", "sysu_full"])
def test_sysu_equals_the_golden_values_in_all_settings_and_trials(name: str, dtype: type) -> None:
    arrays, expected = golden(name)
    galleries = {setting: arrays[f"gallery_{setting}"] for setting in SETTINGS}
    results = protocols.evaluate_sysu_settings(*sysu_sides(arrays, dtype), galleries)
    assert tuple(results) == SETTINGS
    for setting, found in results.items():
        wanted = expected[setting]
        assert_equal(found.mean, wanted["mean"], TOLERANCE[dtype])
        for trial, per_trial in zip(found.per_trial, wanted["per_trial"], strict=True):
            assert_equal(trial, per_trial, TOLERANCE[dtype])
        assert found.n_valid == wanted["n_valid_query"]
        assert found.n_valid_per_trial == (wanted["n_valid_query"],) * 10
        assert (found.n_query, found.gallery_size) == (wanted["n_query"], wanted["gallery_size"])
        assert found.cmc_level == "identity"


def test_one_setting_alone_scores_as_among_others() -> None:
    arrays, _ = golden("sysu_mini")
    sides = sysu_sides(arrays, np.float64)
    together = protocols.evaluate_sysu_settings(*sides, {name: arrays[f"gallery_{name}"] for name in SETTINGS})
    for name in SETTINGS:
        assert_equal_results(protocols.evaluate_sysu(*sides, arrays[f"gallery_{name}"]), together[name])


@pytest.mark.parametrize("level", ["image", "identity"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("query", "gallery"), [("thermal", "visible"), ("visible", "thermal")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regdb_equals_the_golden_values(query: str, gallery: str, distance: Any, level: Any, dtype: type) -> None:
    arrays, expected = golden("regdb")
    wanted = expected[f"{query}_to_{gallery}"]["euclidean_raw" if distance == "euclidean" else distance]
    found = protocols.evaluate_regdb(
        arrays[f"{query}_feat"].astype(dtype),
        arrays[f"{query}_id"],
        arrays[f"{gallery}_feat"].astype(dtype),
        arrays[f"{gallery}_id"],
        cmc=level,
        distance=distance,
    )
    scores = {**wanted[f"{level}_level_cmc"], "mAP": wanted["mAP"], "mINP": wanted["mINP"]}
    assert_equal(found.mean, scores, TOLERANCE[dtype])
    assert found.per_trial == (found.mean,)
    assert (found.n_query, found.n_valid, found.gallery_size) == (2060, 2060, 2060)
    assert found.cmc_level == level


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_settings_of_regdb_equal_the_golden_values(dtype: type) -> None:
    arrays, expected = golden("regdb")
    sides = [arrays[f"{one}_{key}"] for one in ("thermal", "visible") for key in ("feat", "id")]
    sides = [each.astype(dtype) if each.ndim == 2 else each for each in sides]
    found = protocols.evaluate_regdb_settings(*sides)
    assert list(found) == ["thermal_to_visible", "visible_to_thermal"]
    for direction, levels in found.items():
        wanted = expected[direction]["cosine"]
        assert list(levels) == ["image", "identity"]
        for level, result in levels.items():
            scores = {**wanted[f"{level}_level_cmc"], "mAP": wanted["mAP"], "mINP": wanted["mINP"]}
            assert_equal(result.mean, scores, TOLERANCE[dtype])
            assert (result.cmc_level, result.n_valid, result.gallery_size) == (level, 2060, 2060)


@given(
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    distance=st.sampled_from(["cosine", "euclidean"]),
    reranked=st.booleans(),
    widest=st.sampled_from([16 * 32, 16 * 32 - 1]),
    product=st.sampled_from([1, 5, 100]),
)
def test_regdb_settings_are_each_direction_and_level_alone(
    seed: int, ties: bool, distance: Any, reranked: bool, widest: int, product: int
) -> None:
    # Exact products and means, as in the test of streaming, so that a bit that differs is an error; the matrix has
    # `widest` pairs, or one more.
    rng = np.random.default_rng(seed)
    t_feat, v_feat = (rng.choice(np.float32([-1, 1]), (n, 16)) for n in (16, 32))
    t_feat, v_feat = (feat[rng.integers(0, 6, len(feat))] if ties else feat for feat in (t_feat, v_feat))
    thermal, visible = (t_feat, np.arange(16) % 5), (v_feat, np.arange(32) % 4)
    options: dict[str, Any] = {"distance": "cosine", "rerank": RERANK} if reranked else {"distance": distance}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "WIDEST_PRODUCT", widest)
        patch.setattr(similarity, "_PRODUCT_PAIRS", 1)
        patch.setattr(similarity, "_PRODUCT_ROWS", product)
        found = protocols.evaluate_regdb_settings(*thermal, *visible, **options)
    for direction, sides in (
        ("thermal_to_visible", (*thermal, *visible)),
        ("visible_to_thermal", (*visible, *thermal)),
    ):
        for level, result in found[direction].items():
            assert_same_bits(result, protocols.evaluate_regdb(*sides, cmc=level, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_features_tie_in_both_directions_of_one_product(dtype: type) -> None:
    generator = np.random.default_rng(0)
    alike = np.tile(generator.normal(size=100), (53, 1)).astype(dtype)
    others = generator.normal(size=(33, 100)).astype(dtype)
    for sides, direction in (
        ((others, np.full(33, 20), alike, np.arange(53)), "thermal_to_visible"),
        ((alike, np.arange(53), others, np.full(33, 20)), "visible_to_thermal"),
    ):
        result = protocols.evaluate_regdb_settings(*sides)[direction]["image"]
        assert result.cmc[19] == 0 and result.cmc[20] == 1
        assert result.mean["mAP"] == pytest.approx(1 / 21)


@given(st.integers(0, 2**32 - 1))
def test_sysu_equals_the_slow_loops(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_query, n_pool = 7, 16
    q_feat, g_feat = generator.normal(size=(n_query, 4)), generator.normal(size=(n_pool, 4))
    q_pids, g_pids = generator.integers(0, 4, n_query), generator.integers(0, 4, n_pool)
    q_camids, g_camids = generator.choice([3, 6], n_query), generator.choice([1, 2, 4, 5], n_pool)
    galleries = np.stack([generator.permutation(n_pool)[:9] for _ in range(3)])
    expected = []
    for gallery in galleries:
        gallery = np.sort(gallery)
        expected.append(
            oracles.retrieval(
                cosine(q_feat, g_feat[gallery]),
                q_pids.tolist(),
                g_pids[gallery].tolist(),
                lambda q, g, gallery=gallery: q_camids[q] == 3 and g_camids[gallery[g]] == 2,
                ranks=20,
            )
        )
    arguments = q_feat, q_pids, q_camids, g_feat, g_pids, g_camids, galleries
    if None in expected:
        with pytest.raises(StudyError, match=rf"SYSU-MM01: none .* \(trial {expected.index(None)}\)"):
            protocols.evaluate_sysu(*arguments)
        return
    found = protocols.evaluate_sysu(*arguments, ranks=20)
    for trial, wanted in zip(found.per_trial, expected, strict=True):
        cmc = {f"cmc{rank}": wanted["cmc"][rank - 1] for rank in (1, 5, 10, 20)}
        assert_equal(trial, {**cmc, "mAP": wanted["mAP"], "mINP": wanted["mINP"]}, 1e-12)
    np.testing.assert_allclose(found.cmc, np.mean([wanted["cmc"] for wanted in expected], axis=0), atol=1e-12)
    assert found.n_valid_per_trial == tuple(wanted["n_valid"] for wanted in expected)
    assert found.n_valid == min(found.n_valid_per_trial)


def along(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: the cosine distance to `along(0)` rises with the angle."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def sysu_case(q_camid: int, g_camids: list[int], g_pids: list[int]) -> ProtocolResult:
    """One query of identity 1 against a gallery at rising distance."""
    n_gallery = len(g_pids)
    return protocols.evaluate_sysu(
        along(0),
        np.array([1]),
        np.array([q_camid]),
        along(*range(10, 10 + n_gallery)),
        np.array(g_pids),
        np.array(g_camids),
        np.arange(n_gallery)[None],
    )


def test_camera_3_query_ignores_camera_2_gallery_images_of_every_identity() -> None:
    # Left are 9 (camera 1) and 1 (camera 4): the match is second, AP 1/2.
    result = sysu_case(3, g_camids=[2, 2, 1, 4], g_pids=[8, 1, 9, 1])
    assert result.mean == pytest.approx({"cmc1": 0, "cmc5": 1, "cmc10": 1, "cmc20": 1, "mAP": 1 / 2, "mINP": 1 / 2})


def test_camera_6_query_keeps_camera_2_gallery_images() -> None:
    # Matches at 2 and 4 of four images: AP = (1/2 + 2/4) / 2, INP = 2/4.
    result = sysu_case(6, g_camids=[2, 2, 1, 4], g_pids=[8, 1, 9, 1])
    assert result.mean == pytest.approx({"cmc1": 0, "cmc5": 1, "cmc10": 1, "cmc20": 1, "mAP": 1 / 2, "mINP": 1 / 2})
    assert result.cmc[:3].tolist() == [0, 1, 1]


def test_camera_3_query_with_matches_in_camera_2_only_is_skipped() -> None:
    with pytest.raises(StudyError, match="none of the 1 queries has a match"):
        sysu_case(3, g_camids=[2, 1], g_pids=[1, 9])


def test_sysu_ranks_count_identities_and_not_images() -> None:
    # Five images of one other identity stand first: rank 2 by identity, so cmc5 is 1 and mAP 1/6.
    result = sysu_case(6, g_camids=[1] * 6, g_pids=[9, 9, 9, 9, 9, 1])
    assert (result.mean["cmc1"], result.mean["cmc5"], result.mean["mAP"]) == pytest.approx((0, 1, 1 / 6))
    assert result.cmc[:2].tolist() == [0, 1]


def test_regdb_removes_nothing_and_counts_images() -> None:
    # The same six images: rank 6 by image.
    arguments = along(0), np.array([1]), along(*range(10, 16)), np.array([9, 9, 9, 9, 9, 1])
    result = protocols.evaluate_regdb(*arguments)
    assert (result.mean["cmc5"], result.mean["cmc10"]) == (0, 1)
    assert protocols.evaluate_regdb(*arguments, cmc="identity").mean["cmc5"] == 1


def test_score_is_the_unweighted_mean_over_trials_and_n_valid_the_fewest() -> None:
    # Trial 0 holds matches of both queries, at ranks 1 and 2; trial 1 of the first query only, at rank 2.
    result = protocols.evaluate_sysu(
        along(0, 0),
        np.array([1, 2]),
        np.array([6, 6]),
        along(10, 20, 5),
        np.array([1, 2, 9]),
        np.array([1, 1, 1]),
        np.array([[0, 1], [0, 2]]),
    )
    assert [trial["cmc1"] for trial in result.per_trial] == [1 / 2, 0]
    assert result.mean["cmc1"] == 1 / 4
    assert result.mean["mAP"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert (result.n_valid, result.n_valid_per_trial, result.n_query) == (1, (2, 1), 2)
    kept = {key: values.tolist() for key, values in result.per_query.items()}
    assert kept == {"index": [0, 1], "cmc1": [1 / 2, 0], "ap": [3 / 4, 1 / 2]}  # the second over trial 0 alone


@given(st.integers(0, 2**32 - 1))
def test_scores_per_query_are_those_of_each_query_alone_averaged_over_the_galleries(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_query, n_pool = 6, 16
    q_feat, g_feat = generator.normal(size=(n_query, 4)), generator.normal(size=(n_pool, 4))
    q_pids = np.append(generator.integers(0, 3), generator.integers(0, 5, n_query - 1))  # the first has a match always
    g_pids = np.append(generator.integers(0, 4, n_pool - 3), [0, 1, 2])
    q_camids, g_camids = generator.choice([3, 6], n_query), np.append(generator.choice([1, 2], n_pool - 3), [1, 1, 1])
    galleries = np.stack([np.append(generator.permutation(n_pool - 3)[:6], [13, 14, 15]) for _ in range(3)])
    wanted: dict[int, tuple[float, float]] = {}
    for query in range(n_query):
        alone = []
        for gallery in np.sort(galleries):
            left = [g for g in gallery if not (q_camids[query] == 3 and g_camids[g] == 2)]
            distances = cosine(q_feat[query : query + 1], g_feat[left])
            alone.append(oracles.retrieval(distances, [int(q_pids[query])], g_pids[left].tolist(), ranks=1))
        found = [(one["cmc"][0], one["mAP"]) for one in alone if one is not None]
        if found:
            wanted[query] = tuple(sum(one) / len(found) for one in zip(*found, strict=True))
    arguments = q_feat, q_pids, q_camids, g_feat, g_pids, g_camids, galleries
    kept = protocols.evaluate_sysu(*arguments).per_query
    assert kept["index"].tolist() == list(wanted)
    np.testing.assert_allclose(np.stack([kept["cmc1"], kept["ap"]], axis=1), list(wanted.values()), atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_means_over_queries_are_the_printed_scores_on_the_protocols_galleries(setting: str) -> None:
    arrays, _ = golden("sysu_mini")
    found = protocols.evaluate_sysu(*sysu_sides(arrays, np.float32), arrays[f"gallery_{setting}"])
    assert len(found.per_query["index"]) == found.n_valid
    for key, metric in (("cmc1", "cmc1"), ("ap", "mAP")):
        assert found.per_query[key].mean() == pytest.approx(found.mean[metric], abs=1e-12)


def test_a_gallery_shorter_than_20_holds_its_last_cmc_value() -> None:
    result = sysu_case(6, g_camids=[1, 1], g_pids=[9, 1])
    assert (result.mean["cmc1"], result.mean["cmc20"]) == (0, 1)
    assert len(result.cmc) == 50
    assert result.cmc.tolist() == [0] + [1] * 49


def test_order_within_a_trial_does_not_matter_and_ties_go_to_the_lower_pool_index() -> None:
    feat, pids, camids = np.tile(along(30), (9, 1)), np.arange(9), np.ones(9, dtype=int)
    forward, backward = np.arange(9)[None], np.arange(9)[None, ::-1]
    for galleries in (forward, backward):
        result = protocols.evaluate_sysu(along(0), np.array([2]), np.array([6]), feat, pids, camids, galleries)
        assert result.cmc[:4].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_equal_gallery_features_tie_whatever_the_matrix_product_rounds(distance: Any, dtype: type) -> None:
    generator = np.random.default_rng(0)
    feat = np.tile(generator.normal(size=100), (53, 1)).astype(dtype)
    query = generator.normal(size=(33, 100)).astype(dtype)
    pids = np.arange(53)
    result = protocols.evaluate_regdb(query, np.full(33, 20), feat, pids, distance=distance)
    assert result.cmc[19] == 0 and result.cmc[20] == 1
    assert result.mean["mAP"] == pytest.approx(1 / 21)


def test_cosine_distance_normalises_features_of_any_length() -> None:
    arrays, _ = golden("sysu_mini")
    q_feat, *middle = sysu_sides(arrays, np.float64)
    g_feat, galleries = middle[2], arrays["gallery_all_1"]
    plain = protocols.evaluate_sysu(q_feat, *middle, galleries)
    scale = np.float64(2.0) ** np.random.default_rng(0).integers(-600, 600, (len(g_feat), 1))  # squares overflow
    middle[2] = g_feat * scale
    assert_equal_results(protocols.evaluate_sysu(q_feat * 2.0**300, *middle, galleries), plain)


def test_euclidean_distance_in_float32_survives_a_far_origin() -> None:
    generator = np.random.default_rng(0)
    q_feat = (generator.integers(-64, 64, (20, 8)) / 64 + 1000).astype(np.float32)  # exact in float32, as is the shift
    g_feat = (generator.integers(-64, 64, (60, 8)) / 64 + 1000).astype(np.float32)
    q_pids, g_pids = np.arange(20) % 5, np.arange(60) % 5
    far = protocols.evaluate_regdb(q_feat, q_pids, g_feat, g_pids, distance="euclidean")
    exact = [[float(((a - b) ** 2).sum()) for b in g_feat.astype(float)] for a in q_feat.astype(float)]
    expected = oracles.retrieval(exact, q_pids.tolist(), g_pids.tolist(), level="image", ranks=50)
    assert far.mean["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)  # exact ties may be rounded apart
    assert far.mean["cmc1"] == pytest.approx(expected["cmc"][0], abs=0.051)


def test_a_zero_feature_is_ranked_and_not_an_error() -> None:
    result = protocols.evaluate_regdb(along(0), np.array([1]), np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([9, 1]))
    assert result.mean["cmc1"] == 1


def assert_same_bits(found: ProtocolResult, expected: ProtocolResult) -> None:
    for name, value in {**vars(expected), **expected.per_query}.items():
        if name != "per_query":
            np.testing.assert_array_equal({**vars(found), **found.per_query}[name], value)


@pytest.mark.parametrize("name", ["sysu_mini"])
def test_perfect_features_score_one_in_every_setting(name: str) -> None:
    arrays, _ = golden(name)
    one_hot = np.eye(1 + max(arrays["q_id"].max(), arrays["g_id"].max()), dtype=np.float32)
    results = protocols.evaluate_sysu_settings(
        one_hot[arrays["q_id"]],
        arrays["q_id"],
        arrays["q_cam"],
        one_hot[arrays["g_id"]],
        arrays["g_id"],
        arrays["g_cam"],
        {setting: arrays[f"gallery_{setting}"] for setting in SETTINGS},
    )
    for result in results.values():
        assert set(result.mean.values()) == {1.0}


def test_blocks_of_queries_give_the_same_scores_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, _ = golden("sysu_mini")
    sides, galleries = sysu_sides(arrays, np.float64), arrays["gallery_indoor_10"]
    whole = protocols.evaluate_sysu(*sides, galleries)
    monkeypatch.setattr(metrics, "BLOCK", 7 * 460)
    assert_equal_results(protocols.evaluate_sysu(*sides, galleries), whole)


@given(
    seed=st.integers(0, 2**32 - 1),
    product=st.sampled_from([1, 2, 5, 29, 100]),
    block=st.sampled_from([1, 2, 5, 29, 100]),
    ties=st.booleans(),
    distance=st.sampled_from(["cosine", "euclidean"]),
)
@settings(max_examples=20)
def test_a_streamed_distance_matrix_gives_the_bits_of_the_whole_one(
    seed: int, product: int, block: int, ties: bool, distance: Any
) -> None:
    # Coordinates of 1 and -1 in 16 dimensions: unit vectors of quarters, and 32 images whose mean has 5 binary digits,
    # so that every product is exact and a bit that differs is an error of the blocks. `product` and `block` count rows.
    rng = np.random.default_rng(seed)
    q_feat, g_feat = (rng.choice(np.float32([-1, 1]), (n, 16)) for n in (29, 32))
    g_feat = g_feat[rng.integers(0, 6, 32)] if ties else g_feat
    q_pids, g_pids = rng.integers(0, 5, 29), rng.integers(0, 4, 32)
    q_camids, g_camids = rng.choice([3, 6], 29), rng.choice([1, 2, 4, 5], 32)
    q_pids[:5], q_camids[:5] = np.arange(5), 6  # a match in every gallery
    galleries = rng.permutation(32).reshape(4, 8)  # of all images, for the sake of the mean

    def scores() -> list[ProtocolResult]:
        sides = q_feat, q_pids, q_camids, g_feat, g_pids, g_camids
        return [
            protocols.evaluate_sysu(*sides, galleries, distance=distance),
            protocols.evaluate_regdb(q_feat, q_pids, g_feat, g_pids, distance=distance),
        ]

    whole = scores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_PRODUCT_PAIRS", 1)
        patch.setattr(similarity, "_PRODUCT_ROWS", product)
        patch.setattr(metrics, "BLOCK", 32 * block)
        for found, expected in zip(scores(), whole, strict=True):
            assert_same_bits(found, expected)


@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([1, 2, 5, 29, 100]))
@settings(max_examples=10)
def test_the_block_that_is_ranked_at_once_changes_no_bit_of_any_score(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    q_feat, g_feat = (rng.standard_normal((n, 33), dtype=np.float32) for n in (29, 40))
    q_pids, g_pids = np.arange(29) % 6, np.arange(40) % 5
    whole = protocols.evaluate_regdb(q_feat, q_pids, g_feat, g_pids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK", 40 * block)
        assert_same_bits(protocols.evaluate_regdb(q_feat, q_pids, g_feat, g_pids), whole)


def test_a_large_gallery_takes_the_memory_of_its_features_and_a_block_not_of_the_distance_matrix() -> None:
    rng = np.random.default_rng(0)
    feat, pids = rng.standard_normal((20_000, 8), dtype=np.float32), np.arange(20_000) % 5_000
    tracemalloc.start()
    try:
        protocols.evaluate_regdb(feat[:600], pids[:600], feat, pids)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    product, ranking = 4 * 256 * 20_000, 8 * metrics.BLOCK
    assert taken < 2 * product + 6 * ranking < 4 * 600 * 20_000 * 4


def test_inputs_are_unchanged_and_tensors_score_as_arrays_do() -> None:
    arrays, _ = golden("sysu_mini")
    sides, galleries = sysu_sides(arrays, np.float32), arrays["gallery_all_1"]
    copies = [part.copy() for part in (*sides, galleries)]
    first = protocols.evaluate_sysu(*sides, galleries)
    for part, copy in zip((*sides, galleries), copies, strict=True):
        np.testing.assert_array_equal(part, copy)
    tensors = [torch.from_numpy(part) for part in (*sides, galleries)]
    assert_equal_results(protocols.evaluate_sysu(*tensors), first)


def test_a_result_is_plain_json() -> None:
    result = sysu_case(6, g_camids=[1, 1], g_pids=[9, 1])
    per_query = {key: values.tolist() for key, values in result.per_query.items()}
    curves = {"cmc": result.cmc.tolist(), "cmc_range": result.cmc_range.tolist()}
    record = {**vars(result), **curves, "per_query": per_query}
    assert json.loads(json.dumps(record, allow_nan=False))["mean"] == result.mean


def test_within_one_camera_an_image_ignores_only_itself() -> None:
    # At 0, 1, 10 with identities 1, 2, 1: from 0 the match is second, from 10 too; 1 has no match and is skipped.
    result = protocols.within_modality(along(0, 1, 10), np.array([1, 2, 1]), np.array([4, 4, 4]))
    assert (result.n_query, result.n_valid, result.gallery_size) == (3, 2, 3)
    assert (result.mean["cmc1"], result.mean["mAP"]) == pytest.approx((0, 1 / 2))


def test_within_several_cameras_an_image_ignores_its_identity_in_its_own_camera() -> None:
    # Identity 1 at 0 and 1 (camera 1) and 20 (camera 2), identity 2 at 10 (camera 1). The queries at 0 and 1 ignore
    # each other and see 10 then 20, AP 1/2; query 20 sees 10, 1, 0: AP = (1/2 + 2/3) / 2. Identity 2 has no match.
    result = protocols.within_modality(along(0, 1, 20, 10), np.array([1, 1, 1, 2]), np.array([1, 1, 2, 1]))
    assert result.n_valid == 3
    assert result.mean["mAP"] == pytest.approx((1 / 2 + 1 / 2 + 7 / 12) / 3)
    assert result.mean["cmc1"] == 0
    assert result.cmc[1] == 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_within_modality_equals_the_slow_loops(seed: int, n_cameras: int) -> None:
    generator = np.random.default_rng(seed)
    feat, pids = generator.normal(size=(12, 3)), np.arange(12) % 3
    camids = np.append(generator.integers(0, n_cameras, 12 - n_cameras), np.arange(n_cameras))

    def ignored(q: int, g: int) -> bool:
        return q == g if n_cameras == 1 else bool(pids[q] == pids[g] and camids[q] == camids[g])

    expected = oracles.retrieval(cosine(feat, feat), pids.tolist(), pids.tolist(), ignored, "image", ranks=50)
    if expected is None:
        return
    found = protocols.within_modality(feat, pids, camids)
    assert found.mean["mAP"] == pytest.approx(expected["mAP"], abs=1e-12)
    np.testing.assert_allclose(found.cmc, expected["cmc"], atol=1e-12)
    assert found.n_valid == expected["n_valid"]


def test_chance_level_is_the_share_of_matches_among_the_images_left() -> None:
    q_pids, q_camids = np.array([1, 1, 2, 7]), np.array([3, 6, 6, 6])
    g_pids, g_camids = np.array([1, 1, 2, 3, 3]), np.array([1, 2, 2, 2, 4])
    # Trial 0, all five images: camera 3 is left with 1 (camera 1) and 3 (camera 4): 1/2; camera 6: 2/5 and 1/5.
    # Trial 1, images 0, 1, 3: camera 3 is left with image 0: 1; camera 6: 2/3; identity 2 has no match. 7 never has.
    galleries = np.array([[0, 1, 3]])
    first = protocols.chance_rank1(q_pids, q_camids, g_pids, g_camids, np.arange(5)[None])
    second = protocols.chance_rank1(q_pids, q_camids, g_pids, g_camids, galleries)
    assert first == pytest.approx((1 / 2 + 2 / 5 + 1 / 5) / 3)
    assert second == pytest.approx((1 + 2 / 3) / 2)


def test_random_features_score_about_the_chance_level() -> None:
    arrays, _ = golden("sysu_mini")
    generator = np.random.default_rng(0)
    q_feat, q_pids, q_camids, g_feat, g_pids, g_camids = sysu_sides(arrays, np.float32)
    galleries = arrays["gallery_indoor_1"]
    noise = generator.normal(size=(len(q_feat), 64)), generator.normal(size=(len(g_feat), 64))
    found = protocols.evaluate_sysu(noise[0], q_pids, q_camids, noise[1], g_pids, g_camids, galleries)
    chance = protocols.chance_rank1(q_pids, q_camids, g_pids, g_camids, galleries)
    # About 2,000 query-trials at a chance of some 5 %: a standard error of half a point, and four of them.
    assert found.mean["cmc1"] == pytest.approx(chance, abs=0.02)


Pool = tuple[np.ndarray, np.ndarray, list[str]]


def pool_of(images: dict[tuple[int, int], int], seed: int) -> Pool:
    """Identities, cameras and paths of a pool with so many images per (identity, camera), in no particular order."""
    rows = [(pid, cam, f"cam{cam}/{pid:04d}/{n}.jpg") for (pid, cam), count in images.items() for n in range(count)]
    random.Random(seed).shuffle(rows)
    pids, camids, paths = zip(*rows, strict=True)
    return np.array(pids), np.array(camids), list(paths)


def drawn_as_published(paths: list[str], cameras: tuple[str, ...], trial: int) -> list[str]:
    """The convention as the other code base words it: folders, listed names, one global generator."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    state = random.getstate()
    try:
        random.seed(trial)
        chosen = []
        for identity in sorted({path.split("/")[1] for path in paths}):
            for camera in cameras:
                if f"{camera}/{identity}" in folders:
                    chosen.append(random.choice(sorted(folders[f"{camera}/{identity}"])))
    finally:
        random.setstate(state)
    return chosen


@given(st.integers(0, 2**32 - 1))
def test_random_seed_galleries_are_those_of_the_global_generator_over_sorted_folders(seed: int) -> None:
    generator = random.Random(seed)
    images = {(pid, cam): generator.randint(0, 13) for pid in (3, 20, 101, 7) for cam in (1, 2, 4, 5)}
    pids, camids, paths = pool_of({**images, (3, 1): 12, (20, 2): 1}, seed)
    found = protocols.random_seed_galleries(pids, camids, paths)
    assert set(found) == {"all_single", "indoor_single"}
    for name, cameras in (("all_single", ("cam1", "cam2", "cam4", "cam5")), ("indoor_single", ("cam1", "cam2"))):
        assert len(found[name]) == 10
        for trial, gallery in enumerate(found[name]):
            wanted = drawn_as_published(paths, cameras, trial)
            assert gallery.tolist() == sorted(paths.index(path) for path in wanted)


def test_the_draws_of_the_first_seeds_are_the_known_ones() -> None:
    # random.seed(0) and choices among ten give 6 6 0 4 8 7 6 4, random.seed(1) 2 9 1 4 1 7 7 7, in every Python 3.
    pids, camids, paths = pool_of({(pid, cam): 10 for pid in (1, 2) for cam in (1, 2, 4, 5)}, 5)
    found = protocols.random_seed_galleries(pids, camids, paths, trials=2)

    def numbers(name: str, trial: int) -> list[int]:
        rows = sorted((pids[row], camids[row], int(paths[row][-5])) for row in found[name][trial])
        return [number for _, _, number in rows]

    assert numbers("all_single", 0) == [6, 6, 0, 4, 8, 7, 6, 4]
    assert numbers("all_single", 1) == [2, 9, 1, 4, 1, 7, 7, 7]
    assert numbers("indoor_single", 0) == [6, 6, 0, 4]
    assert numbers("indoor_single", 1) == [2, 9, 1, 4]


def test_drawing_galleries_leaves_the_callers_generator_alone() -> None:
    pool = pool_of({(1, 1): 3, (1, 4): 3}, 0)
    state = random.getstate()
    bare(protocols.random_seed_galleries)(*pool, trials=1)  # the shape check draws from the generator itself
    assert random.getstate() == state


RERANK = Rerank(k1=8, k2=3, lambda_value=0.3)


@pytest.mark.parametrize("setting", ["all_1", "indoor_10"])
def test_each_trial_is_reranked_within_its_own_queries_and_gallery(setting: str) -> None:
    arrays, _ = golden("sysu_mini")
    q_feat, q_pids, q_camids, g_feat, g_pids, g_camids = sides = sysu_sides(arrays, np.float64)
    galleries = arrays[f"gallery_{setting}"][:3]
    found = protocols.evaluate_sysu(*sides, galleries, rerank=RERANK)
    for trial, gallery in zip(found.per_trial, np.sort(galleries, axis=1), strict=True):
        distmat = rerank(q_feat, g_feat[gallery], RERANK.k1, RERANK.k2, RERANK.lambda_value)
        ignored = (q_camids[:, None] == 3) & (g_camids[gallery] == 2)
        wanted = metrics.retrieval_metrics(distmat, q_pids, g_pids[gallery], ignore=ignored)
        assert (trial["mAP"], trial["mINP"]) == pytest.approx((wanted.mAP, wanted.mINP), abs=1e-12)
        for rank in (1, 5, 10, 20):
            assert trial[f"cmc{rank}"] == pytest.approx(wanted.cmc[rank - 1], abs=1e-12)
    plain = protocols.evaluate_sysu(*sides, galleries)
    assert (found.n_valid, found.n_query, found.gallery_size) == (plain.n_valid, plain.n_query, plain.gallery_size)
    assert found.mean["mAP"] != plain.mean["mAP"]


def test_reranking_with_all_weight_on_the_distance_changes_no_score() -> None:
    arrays, _ = golden("sysu_mini")
    sides, galleries = sysu_sides(arrays, np.float64), arrays["gallery_all_1"][:2]
    found = protocols.evaluate_sysu(*sides, galleries, rerank=Rerank(20, 6, 1.0))
    assert_equal_results(found, protocols.evaluate_sysu(*sides, galleries))


@pytest.mark.parametrize("level", ["image", "identity"])
def test_regdb_is_reranked_within_all_its_queries_and_its_gallery(level: Any) -> None:
    arrays, _ = golden("regdb")
    some = slice(0, 2060, 9)
    query, gallery = ((arrays[f"{m}_feat"][some], arrays[f"{m}_id"][some]) for m in ("thermal", "visible"))
    found = protocols.evaluate_regdb(*query, *gallery, cmc=level, rerank=RERANK)
    distmat = rerank(query[0], gallery[0], RERANK.k1, RERANK.k2, RERANK.lambda_value)
    wanted = metrics.retrieval_metrics(distmat, query[1], gallery[1], cmc=level)
    assert found.mean["mAP"] == pytest.approx(wanted.mAP, abs=1e-12)
    assert found.mean["cmc5"] == pytest.approx(wanted.cmc[4], abs=1e-12)


Q = along(0, 5), np.array([1, 2]), np.array([3, 6])
G = along(1, 2, 3), np.array([1, 2, 3]), np.array([1, 4, 5])
T = np.array([[0, 1], [0, 2]])
NAN = np.array([[1.0, 0.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: protocols.evaluate_sysu(*G, *Q, T[:, :1]), "camera 1, .*query and gallery may be swapped"),
        (lambda: protocols.evaluate_sysu(*Q, G[0], G[1], np.array([1, 6, 1]), T), "gallery image is of camera 6"),
        (lambda: protocols.evaluate_sysu(*Q, *G, T + 1), "indices from 1 to 3 and the pool 3 images"),
        (lambda: protocols.evaluate_sysu(*Q, *G, T - 1), "indices from -1 to 1"),
        (
            lambda: protocols.evaluate_sysu(*Q, *G, np.array([[0, 1], [2, 2]])),
            "trial 1 of SYSU-MM01 lists an image twice",
        ),
        (lambda: protocols.evaluate_sysu(*Q, *G, T[:0]), r"at least one of each, found int64 \(0, 2\)"),
        (lambda: protocols.evaluate_sysu_settings(*Q, *G, {}), "no setting to evaluate"),
        (lambda: protocols.evaluate_sysu_settings(*Q, *G, {"a": T, "b": T[:, 1:]}), r"b: none .* \(trial 1\)"),
        (lambda: protocols.evaluate_sysu(NAN, *Q[1:], *G, T), "q_feat has NaN or infinite values, first in row 1 of 2"),
        (
            lambda: protocols.evaluate_sysu(*Q, *G, T, distance="euclidean", rerank=RERANK),
            "re-ranking starts from the cosine distance, found 'euclidean'",
        ),
        (lambda: bare(protocols.random_seed_galleries)(*G[1:], ["a.jpg"]), "one entry per image, 3, found 1"),
        (
            lambda: protocols.random_seed_galleries(G[1][1:], G[2][1:], ["b.jpg", "c.jpg"]),
            r"indoor search has no image of cameras \(1, 2\)",
        ),
        (lambda: protocols.evaluate_sysu(*Q, *G, T, ranks=0), "at least one rank, found ranks=0"),
        (lambda: protocols.evaluate_regdb(*Q[:2], along(1), np.array([9])), "RegDB: none of the 2 queries"),
        (
            lambda: protocols.evaluate_regdb(*Q[:2], along()[:0], np.array([], int)),
            "2 queries against 0 gallery images",
        ),
        (lambda: protocols.within_modality(*Q), "within one modality: none of the 2 queries"),
        (lambda: protocols.chance_rank1(*Q[1:], *G[1:], np.array([[2]])), "no query has a match .* trial 0"),
        (lambda: bare(protocols.evaluate_regdb)(*Q[:2], np.ones((3, 5)), G[1]), "2 dimensions and gallery features 5"),
        (
            lambda: bare(similarity.streamed)(similarity.Images(*Q[:2]), similarity.Images(*G[:2]), "l2"),
            "'cosine' or 'euclidean', found 'l2'",
        ),
        (
            lambda: bare(protocols.evaluate_regdb)(Q[0], np.array([1]), *G[:2]),
            "q_pids must have one entry per image, 2",
        ),
    ],
)
def test_a_wrong_evaluation_is_refused_with_a_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        call()


def test_a_camera_pair_is_scored_as_its_images_alone_would_be():
    rng = np.random.default_rng(5)
    q_pids, g_pids = rng.integers(0, 5, 40), rng.integers(0, 5, 60)
    q_camids, g_camids = rng.choice([3, 6], 40), rng.choice([1, 2, 4, 5], 60)
    g_pids[g_camids == 5] = 9  # nobody who is asked for
    q_feat, g_feat = rng.normal(size=(40, 8)), rng.normal(size=(60, 8))
    pairs = protocols.camera_pairs(q_feat, q_pids, q_camids, g_feat, g_pids, g_camids)
    assert [(pair["query_camera"], pair["gallery_camera"]) for pair in pairs] == [
        (query, gallery) for query in (3, 6) for gallery in (1, 2, 4)
    ]
    for pair in pairs:
        query, gallery = q_camids == pair["query_camera"], g_camids == pair["gallery_camera"]
        a, b = (feat / np.linalg.norm(feat, axis=1, keepdims=True) for feat in (q_feat[query], g_feat[gallery]))
        alone = metrics.retrieval_metrics(1 - a @ b.T, q_pids[query], g_pids[gallery], cmc="image")
        assert pair["mAP"] == pytest.approx(alone.mAP) and pair["cmc1"] == pytest.approx(alone.cmc[0])
        assert (pair["n_query"], pair["n_valid"], pair["gallery_size"]) == (query.sum(), alone.n_valid, gallery.sum())


def test_the_range_of_the_cmc_is_that_of_the_single_trials():
    rng = np.random.default_rng(6)
    query = rng.normal(size=(20, 6)), rng.integers(0, 6, 20), rng.choice([3, 6], 20)
    pool = rng.normal(size=(48, 6)), np.arange(48) % 6, rng.choice([1, 4, 5], 48)
    galleries = np.stack([rng.permutation(24)[:18], 24 + rng.permutation(24)[:18]])
    both = protocols.evaluate_sysu(*query, *pool, galleries, ranks=6)
    alone = [protocols.evaluate_sysu(*query, *pool, trial[None], ranks=6) for trial in galleries]
    curves = np.array([one.cmc for one in alone])
    np.testing.assert_allclose(both.cmc_range, [curves.min(axis=0), curves.max(axis=0)])
    assert (both.cmc_range[0] < both.cmc_range[1]).any()
    np.testing.assert_array_equal(alone[0].cmc_range, [alone[0].cmc, alone[0].cmc])
