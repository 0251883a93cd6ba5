"""CMC, mAP and mINP against slow loops, golden values and cases worked out by hand."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danet_study import metrics
from danet_study.metrics import retrieval_metrics

EDGE_CASES = json.loads((Path(__file__).parent / "golden" / "edge_cases.json").read_text())
LEVELS = ("identity", "image")


def slow_retrieval(dist, q_pids, g_pids, ignored=lambda q, g: False, level="identity", ranks=None):
    """The protocol's rules as loops over plain numbers; None if no query has a match."""
    if ranks is None:
        ranks = len(set(g_pids)) if level == "identity" else len(g_pids)
    hits, aps, inps = [0] * ranks, [], []
    for q, pid in enumerate(q_pids):
        left = [g for g in range(len(g_pids)) if not ignored(q, g)]
        ranking = sorted(left, key=lambda g, row=dist[q]: (float(row[g]), g))
        matches = [rank for rank, g in enumerate(ranking, start=1) if g_pids[g] == pid]
        if not matches:
            continue
        aps.append(math.fsum(found / rank for found, rank in enumerate(matches, start=1)) / len(matches))
        inps.append(len(matches) / matches[-1])
        order = [g_pids[g] for g in ranking]
        if level == "identity":
            order = list(dict.fromkeys(order))  # each identity at its first appearance
        for rank in range(order.index(pid), ranks):
            hits[rank] += 1
    if not aps:
        return None
    means = {"mAP": math.fsum(aps) / len(aps), "mINP": math.fsum(inps) / len(inps)}
    return {"cmc": [hit / len(aps) for hit in hits], **means, "n_valid": len(aps)}


