from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danet_core import metrics
from danet_core.files import StudyError
from danet_core.metrics import RetrievalMetrics, retrieval_metrics

EDGE_CASES = json.loads((Path(__file__).parent / "golden" / "edge_cases.json").read_text())
LEVELS = ("identity", "image")


def bare(function: Callable) -> Callable:
    """The function without the shape check that conftest.py puts before it: what a user's wrong call meets."""
    return inspect.unwrap(function)


def assert_equal(found: RetrievalMetrics, expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert found.cmc.dtype == np.float64
    np.testing.assert_allclose(found.cmc, expected["cmc"], rtol=0, atol=tolerance)
    assert found.mAP == pytest.approx(expected["mAP"], abs=tolerance)
    assert found.mINP == pytest.approx(expected["mINP"], abs=tolerance)
    assert found.n_valid == expected["n_valid"]


@st.composite
def problems(draw: st.DrawFn, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distances, identities of queries and gallery, pairs to ignore; few identities, so that matches are common."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_query, n_gallery = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    n_pids = draw(st.integers(1, 5))
    if ties:
        dist = generator.integers(0, draw(st.integers(1, 6)), (n_query, n_gallery)) / 4
    else:
        dist = generator.permutation(n_query * n_gallery).reshape(n_query, n_gallery) / 64
    ignore = generator.random((n_query, n_gallery)) < draw(st.sampled_from([0.0, 0.3]))
    return dist, generator.integers(0, n_pids, n_query), generator.integers(0, n_pids, n_gallery), ignore


def score(problem: tuple[np.ndarray, ...], level: Any) -> RetrievalMetrics | None:
    dist, q_pids, g_pids, ignore = problem
    try:
        return retrieval_metrics(dist, q_pids, g_pids, ignore=ignore, cmc=level)
    except StudyError as error:
        assert "has a match" in str(error)
        return None


@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda case: case["name"])
def test_edge_cases_equal_the_golden_values(case: dict[str, Any]) -> None:
    ignore, level = None, "image"
    if case["q_cam"] is not None:
        ignore = (np.array(case["q_cam"]) == 3)[:, None] & (np.array(case["g_cam"]) == 2)
        level = "identity"
    arguments = np.array(case["dist"]), np.array(case["q_id"]), np.array(case["g_id"])
    if isinstance(case["expected"], str):
        with pytest.raises(StudyError, match="none of the 3 queries has a match"):
            retrieval_metrics(*arguments, ignore=ignore, cmc=level)
        return
    found = retrieval_metrics(*arguments, ignore=ignore, cmc=level)
    expected = case["expected"]
    held = np.pad(found.cmc, (0, 20), mode="edge")[:20]
    np.testing.assert_allclose(held, expected["cmc"], rtol=0, atol=1e-8)
    assert found.mAP == pytest.approx(expected["mAP"], abs=1e-8)
    assert found.mINP == pytest.approx(expected["mINP"], abs=1e-8)
    assert found.n_valid == expected["n_valid_query"]


def test_two_queries_and_five_images_worked_out_by_hand() -> None:
    dist = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
    g_pids = np.array([2, 1, 2, 3, 1])
    q_pids = np.array([1, 2])
    # query 1 sees 2 1 2 3 1: matches at 2 and 5, AP = (1/2 + 2/5) / 2 = 9/20, INP = 2/5; second image, second identity
    # query 2 sees 1 3 2 1 2: matches at 3 and 5, AP = (1/3 + 2/5) / 2 = 11/30, INP = 2/5; third image, third identity
    found = retrieval_metrics(dist, q_pids, g_pids, cmc="image")
    expected = {"cmc": [0, 1 / 2, 1, 1, 1], "mAP": (9 / 20 + 11 / 30) / 2, "mINP": 2 / 5, "n_valid": 2}
    assert_equal(found, expected)
    assert_equal(retrieval_metrics(dist, q_pids, g_pids), expected | {"cmc": [0, 1 / 2, 1]})


def test_identity_level_counts_an_identity_once_and_image_level_each_image() -> None:
    # The query's identity comes after three images of one other identity: fourth image, second identity.
    arguments = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([5]), np.array([1, 1, 1, 5])
    assert retrieval_metrics(*arguments, cmc="image").cmc.tolist() == [0, 0, 0, 1]
    assert retrieval_metrics(*arguments, cmc="identity").cmc.tolist() == [0, 1]


def test_an_ignored_image_is_neither_match_nor_distractor() -> None:
    # Left are a distractor at 0.2 and a match at 0.4; the ignored distractor and the ignored match leave the ranking.
    dist, g_pids = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([8, 9, 5, 5])
    found = retrieval_metrics(dist, np.array([5]), g_pids, ignore=np.array([[True, False, True, False]]), cmc="image")
    assert_equal(found, {"cmc": [0, 1, 1, 1], "mAP": 1 / 2, "mINP": 1 / 2, "n_valid": 1})


def test_a_query_without_a_match_is_skipped_in_every_mean() -> None:
    dist, g_pids = np.array([[0.1, 0.2], [0.1, 0.2]]), np.array([1, 2])
    found = retrieval_metrics(dist, np.array([2, 77]), g_pids)
    assert_equal(found, {"cmc": [0, 1], "mAP": 1 / 2, "mINP": 1 / 2, "n_valid": 1})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_equal_distances_are_ranked_by_gallery_index(dtype: type) -> None:
    # With zeros of both signs, which are equal too; the match stands third.
    dist = np.array([[0.0, -0.0, 0.0, -0.0]]).astype(dtype)
    found = retrieval_metrics(dist, np.array([3]), np.array([1, 2, 3, 4]))
    assert found.cmc.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinite_distances_are_ranked_first_and_last(dtype: type) -> None:
    dist = np.array([[np.inf, -1.5, 2.0, -np.inf, -0.5]], dtype=dtype)
    order = metrics.rank_order(dist)
    assert order.tolist() == [[3, 1, 4, 2, 0]]
    found = retrieval_metrics(dist, np.array([1]), np.array([1, 2, 3, 4, 5]))
    assert found.cmc.tolist() == [0, 0, 0, 0, 1]


@given(problems(), st.sampled_from(LEVELS), st.sampled_from([np.float32, np.float64]))
def test_scores_equal_the_slow_loops_with_ties_and_ignored_pairs(problem: Any, level: Any, dtype: type) -> None:
    dist, q_pids, g_pids, ignore = problem
    found = score((dist.astype(dtype), q_pids, g_pids, ignore), level)
    expected = oracles.retrieval(dist, q_pids.tolist(), g_pids.tolist(), lambda q, g: ignore[q, g], level)
    assert (found is None) == (expected is None)
    if found is not None:
        assert_equal(found, expected)


@given(problems(), st.sampled_from(LEVELS), st.integers(0, 2**32 - 1))
def test_several_galleries_read_off_one_ranking_equal_each_ranked_alone(problem: Any, level: Any, seed: int) -> None:
    dist, q_pids, g_pids, ignore = problem
    members = np.random.default_rng(seed).random((4, len(g_pids))) < 0.6
    order = metrics.rank_order(dist, ignore)
    scores = metrics.score_queries(order, q_pids, g_pids, members, LEVELS)[level]
    for trial, member in enumerate(members):
        expected = oracles.retrieval(
            dist[:, member],
            q_pids.tolist(),
            g_pids[member].tolist(),
            lambda q, g, left=ignore[:, member]: left[q, g],
            level,
            ranks=7,
        )
        alone = metrics.score_queries(order, q_pids, g_pids, member[None], [level])[level]
        for part, of_all in zip(alone, scores, strict=True):
            np.testing.assert_array_equal(part[:, 0], of_all[:, trial])
        if expected is None:
            assert (scores.first[:, trial] == 0).all()
        else:
            assert_equal(metrics.average(scores, trial, 7), expected)


@given(problems(ties=False), st.sampled_from(LEVELS), st.integers(0, 2**32 - 1))
def test_order_of_the_gallery_does_not_matter_without_ties(problem: Any, level: Any, seed: int) -> None:
    dist, q_pids, g_pids, ignore = problem
    shuffle = np.random.default_rng(seed).permutation(len(g_pids))
    first = score(problem, level)
    second = score((dist[:, shuffle], q_pids, g_pids[shuffle], ignore[:, shuffle]), level)
    assert (first is None) == (second is None)
    if first is not None:
        assert_equal(second, vars(first))


@given(problems(), st.sampled_from(LEVELS))
def test_a_rising_transformation_of_the_distances_does_not_matter(problem: Any, level: Any) -> None:
    first, second = score(problem, level), score((np.exp(3 * problem[0]) - 50, *problem[1:]), level)
    assert (first is None) == (second is None)
    if first is not None:
        assert_equal(second, vars(first))


@given(problems(), st.sampled_from(LEVELS))
def test_cmc_never_falls_and_all_scores_are_fractions(problem: Any, level: Any) -> None:
    found = score(problem, level)
    if found is not None:
        assert (np.diff(found.cmc) >= 0).all()
        assert found.cmc[-1] == 1  # every valid query finds its match by the last rank
        assert 0 < found.mINP <= 1 and 0 < found.mAP <= 1


@given(problems(), st.sampled_from(LEVELS))
def test_perfect_distances_score_one(problem: Any, level: Any) -> None:
    _, q_pids, g_pids, ignore = problem
    found = score(((q_pids[:, None] != g_pids).astype(np.float32), q_pids, g_pids, ignore), level)
    if found is not None:
        assert found.cmc.min() == found.mAP == found.mINP == 1


@given(problems(), st.sampled_from(LEVELS), st.sampled_from([np.float32, np.float64]))
def test_inputs_are_unchanged(problem: Any, level: Any, dtype: type) -> None:
    problem = (problem[0].astype(dtype), *problem[1:])
    copies = [part.copy() for part in problem]
    score(problem, level)
    for part, copy in zip(problem, copies, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_tensors_and_arrays_give_the_same_scores() -> None:
    generator = np.random.default_rng(0)
    dist, q_pids, g_pids = generator.random((5, 9)), np.arange(5) % 3, np.arange(9) % 3
    ignore = generator.random((5, 9)) < 0.2
    arrays = retrieval_metrics(dist, q_pids, g_pids, ignore=ignore)
    tensors = retrieval_metrics(
        torch.from_numpy(dist).requires_grad_(),
        torch.from_numpy(q_pids),
        torch.from_numpy(g_pids).int(),
        ignore=torch.from_numpy(ignore),
    )
    assert_equal(tensors, vars(arrays), tolerance=0)


def test_blocks_of_queries_give_the_same_scores_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    dist, q_pids, g_pids = generator.random((23, 40)), generator.integers(0, 6, 23), generator.integers(0, 5, 40)
    ignore = generator.random(dist.shape) < 0.2
    whole = retrieval_metrics(dist, q_pids, g_pids, ignore=ignore)
    monkeypatch.setattr(metrics, "BLOCK", 100)  # two queries at a time
    assert_equal(retrieval_metrics(dist, q_pids, g_pids, ignore=ignore), vars(whole), tolerance=0)


ORDER = np.array([[0, 1], [0, 1]])
DIST, Q_PIDS, G_PIDS = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([1, 2]), np.array([1, 2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: retrieval_metrics(DIST, np.array([5, 6]), G_PIDS), "none of the 2 queries has a match"),
        (lambda: retrieval_metrics(DIST, Q_PIDS, G_PIDS, ignore=np.ones((2, 2), bool)), "none of the 2 queries"),
        (lambda: retrieval_metrics(DIST[:, :0], Q_PIDS, G_PIDS[:0]), "2 queries against 0 gallery images"),
        (lambda: retrieval_metrics(DIST[:0], Q_PIDS[:0], G_PIDS), "0 queries against 2 gallery images"),
        (lambda: retrieval_metrics(np.array([[0.1, 0.2], [np.nan, 1]]), Q_PIDS, G_PIDS), "query 1 and gallery image 0"),
        (
            lambda: bare(metrics.score_queries)(ORDER, Q_PIDS, G_PIDS, ORDER > 0, ["camera"]),
            "'identity' .* 'image' .* found 'camera'",
        ),
        (lambda: bare(retrieval_metrics)(DIST, Q_PIDS[:1], G_PIDS), "q_pids must have one entry per image, 2, found 1"),
        (
            lambda: bare(retrieval_metrics)(DIST, Q_PIDS, np.arange(3)),
            "g_pids must have one entry per image, 2, found 3",
        ),
        (lambda: bare(retrieval_metrics)(DIST[0], Q_PIDS, G_PIDS), r"distmat must have 2 axes, found shape \(2,\)"),
        (lambda: bare(retrieval_metrics)(DIST, Q_PIDS / 1, G_PIDS), "q_pids must be integers, found float64"),
        (lambda: bare(retrieval_metrics)(DIST, Q_PIDS, G_PIDS, ignore=DIST), "boolean array of distmat's shape"),
    ],
)
def test_a_wrong_ranking_is_refused_with_a_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        call()
