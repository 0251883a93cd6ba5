"""Distances, their four distributions, and Figure 1's claim."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core import distances
from danet_core.distances import centre_claim, distance_distributions, distance_matrix, identity_claims
from danet_core.files import StudyError


def at_angles(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    radians = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def features(seed: int, n: int = 60, ids: int = 6, dim: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random features in which every identity has images of both modalities."""
    rng = np.random.default_rng(seed)
    pids = np.arange(n) % ids * 7 + 3
    modalities = np.arange(n) // ids % 2
    feat = rng.normal(size=(n, dim)) + pids[:, None] * 0.05 + modalities[:, None] * rng.normal(size=dim)
    order = rng.permutation(n)
    return (feat * rng.lognormal(size=(n, 1)))[order], pids[order], modalities[order]


def test_cosine_distance_of_known_angles() -> None:
    found = distance_matrix(at_angles(0), 3.0 * at_angles(0, 60, 90, 180))
    np.testing.assert_allclose(found, [[0.0, 0.5, 1.0, 2.0]], atol=1e-15)


def test_euclidean_distance_of_a_3_4_5_triangle_is_not_normalised() -> None:
    found = distance_matrix(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 0.0]]), metric="euclidean")
    np.testing.assert_array_equal(found, [[5.0, 0.0]])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances_equal_a_slow_loop(metric: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(13, 7)), rng.normal(size=(9, 7))
    slow = np.empty((13, 9))
    for i in range(13):
        for j in range(9):
            if metric == "cosine":
                dot = math.fsum(x * y for x, y in zip(a[i], b[j], strict=True))
                slow[i, j] = 1 - dot / (math.hypot(*a[i]) * math.hypot(*b[j]))
            else:
                slow[i, j] = math.dist(a[i], b[j])
    np.testing.assert_allclose(distance_matrix(a, b, metric=metric), slow, rtol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_rows_are_at_distance_zero_exactly_and_near_ones_keep_their_digits(metric: str) -> None:
    base = np.random.default_rng(1).normal(size=(1, 64)) * 1e3
    step = np.zeros((1, 64))
    step[0, 0] = 1e-6
    found = distance_matrix(base, np.concatenate([base, base + step]), metric=metric)
    assert found[0, 0] == 0.0
    if metric == "euclidean":
        np.testing.assert_allclose(found[0, 1], 1e-6, rtol=1e-4)  # |a|^2 + |b|^2 - 2ab would leave nothing of it
    else:
        unit = base[0] / np.linalg.norm(base)
        sideways = 1e-6 / np.linalg.norm(base) * math.sqrt(1 - unit[0] ** 2)  # the part of the step across the ray
        np.testing.assert_allclose(found[0, 1], sideways**2 / 2, rtol=1e-3)


def test_a_feature_of_zeros_is_at_cosine_distance_one_from_everything() -> None:
    zero, other = np.zeros((1, 2)), at_angles(10)
    np.testing.assert_array_equal(distance_matrix(zero, np.concatenate([zero, other])), [[1.0, 1.0]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_cosine_distance_is_symmetric_bounded_and_blind_to_length(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(5, 4)), rng.normal(size=(6, 4))
    found = distance_matrix(a, b)
    assert found.min() >= 0 and found.max() <= 2
    np.testing.assert_allclose(found, distance_matrix(b, a * scale).T, atol=1e-12)


def test_float32_features_are_compared_in_float64_and_left_unchanged() -> None:
    a = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    before = a.copy()
    assert distance_matrix(a, a).dtype == np.float64
    np.testing.assert_array_equal(a, before)


def test_four_distributions_of_a_hand_made_case() -> None:
    # Identity 1: visible at 0 and 60 degrees, infrared at 90. Identity 2: visible at 180.
    feat, pids, modalities = at_angles(0, 60, 90, 180), np.array([1, 1, 1, 2]), np.array([0, 0, 1, 0])
    found = distance_distributions(feat, pids, modalities, bins=4)
    kinds = found.kinds
    assert {name: kind.n for name, kind in kinds.items()} == {
        "same_within": 1,
        "same_cross": 2,
        "different_within": 2,
        "different_cross": 1,
    }
    assert kinds["same_within"].mean == pytest.approx(0.5)  # 0 to 60 degrees
    thirty = 1 - math.cos(math.radians(30))
    assert kinds["same_cross"].mean == pytest.approx((1 + thirty) / 2)  # 0 to 90, 60 to 90
    assert kinds["same_cross"].std == pytest.approx((1 - thirty) / 2)
    assert kinds["different_within"].mean == pytest.approx((2 + 1.5) / 2)  # 0 to 180, 60 to 180
    assert kinds["different_cross"].mean == pytest.approx(1.0)  # 90 to 180
    np.testing.assert_array_equal(found.edges, [0, 0.5, 1, 1.5, 2])
    assert kinds["same_cross"].counts.sum() == 2 and kinds["same_cross"].counts[0] == 1


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_four_distributions_equal_a_slow_loop_over_pairs(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", 17)  # several blocks, the last one short
    feat, pids, modalities = features(3)
    found = distance_distributions(feat, pids, modalities, metric=metric, bins=50)
    slow: dict[str, list[float]] = {kind: [] for kind in distances.KINDS}
    for i in range(len(feat)):
        for j in range(i + 1, len(feat)):
            identity = "same" if pids[i] == pids[j] else "different"
            modality = "within" if modalities[i] == modalities[j] else "cross"
            if metric == "euclidean":
                value = math.dist(feat[i], feat[j])
            else:
                value = 1 - float(feat[i] @ feat[j]) / (math.hypot(*feat[i]) * math.hypot(*feat[j]))
            slow[f"{identity}_{modality}"].append(value)
    for kind, values in slow.items():
        part = found.kinds[kind]
        assert part.n == len(values)
        assert part.mean == pytest.approx(np.mean(values), rel=1e-10)
        assert part.std == pytest.approx(np.std(values), rel=1e-10)
        np.testing.assert_array_equal(part.counts, np.histogram(values, bins=found.edges)[0])
        assert (part.density(found.edges) * np.diff(found.edges)).sum() == pytest.approx(1.0)


def test_separation_of_equal_distributions_is_overlap_one_and_of_distant_ones_zero() -> None:
    feat, pids, modalities = at_angles(0, 0, 0, 0, 180, 180), np.array([1, 1, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 1])
    found = distance_distributions(feat, pids, modalities)
    alike = found.separation("same_within", "same_cross")
    assert (alike.overlap, alike.d_prime) == (1.0, 0.0)
    apart = found.separation("same_cross", "different_cross")
    assert apart.overlap == 0.0 and apart.d_prime == math.inf
    assert found.separation("different_cross", "same_cross").d_prime == -math.inf


def test_d_prime_is_the_gap_of_the_means_over_the_pooled_spread() -> None:
    feat, pids, modalities = features(4)
    found = distance_distributions(feat, pids, modalities)
    near, far = found.kinds["same_cross"], found.kinds["different_cross"]
    pooled = math.sqrt((near.std**2 + far.std**2) / 2)
    assert found.separation("same_cross", "different_cross").d_prime == pytest.approx((far.mean - near.mean) / pooled)


def test_a_kind_without_pairs_has_no_separation() -> None:
    found = distance_distributions(at_angles(0, 10), np.array([1, 2]), np.array([0, 0]))
    assert found.kinds["same_cross"].n == 0
    assert math.isnan(found.separation("same_cross", "different_within").overlap)


def test_figure_1_claim_of_a_hand_made_case() -> None:
    # Visible centres at 0, 20 and 90 degrees; infrared centres at 30, 150 and 95.
    #   pid 1: cross 30; nearest visible 20 away (holds), nearest infrared 65 away (does not).
    #   pid 2: cross 130; nearest visible 20 (holds), nearest infrared 55 (holds).
    #   pid 3: cross 5; nearest visible 70, nearest infrared 55 (neither).
    feat = at_angles(0, 20, 90, 30, 150, 95)
    pids, modalities = np.array([1, 2, 3, 1, 2, 3]), np.array([0, 0, 0, 1, 1, 1])
    claim = identity_claims(feat, pids, modalities)
    np.testing.assert_array_equal(claim.holds_visible, [True, True, False])
    np.testing.assert_array_equal(claim.holds_infrared, [False, True, False])
    np.testing.assert_array_equal(claim.neighbour_visible, [2, 1, 2])
    np.testing.assert_array_equal(claim.neighbour_infrared, [3, 3, 2])
    np.testing.assert_allclose(claim.cross, 1 - np.cos(np.deg2rad([30, 130, 5])), rtol=1e-12)
    assert centre_claim(feat, pids, modalities) == {
        "share": pytest.approx(1 / 3),
        "share_visible": pytest.approx(2 / 3),
        "share_infrared": pytest.approx(1 / 3),
        "n_identities": 3,
    }


def test_centres_are_means_of_normalised_features_so_a_long_feature_weighs_no_more() -> None:
    feat = np.concatenate([at_angles(0), 100 * at_angles(40), at_angles(20, 90, 90)])
    claim = identity_claims(feat, np.array([1, 1, 1, 2, 2]), np.array([0, 0, 1, 0, 1]))
    np.testing.assert_allclose(claim.cross, [0, 0], atol=1e-12)  # the centre of 0 and 40 degrees points to 20


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_figure_1_claim_equals_a_slow_oracle(seed: int) -> None:
    feat, pids, modalities = features(seed)
    claim = identity_claims(feat, pids, modalities)
    centre = {}
    for pid in sorted(set(pids.tolist())):
        for modality in (0, 1):
            rows = [
                feat[i] / math.hypot(*feat[i]) for i in range(len(feat)) if (pids[i], modalities[i]) == (pid, modality)
            ]
            mean = sum(rows) / len(rows)
            centre[pid, modality] = mean / math.hypot(*mean)
    ids = sorted(set(pids.tolist()))
    sides = []
    for modality in (0, 1):
        side = []
        for pid in ids:
            cross = math.dist(centre[pid, 0], centre[pid, 1])  # unit vectors: the same order as the cosine distance
            side.append(cross > min(math.dist(centre[pid, modality], centre[q, modality]) for q in ids if q != pid))
        sides.append(side)
    np.testing.assert_array_equal(claim.holds_visible, sides[0])
    np.testing.assert_array_equal(claim.holds_infrared, sides[1])
    both = np.mean([a and b for a, b in zip(*sides, strict=True)])
    assert centre_claim(feat, pids, modalities)["share"] == pytest.approx(both)


def test_figure_1_claim_does_not_depend_on_the_order_of_the_images() -> None:
    feat, pids, modalities = features(5)
    order = np.random.default_rng(0).permutation(len(feat))
    assert centre_claim(feat, pids, modalities) == centre_claim(feat[order], pids[order], modalities[order])


def test_an_identity_without_an_infrared_image_is_named() -> None:
    with pytest.raises(StudyError, match=r"pid 9 has no infrared image among the 4 features .1 identities lack"):
        centre_claim(at_angles(0, 10, 20, 30), np.array([4, 4, 9, 9]), np.array([0, 1, 0, 0]))


def test_one_identity_alone_is_refused() -> None:
    with pytest.raises(StudyError, match="hold 1; expected at least 2"):
        centre_claim(at_angles(0, 10), np.array([4, 4]), np.array([0, 1]))


def test_bad_input_is_refused_with_a_sentence() -> None:
    good = at_angles(0, 10)
    with pytest.raises(StudyError, match="modality 2 is unknown"):
        distance_distributions(good, np.array([1, 2]), np.array([0, 2]))
    with pytest.raises(StudyError, match="row 1 holds a value that is not finite"):
        distance_matrix(np.array([[1.0, 0.0], [np.nan, 0.0]]), good)
    with pytest.raises(StudyError, match="not finite"):
        distance_matrix(np.array([[1.0, np.inf]]), good, metric="euclidean")


# -------------------- two dimensions


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_plane_is_that_of_the_singular_value_decomposition(metric: str) -> None:
    feat = np.random.default_rng(5).normal(size=(40, 7)) * np.arange(1, 8)
    plane = distances.principal_plane(feat, metric)
    data = feat / np.linalg.norm(feat, axis=1, keepdims=True) if metric == "cosine" else feat
    left, scale, right = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane.points), np.abs(left[:, :2] * scale[:2]), atol=1e-10)
    np.testing.assert_allclose(plane.explained, scale[:2] ** 2 / (scale**2).sum())
    flipped = distances.principal_plane(feat[:, ::-1], metric)  # the sign depends on the axis alone
    np.testing.assert_allclose(flipped.points, plane.points, atol=1e-10)


def test_a_plane_of_equal_features_is_a_point_and_an_unknown_metric_has_none() -> None:
    plane = distances.principal_plane(np.ones((5, 3)))
    np.testing.assert_allclose(plane.points, 0, atol=1e-12)
    with pytest.raises(StudyError, match="'l1'; expected one of cosine, euclidean"):
        inspect.unwrap(distances.principal_plane)(np.ones((5, 3)), "l1")


def test_claims_hold_the_distances_between_centres_and_know_their_identities() -> None:
    generator = np.random.default_rng(6)
    pids, modalities = np.repeat([3, 8, 9], 4), np.tile([0, 0, 1, 1], 3)
    claims = distances.identity_claims(generator.normal(size=(12, 5)), pids, modalities)
    assert np.isinf(claims.between[:, [0, 1, 2], [0, 1, 2]]).all()
    np.testing.assert_array_equal(claims.between[0].min(axis=1), claims.nearest_visible)
    np.testing.assert_array_equal(claims.between[1].min(axis=1), claims.nearest_infrared)
    assert claims.row(8) == 1
    with pytest.raises(StudyError, match=r"identity 4 is not among the 3 test identities \(3 to 9\)"):
        claims.row(4)


@pytest.mark.parametrize("columns", [1, 2, 7, 100])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_blocks_of_the_second_set_give_the_same_distances(columns, metric, monkeypatch):
    # Whole numbers in vectors of length 4: every product is exact, whatever its shape.
    rng = np.random.default_rng(0)
    a, b = (rng.choice([-1.0, 1.0], (n, 16)) for n in (9, 31))
    b[3] = 0
    whole = distance_matrix(a, b, metric)
    monkeypatch.setattr(distances, "_COLUMNS", columns)
    np.testing.assert_array_equal(distance_matrix(a, b, metric), whole)


def test_a_value_that_is_not_finite_is_named_by_its_row_in_a_later_block_too(monkeypatch):
    monkeypatch.setattr(distances, "_COLUMNS", 4)
    feat = np.ones((9, 3))
    feat[6, 1] = np.nan
    with pytest.raises(StudyError, match="feature row 6 "):
        distance_matrix(feat[:1], feat)
