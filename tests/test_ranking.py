"""One query's ranked gallery agrees with the metrics, and the protocol's ignored images are in neither."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danet_core.files import StudyError
from danet_core.metrics import retrieval_metrics
from danet_core.protocols import evaluate_sysu, same_place
from danet_core.ranking import rank_gallery


def test_nearest_first_ties_by_index_and_the_ignored_apart() -> None:
    distances = np.array([0.5, 0.2, 0.5, 0.1, 0.2, 0.4])
    ignore = np.array([False, False, False, True, False, True])
    ranked = rank_gallery(distances, 7, np.array([7, 8, 7, 7, 7, 9]), ignore)
    assert ranked.order.tolist() == [1, 4, 0, 2]
    assert ranked.distances.tolist() == [0.2, 0.2, 0.5, 0.5]
    assert ranked.right.tolist() == [False, True, True, True]
    assert ranked.ignored.tolist() == [3, 5]
    assert ranked.match_ranks.tolist() == [2, 3, 4]
    assert ranked.average_precision == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)


def test_a_query_without_a_match_has_no_average_precision() -> None:
    assert math.isnan(rank_gallery(np.array([0.1, 0.2]), 1, np.array([2, 3])).average_precision)
    assert math.isnan(
        rank_gallery(np.array([0.1, 0.2]), 2, np.array([2, 3]), np.array([True, False])).average_precision
    )


@given(st.integers(0, 10_000))
def test_average_precision_is_the_metrics_own_for_every_query(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_query, n_gallery = 5, 17
    distances = generator.integers(0, 6, (n_query, n_gallery)).astype(float)  # many ties
    q_pids, g_pids = generator.integers(0, 4, n_query), generator.integers(0, 4, n_gallery)
    ignore = generator.random((n_query, n_gallery)) < 0.3
    for query in range(n_query):
        ap = rank_gallery(distances[query], int(q_pids[query]), g_pids, ignore[query]).average_precision
        one = slice(query, query + 1)
        if math.isnan(ap):
            with pytest.raises(StudyError, match="none of the 1 queries has a match"):
                retrieval_metrics(distances[one], q_pids[one], g_pids, ignore=ignore[one])
        else:
            scored = retrieval_metrics(distances[one], q_pids[one], g_pids, ignore=ignore[one])
            assert ap == pytest.approx(scored.mAP, abs=1e-12)


def test_the_mean_over_the_queries_is_the_protocols_map_with_its_camera_rule() -> None:
    generator = np.random.default_rng(3)
    q_feat, g_feat = generator.normal(size=(12, 8)), generator.normal(size=(40, 8))
    q_pids, g_pids = np.arange(12) % 4, np.arange(40) % 5
    q_camids, g_camids = np.where(np.arange(12) % 2, 3, 6), np.array([1, 2, 4, 5])[generator.integers(0, 4, 40)]
    gallery = np.sort(generator.permutation(40)[:25])
    result = evaluate_sysu(q_feat, q_pids, q_camids, g_feat, g_pids, g_camids, gallery[None])
    unit_q, unit_g = (feat / np.linalg.norm(feat, axis=1, keepdims=True) for feat in (q_feat, g_feat[gallery]))
    distances, ignore = 1 - unit_q @ unit_g.T, same_place(q_camids, g_camids[gallery])
    assert ignore.any() and not ignore.all()
    found = [
        rank_gallery(distances[query], int(q_pids[query]), g_pids[gallery], ignore[query]).average_precision
        for query in range(12)
    ]
    assert np.nanmean(found) == pytest.approx(result.mean["mAP"])
    assert np.isfinite(found).sum() == result.n_valid


def test_only_camera_3_with_camera_2_is_ignored() -> None:
    pairs = same_place(np.array([3, 6, 1, 2]), np.array([1, 2, 4, 5, 3]))
    assert np.argwhere(pairs).tolist() == [[0, 1]]


def test_a_distance_without_a_rank_and_lengths_that_differ_are_refused() -> None:
    with pytest.raises(StudyError, match="gallery image 1 is NaN"):
        rank_gallery(np.array([0.1, np.nan]), 1, np.array([1, 2]))
    with pytest.raises(StudyError, match="found 2, 2 and 3"):
        inspect.unwrap(rank_gallery)(np.array([0.1, 0.2]), 1, np.array([1, 2]), np.zeros(3, dtype=bool))
