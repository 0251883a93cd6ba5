"""k-reciprocal re-ranking equals the paper's definitions, written as loops over sets."""

from __future__ import annotations

import inspect
import math
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danet_core import rerank as rerank_module
from danet_core.files import StudyError
from danet_core.rerank import rerank


def oracle(feat: np.ndarray, n_query: int, k1: int, k2: int, lambda_value: float) -> list[list[float]]:
    """One set, sum or maximum of the paper at a time; shares no code with danet_core."""
    n = len(feat)
    rows = [[float(x) for x in row] for row in feat]
    length = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]

    def cosine(a: int, b: int) -> float:
        return math.fsum(x * y for x, y in zip(rows[a], rows[b], strict=True)) / (length[a] * length[b])

    raw = [[0.0 if a == b else max(0.0, 1 - cosine(a, b)) for b in range(n)] for a in range(n)]
    d = [[value / max(row) for value in row] for row in raw]

    def neighbours(p: int, k: int) -> list[int]:
        others = sorted((g for g in range(n) if g != p), key=lambda g: (raw[p][g], g))
        return [p, *others[:k]]

    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in neighbours(p, k) if p in neighbours(g, k)}

    vectors = []
    for p in range(n):
        core = reciprocal(p, k1)
        robust = set(core)
        for q in core:
            candidate = reciprocal(q, round(k1 / 2))
            if 3 * len(candidate & core) >= 2 * len(candidate):
                robust |= candidate
        vectors.append({g: math.exp(-d[p][g]) for g in robust})
    expanded = []
    for p in range(n):
        group = neighbours(p, k2 - 1)
        expanded.append([math.fsum(vectors[g].get(i, 0.0) for g in group) / len(group) for i in range(n)])

    def final(p: int, g: int) -> float:
        pairs = list(zip(expanded[p], expanded[g], strict=True))
        jaccard = 1 - math.fsum(min(pair) for pair in pairs) / math.fsum(max(pair) for pair in pairs)
        return (1 - lambda_value) * jaccard + lambda_value * d[p][g]

    return [[final(p, g) for g in range(n_query, n)] for p in range(n_query)]


