"""Distances and their distributions, the modality gap of Figure 1, the modality probe, ranked lists."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_study import analysis
from danet_study.analysis import (
    best_and_worst_queries,
    distance_distributions,
    distance_matrix,
    identity_gaps,
    modality_gap,
    modality_probe,
    rank_gallery,
)
from danet_study.metrics import retrieval_metrics
from danet_study.protocols import Images


def at_angles(*degrees):
    """Unit vectors in the plane."""
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1)


def features(seed, n=60, ids=6, dim=5):
    """Random features in which every identity has images of both modalities."""
    rng = np.random.default_rng(seed)
    pids, modalities = np.arange(n) % ids * 7 + 3, np.arange(n) // ids % 2
    feat = rng.normal(size=(n, dim)) + pids[:, None] * 0.05 + modalities[:, None] * rng.normal(size=dim)
    order = rng.permutation(n)
    return (feat * rng.lognormal(size=(n, 1)))[order], pids[order], modalities[order]


def slow_distance(a, b, metric):
    return math.dist(a, b) if metric == "euclidean" else 1 - float(a @ b) / (math.hypot(*a) * math.hypot(*b))


def test_distances_of_known_angles_and_a_3_4_5_triangle():
    found = distance_matrix(at_angles(0), 3.0 * np.concatenate([at_angles(0, 60, 90, 180), np.zeros((1, 2))]))
    np.testing.assert_allclose(found, [[0.0, 0.5, 1.0, 2.0, 1.0]], atol=1e-15)  # a zero row is at 1
    found = distance_matrix(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 0.0]]), "euclidean")
    np.testing.assert_array_equal(found, [[5.0, 0.0]])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances_equal_a_slow_loop_and_equal_rows_are_at_zero_exactly(metric):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(13, 7)).astype(np.float32), rng.normal(size=(9, 7)).astype(np.float32)
    slow = [[slow_distance(one.astype(float), other.astype(float), metric) for other in b] for one in a]
    np.testing.assert_allclose(distance_matrix(a, b, metric), slow, rtol=1e-6 if metric == "cosine" else 1e-12)
    assert (np.diag(distance_matrix(a, a, metric)) == 0).all()
    moved = a + np.float32(1e-4) * (np.arange(7) == 0)  # near rows keep their digits
    expected = [
        slow_distance(one.astype(float), other.astype(float), metric) for one, other in zip(a, moved, strict=True)
    ]
    np.testing.assert_allclose(np.diag(distance_matrix(a, moved, metric)), expected, rtol=1e-3, atol=1e-12)
    far = a + 1000  # Euclidean distances do not depend on the origin
    if metric == "euclidean":
        np.testing.assert_allclose(distance_matrix(far, b + 1000, metric), slow, rtol=1e-3)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_four_distributions_equal_a_slow_loop_over_pairs(metric, monkeypatch):
    monkeypatch.setattr(analysis, "_BLOCK", 17)  # several blocks, the last one short
    feat, pids, modalities = features(3)
    found = distance_distributions(feat, pids, modalities, metric=metric, bins=50)
    slow = {kind: [] for kind in analysis.KINDS}
    for i in range(len(feat)):
        for j in range(i + 1, len(feat)):
            identity = "same" if pids[i] == pids[j] else "different"
            modality = "within" if modalities[i] == modalities[j] else "cross"
            slow[f"{identity}_{modality}"].append(slow_distance(feat[i], feat[j], metric))
    for kind, values in slow.items():
        part = found.kinds[kind]
        assert (part.n, part.mean, part.std) == pytest.approx((len(values), np.mean(values), np.std(values)), rel=1e-10)
        expected = np.histogram(values, bins=found.edges, density=True)[0]
        np.testing.assert_allclose(part.density, expected, rtol=1e-12)
        assert part.density @ np.diff(found.edges) == pytest.approx(1.0)
    near, far = found.kinds["same_cross"], found.kinds["different_cross"]
    pooled = math.sqrt((near.std**2 + far.std**2) / 2)
    assert found.separation("same_cross", "different_cross").d_prime == pytest.approx((far.mean - near.mean) / pooled)


def test_separation_of_equal_distant_and_absent_distributions():
    feat, pids, modalities = at_angles(0, 0, 0, 0, 180, 180), np.array([1, 1, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 1])
    found = distance_distributions(feat, pids, modalities)
    assert found.separation("same_within", "same_cross") == pytest.approx((1.0, 0.0))
    assert found.separation("same_cross", "different_cross") == (0.0, math.inf)
    absent = distance_distributions(at_angles(0, 10), np.array([1, 2]), np.array([0, 0]))
    assert absent.kinds["same_cross"].n == 0
    assert math.isnan(absent.separation("same_cross", "different_within").overlap)


def test_modality_gap_of_a_hand_made_case():
    # Visible centers at 0, 20 and 90 degrees; infrared centers at 30, 150 and 95.
    #   pid 1: cross 30; visible others at 20, 90; infrared others at 120, 65.
    #   pid 2: cross 130; visible others at 20, 70; infrared others at 120, 55.
    #   pid 3: cross 5; visible others at 90, 70; infrared others at 65, 55.
    feat, pids = at_angles(0, 20, 90, 30, 150, 95), np.array([1, 2, 3, 1, 2, 3])
    modalities = np.array([0, 0, 0, 1, 1, 1])
    gaps = identity_gaps(feat, pids, modalities)
    np.testing.assert_array_equal(gaps.cross > gaps.nearest, [[True, True, False], [False, True, False]])
    np.testing.assert_array_equal(gaps.neighbors, [[2, 1, 2], [3, 3, 2]])
    np.testing.assert_allclose(gaps.cross, 1 - np.cos(np.deg2rad([30, 130, 5])), atol=1e-12)
    # Only pid 2 exceeds the nearest on both sides; it also exceeds the farthest, hence median and mean.
    assert modality_gap(feat, pids, modalities) == {"nearest": 1 / 3, "median": 1 / 3, "mean": 1 / 3, "n": 3}


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_modality_gap_equals_a_slow_loop(seed):
    feat, pids, modalities = features(seed)
    center = {}
    for pid in sorted(set(pids.tolist())):
        for modality in (0, 1):
            mean = sum(one / math.hypot(*one) for one in feat[(pids == pid) & (modalities == modality)])
            center[pid, modality] = mean / math.hypot(*mean)
    ids, holds = sorted(set(pids.tolist())), {"nearest": [], "median": [], "mean": []}
    for pid in ids:
        cross = 1 - center[pid, 0] @ center[pid, 1]
        others = [[1 - center[pid, m] @ center[q, m] for q in ids if q != pid] for m in (0, 1)]
        for name, of in (("nearest", min), ("median", np.median), ("mean", np.mean)):
            holds[name].append(all(cross > of(side) for side in others))
    expected = {name: np.mean(values) for name, values in holds.items()}
    order = np.random.default_rng(seed).permutation(len(feat))
    for index in (slice(None), order):
        assert modality_gap(feat[index], pids[index], modalities[index]) == pytest.approx({**expected, "n": 6})


def test_centers_are_means_of_normalized_features_and_incomplete_identities_are_left_out():
    feat = np.concatenate([at_angles(0), 100 * at_angles(40), at_angles(20, 90, 90, 5)])
    gaps = identity_gaps(feat, np.array([1, 1, 1, 2, 2, 7]), np.array([0, 0, 1, 0, 1, 1]))
    assert gaps.pids.tolist() == [1, 2]
    np.testing.assert_allclose(gaps.cross, [0, 0], atol=1e-12)  # the center of 0 and 40 degrees points to 20


def people(ids=40, images=6, dim=16, gap=0.0):
    """Features of identities, half of their images infrared and moved by `gap` along one direction."""
    rng = np.random.default_rng(0)
    pids, modalities = np.repeat(np.arange(ids), 2 * images), np.tile(np.repeat([0, 1], images), ids)
    feat = rng.normal(size=(ids, dim))[pids] + 0.1 * rng.normal(size=(len(pids), dim))
    feat[:, 0] += gap * (2 * modalities - 1)
    return feat, pids, modalities


def test_probe_is_at_chance_without_a_gap_and_grows_with_it():
    found = [modality_probe(*people(gap=gap)) for gap in (0.0, 0.3, 0.6, 1.2, 20.0)]
    assert found == sorted(found) and found[0] == pytest.approx(0.5, abs=0.06) and found[-1] == 1.0


def test_probe_ignores_what_does_not_carry_over_to_other_identities():
    # Every identity has a private dimension whose sign is the modality.
    pids, modalities = np.repeat(np.arange(30), 8), np.tile(np.repeat([0, 1], 4), 30)
    feat = np.zeros((len(pids), 30))
    feat[np.arange(len(pids)), pids] = 2.0 * modalities - 1
    assert modality_probe(feat, pids, modalities) == 0.5
    assert modality_probe(np.ones((len(pids), 3)), pids, modalities) == 0.5


def test_probe_equals_ridge_regression_written_out():
    feat, pids, modalities = people(ids=10, gap=0.5)
    unit, right = feat / np.linalg.norm(feat, axis=1, keepdims=True), {0: [], 1: []}
    for fold in range(5):
        train = pids % 5 != fold
        weight = 0.5 / np.where(modalities[train] == 1, modalities[train].sum(), (1 - modalities[train]).sum())
        center = np.average(unit[train], axis=0, weights=weight)
        x = unit[train] - center
        covariance = np.einsum("n,nd,ne->de", weight, x, x)
        ridge = analysis.PROBE_RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        w = np.linalg.inv(covariance + ridge) @ (x.T @ (weight * (2 * modalities[train] - 1)))
        for row in np.flatnonzero(~train):
            right[modalities[row]].append(((unit[row] - center) @ w > 0) == modalities[row])
    assert modality_probe(feat, pids, modalities) == pytest.approx((np.mean(right[0]) + np.mean(right[1])) / 2)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_plane_is_that_of_the_singular_value_decomposition(metric):
    feat = np.random.default_rng(5).normal(size=(40, 7)) * np.arange(1, 8)
    plane = analysis.principal_plane(feat, metric)
    data = feat / np.linalg.norm(feat, axis=1, keepdims=True) if metric == "cosine" else feat
    left, scale, _ = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane.points), np.abs(left[:, :2] * scale[:2]), atol=1e-10)
    np.testing.assert_allclose(plane.explained, scale[:2] ** 2 / (scale**2).sum())


def test_a_ranked_gallery_skips_ignored_images_and_keeps_the_order_of_ties():
    ranked = rank_gallery(np.array([0.3, 0.1, 0.1, 0.2]), 5, np.array([5, 6, 7, 5]), np.array([0, 1, 0, 0], bool))
    assert (ranked.order.tolist(), ranked.right.tolist(), ranked.ignored.tolist()) == ([2, 3, 0], [0, 1, 1], [1])
    assert ranked.average_precision == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert math.isnan(rank_gallery(np.array([0.1]), 1, np.array([2])).average_precision)


def test_best_and_worst_queries_are_the_extremes_with_one_query_per_identity():
    rng = np.random.default_rng(0)
    centers, q_pids, g_pids = rng.normal(size=(8, 6)), rng.integers(0, 8, 40), rng.integers(0, 8, 60)
    query = Images.of(centers[q_pids] + rng.normal(size=(40, 6)), q_pids, rows=100 + np.arange(40))
    gallery = Images.of(centers[g_pids] + rng.normal(size=(60, 6)), g_pids, rows=500 + np.arange(60))
    ignore = rng.random((40, 60)) < 0.2
    ap = retrieval_metrics(distance_matrix(query.feat, gallery.feat), q_pids, g_pids, ignore=ignore).ap
    found = best_and_worst_queries(ap, query, gallery, ignore)
    for end, pick in (("best", max), ("worst", min)):
        extremes = sorted((pick(ap[q_pids == pid]) for pid in np.unique(q_pids)), reverse=end == "best")
        assert [one["ap"] for one in found[end]] == pytest.approx(extremes[:3], abs=1e-6)
        assert len({q_pids[one["row"] - 100] for one in found[end]}) == 3
        for one in found[end]:
            images, row = np.array(one["ranked"]["rows"]) - 500, one["row"] - 100
            assert len(images) == 10 and not ignore[row, images].any()
            assert one["ranked"]["distances"] == sorted(one["ranked"]["distances"])
            assert one["ranked"]["right"] == (g_pids[images] == q_pids[row]).tolist()
            assert one["n_right"] == ((g_pids == q_pids[row]) & ~ignore[row]).sum()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_equal_queries_keep_their_order_and_queries_without_a_match_are_left_out():
    images = Images.of(np.eye(5), np.arange(5))
    ap = np.array([1.0, 1.0, np.nan, 1.0, 1.0])
    found = best_and_worst_queries(ap, images, images, np.zeros((5, 5), dtype=bool))
    assert [one["row"] for one in found["best"]] == [one["row"] for one in found["worst"]] == [0, 1, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda: distance_matrix(np.array([[1.0, 0.0], [np.nan, 0.0]]), at_angles(0)),
        lambda: distance_matrix(at_angles(0), np.array([[1.0, np.inf]]), "euclidean"),
        lambda: modality_gap(at_angles(0, 10), np.array([4, 4]), np.array([0, 1])),  # one identity
        lambda: modality_gap(at_angles(0, 10, 20), np.array([4, 4, 9]), np.array([0, 1, 0])),
        lambda: modality_probe(at_angles(0, 10), np.array([4, 4]), np.array([0, 1])),
        lambda: modality_probe(at_angles(0, 10), np.array([4, 5]), np.array([0, 0])),
    ],
)
def test_what_cannot_be_analyzed_raises_a_value_error(call):
    with pytest.raises(ValueError):
        call()