def check(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(found.cmc, expected["cmc"], rtol=0, atol=tolerance)
    assert found.mAP == pytest.approx(expected["mAP"], abs=tolerance)
    assert found.mINP == pytest.approx(expected["mINP"], abs=tolerance)
    assert found.n_valid == expected["n_valid"]


@st.composite
def problems(draw):
    """Distances, identities of queries and gallery, pairs to ignore; few identities, so that matches are common."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_query, n_gallery, n_pids = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    dist = rng.integers(0, draw(st.integers(1, 6)), (n_query, n_gallery)) / 4 - 0.25  # with many ties
    ignore = rng.random((n_query, n_gallery)) < draw(st.sampled_from([0.0, 0.3]))
    return dist, rng.integers(0, n_pids, n_query), rng.integers(0, n_pids, n_gallery), ignore


def score(problem, level):
    dist, q_pids, g_pids, ignore = problem
    if not ((q_pids[:, None] == g_pids) & ~ignore).any():
        with pytest.raises(ValueError):
            retrieval_metrics(dist, q_pids, g_pids, ignore=ignore, cmc=level)
        return None
    return retrieval_metrics(dist, q_pids, g_pids, ignore=ignore, cmc=level)


@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda case: case["name"])
def test_edge_cases_equal_the_golden_values(case):
    ignore, level = None, "image"
    if case["q_cam"] is not None:
        ignore = (np.array(case["q_cam"]) == 3)[:, None] & (np.array(case["g_cam"]) == 2)
        level = "identity"
    arguments = np.array(case["dist"]), np.array(case["q_id"]), np.array(case["g_id"])
    expected = case["expected"]
    if isinstance(expected, str):
        with pytest.raises(ValueError):
            retrieval_metrics(*arguments, ignore=ignore, cmc=level)
        return
    found = retrieval_metrics(*arguments, ignore=ignore, cmc=level)
    held = np.pad(found.cmc, (0, 20), mode="edge")[:20]
    np.testing.assert_allclose(held, expected["cmc"], rtol=0, atol=1e-8)
    assert (found.mAP, found.mINP) == pytest.approx((expected["mAP"], expected["mINP"]), abs=1e-8)
    assert found.n_valid == expected["n_valid_query"]


def test_two_queries_and_five_images_worked_out_by_hand():
    dist = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
    q_pids, g_pids = np.array([1, 2, 9]), np.array([2, 1, 2, 3, 1])
    # query 1 sees 2 1 2 3 1: matches at 2 and 5, AP = (1/2 + 2/5) / 2 = 9/20, INP = 2/5; second image and identity
    # query 2 sees 1 3 2 1 2: matches at 3 and 5, AP = (1/3 + 2/5) / 2 = 11/30, INP = 2/5; third image and identity
    # query 9 has no match and is skipped
    found = retrieval_metrics(dist, q_pids, g_pids, cmc="image")
    expected = {"cmc": [0, 1 / 2, 1, 1, 1], "mAP": (9 / 20 + 11 / 30) / 2, "mINP": 2 / 5, "n_valid": 2}
    check(found, expected)
    check(retrieval_metrics(dist, q_pids, g_pids), expected | {"cmc": [0, 1 / 2, 1]})
    np.testing.assert_allclose(found.ap, [9 / 20, 11 / 30, np.nan])
    np.testing.assert_allclose(found.inp, [2 / 5, 2 / 5, np.nan])
    assert found.valid.tolist() == [True, True, False] and not found.rank1.any()
    assert found.chance_rank1 == pytest.approx(2 / 5)


def test_an_ignored_image_is_neither_match_nor_distractor():
    # A distractor at 0.2 and a match at 0.4 are left; the ignored distractor and the ignored match are not ranked.
    dist, g_pids = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([8, 9, 5, 5])
    found = retrieval_metrics(dist, np.array([5]), g_pids, ignore=np.array([[True, False, True, False]]), cmc="image")
    check(found, {"cmc": [0, 1, 1, 1], "mAP": 1 / 2, "mINP": 1 / 2, "n_valid": 1})
    assert found.chance_rank1 == 1 / 2


@given(problems(), st.sampled_from(LEVELS), st.sampled_from([np.float32, np.float64]))
def test_scores_equal_the_slow_loops_with_ties_and_ignored_pairs(problem, level, dtype):
    dist, q_pids, g_pids, ignore = problem
    copies = [part.copy() for part in problem]
    found = score((dist.astype(dtype), q_pids, g_pids, ignore), level)
    assert all(np.array_equal(part, copy) for part, copy in zip(problem, copies, strict=True))  # inputs are unchanged
    expected = slow_retrieval(dist, q_pids.tolist(), g_pids.tolist(), lambda q, g: ignore[q, g], level)
    assert (found is None) == (expected is None)
    if found is not None:
        check(found, expected)
        assert found.mAP == pytest.approx(found.ap[found.valid].mean())
        assert found.cmc[0] == pytest.approx(found.rank1[found.valid].mean())


@given(problems(), st.sampled_from(LEVELS))
def test_cmc_never_falls_only_the_order_counts_and_perfect_distances_score_one(problem, level):
    found = score(problem, level)
    if found is not None:
        assert (np.diff(found.cmc) >= 0).all() and found.cmc[-1] == 1
        assert 0 < found.mINP <= 1 and 0 < found.mAP <= 1
        rising = score((np.exp(3 * problem[0]) - 50, *problem[1:]), level)
        check(rising, vars(found))
        perfect = score(((problem[1][:, None] != problem[2]).astype(np.float32), *problem[1:]), level)
        assert perfect.cmc.min() == perfect.mAP == perfect.mINP == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_equal_distances_are_ranked_by_gallery_index(dtype):
    dist = np.array([[0.0, -0.0, 0.0, -0.0]]).astype(dtype)
    assert retrieval_metrics(dist, np.array([3]), np.array([1, 2, 3, 4])).cmc.tolist() == [0, 0, 1, 1]


def test_tensors_score_as_arrays():
    rng = np.random.default_rng(0)
    arrays = rng.random((5, 9)), np.arange(5) % 3, np.arange(9) % 3, rng.random((5, 9)) < 0.2
    expected = retrieval_metrics(*arrays[:3], ignore=arrays[3])
    dist, q_pids, g_pids, ignore = (torch.from_numpy(array) for array in arrays)
    check(retrieval_metrics(dist.requires_grad_(), q_pids, g_pids.int(), ignore=ignore), vars(expected), tolerance=0)


DIST, PIDS = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([1, 2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: retrieval_metrics(DIST, np.array([5, 6]), PIDS),  # no match
        lambda: retrieval_metrics(DIST, PIDS, PIDS, ignore=np.ones((2, 2), bool)),
        lambda: retrieval_metrics(DIST[:, :0], PIDS, PIDS[:0]),  # empty gallery
        lambda: retrieval_metrics(DIST[:0], PIDS[:0], PIDS),
        lambda: retrieval_metrics(np.array([[0.1, 0.2], [np.nan, 1]]), PIDS, PIDS),
        lambda: inspect.unwrap(retrieval_metrics)(DIST, PIDS[:1], PIDS),  # without the shape check of the tests
        lambda: inspect.unwrap(metrics.score_queries)(np.array([[0]]), PIDS[:1], PIDS[:1], "camera"),
    ],
)
def test_what_cannot_be_scored_raises_a_value_error(call):
    with pytest.raises(ValueError):
        call()