def people(seed: int, n: int, duplicates: int) -> np.ndarray:
    """Features in loose groups, as identities make them; the last ones repeat the first."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(4, 5))
    feat = centres[generator.integers(0, 4, n)] + generator.normal(0, 0.5, (n, 5))
    if duplicates:
        feat[-duplicates:] = feat[:duplicates]
    return feat


@given(
    seed=st.integers(0, 2**32 - 1),
    n_query=st.integers(1, 8),
    n_gallery=st.integers(1, 14),
    duplicates=st.integers(0, 3),
    k1=st.integers(1, 9),
    k2=st.integers(1, 5),
    lambda_value=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_rerank_equals_the_papers_definitions(
    seed: int, n_query: int, n_gallery: int, duplicates: int, k1: int, k2: int, lambda_value: float
) -> None:
    n = n_query + n_gallery
    feat = people(seed, n, duplicates if n >= 8 else 0)
    found = rerank(feat[:n_query], feat[n_query:], k1, k2, lambda_value)
    np.testing.assert_allclose(found, oracle(feat, n_query, k1, k2, lambda_value), atol=1e-9)


def test_the_papers_parameters_at_some_size_equal_its_definitions() -> None:
    feat = people(3, 90, 2)
    found = rerank(feat[:40], feat[40:], 20, 6, 0.3)
    np.testing.assert_allclose(found, oracle(feat, 40, 20, 6, 0.3), atol=1e-9)


def test_two_images_that_have_each_other_are_at_the_distance_computed_by_hand() -> None:
    # Angles 0 (query), 10, 80, 90, one neighbour each: 0 and 10 have each other, and so have 80 and 90.
    # V of 0 is (1, a) and of 10 (b, 1) on these two, so that d_J = 1 - (a + b) / 2; nothing is shared with 80 and 90.
    cos = [math.cos(math.radians(angle)) for angle in (10, 80)]
    a, b = math.exp(-(1 - cos[0])), math.exp(-(1 - cos[0]) / (1 - cos[1]))  # the rows' largest are 1 and 1 - cos 80
    angles = np.radians([0, 10, 80, 90])
    feat = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = rerank(feat[:1], feat[1:], 1, 1, 0.0)
    np.testing.assert_allclose(found, [[1 - (a + b) / 2, 1, 1]], atol=1e-12)


def test_an_image_without_return_falls_behind_one_that_has_the_query_among_its_own_neighbours() -> None:
    # 10 degrees is nearer to the query at 0 than -11, but its own two neighbours are 18 and 19, where -11 has 0 and 10.
    angles = np.radians([0, 10, -11, 18, 19])
    feat = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    plain = 1 - feat[:1] @ feat[1:].T
    found = rerank(feat[:1], feat[1:], 2, 1, 0.0)
    assert plain[0, 0] < plain[0, 1]
    assert found[0, 1] < found[0, 0]


def test_a_weight_of_one_keeps_the_cosine_distance_up_to_its_rows_scale() -> None:
    feat = people(0, 30, 0)
    one = feat / np.linalg.norm(feat, axis=1, keepdims=True)
    cosine = 1 - one @ one.T
    expected = (cosine / cosine.max(axis=1, keepdims=True))[:10, 10:]
    np.testing.assert_allclose(rerank(feat[:10], feat[10:], 20, 6, 1.0), expected, atol=1e-12)


def test_lengths_of_features_and_the_size_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    feat = people(1, 60, 0)
    whole = rerank(feat[:25], feat[25:], 8, 3, 0.3)
    scale = 2.0 ** np.random.default_rng(0).integers(-300, 300, (60, 1))
    monkeypatch.setattr(rerank_module, "_ROWS", 7)
    copy = feat.copy()
    np.testing.assert_array_equal(rerank(feat[:25], feat[25:], 8, 3, 0.3), whole)
    np.testing.assert_array_equal(feat, copy)
    np.testing.assert_allclose(rerank((feat * scale)[:25], (feat * scale)[25:], 8, 3, 0.3), whole, atol=1e-12)


def test_features_in_float32_give_the_same_up_to_rounding() -> None:
    feat = people(2, 60, 0).astype(np.float32)
    double = feat.astype(np.float64)
    found = rerank(feat[:25], feat[25:], 8, 3, 0.3)
    np.testing.assert_allclose(found, rerank(double[:25], double[25:], 8, 3, 0.3), atol=1e-5)


def test_images_that_are_all_equal_have_no_nan() -> None:
    feat = np.ones((6, 3))
    found = rerank(feat[:2], feat[2:], 3, 2, 0.3)
    assert np.isfinite(found).all()
    assert (found >= 0).all() and (found <= 1).all()


def test_what_needs_more_memory_than_is_left_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.lib.stride_tricks.as_strided(np.ones(4, np.float32), (100_000, 4), (0, 4))  # 16 bytes
    monkeypatch.setattr(rerank_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * 10**9))
    words = "100,000 queries with 100,000 gallery images needs 560.0 GB of memory, and 24.0 GB are available"
    with pytest.raises(StudyError, match=words):
        rerank(many, many, 20, 6, 0.3)
    rerank(many[:9], many[:9], 20, 6, 0.3)


def test_the_memory_it_says_is_what_it_takes() -> None:
    feat = people(5, 2400, 0).astype(np.float32)
    tracemalloc.start()
    try:
        rerank(feat[:800], feat[800:], 20, 6, 0.3)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 <= taken / rerank_module.needed_memory(800, 1600, 4) < 1.5


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rerank(ONES, ONES, 0, 6, 0.3), "found k1=0, k2=6"),
        (lambda: rerank(ONES, ONES, 20, 0, 0.3), "k2=0"),
        (lambda: rerank(ONES, ONES, 20, 6, 1.5), "lambda_value from 0 to 1, .* lambda_value=1.5"),
        (lambda: rerank(ONES, ONES * np.nan, 20, 6, 0.3), "is NaN or infinite"),
        (lambda: rerank(ONES, ONES[:0], 20, 6, 0.3), r"found \(2, 3\) and \(0, 3\)"),
        (lambda: inspect.unwrap(rerank)(ONES, ONES[:, :2], 20, 6, 0.3), r"found \(2, 3\) and \(2, 2\)"),
    ],
)
def test_what_cannot_be_reranked_is_refused_with_a_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        call()
