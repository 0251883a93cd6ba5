"""The nearest images of a query are the same whatever finds them; only the graph may miss some."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core import distances
from danet_core.files import StudyError
from danet_core.nearest import nearest

with_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed: make extras")


def crowd(seed: int, images: int, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(width, dtype=np.float32), rng.standard_normal((images, width), dtype=np.float32)


def by_hand(query: np.ndarray, gallery: np.ndarray) -> list[tuple[float, int]]:
    """(cosine distance, row) of every gallery row, nearest first; one sum at a time."""
    rows = [[float(x) for x in row] for row in (query, *gallery)]
    length = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    sums = [math.fsum(x * y for x, y in zip(rows[0], row, strict=True)) for row in rows[1:]]
    return sorted((1 - s / (length[0] * long), i) for i, (s, long) in enumerate(zip(sums, length[1:], strict=True)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 50), st.sampled_from([1, 2, 7, 100]))
@settings(max_examples=25)
def test_the_exact_search_equals_one_sum_at_a_time_in_blocks_of_any_size(seed, images, count, block):
    query, gallery = crowd(seed, images)
    expected = by_hand(query, gallery)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_COLUMNS", block)
        rows, gaps = nearest(query, gallery, count)
    assert rows.tolist() == [row for _, row in expected]
    np.testing.assert_allclose(gaps, [gap for gap, _ in expected], rtol=0, atol=1e-12)


def test_equal_images_stand_by_their_rows_also_where_blocks_part_them(monkeypatch):
    monkeypatch.setattr(distances, "_COLUMNS", 3)
    gallery = np.tile(np.float32([[1, 1, -1, 1], [1, 1, 1, 1]]), (5, 1))
    rows, gaps = nearest(np.ones(4, np.float32), gallery, 10)
    assert rows.tolist() == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]
    assert gaps.tolist() == [0.0] * 5 + [0.5] * 5


@with_faiss
@pytest.mark.parametrize("count", [1, 10, 3000, 5000])
def test_faiss_with_its_exact_product_gives_the_exact_ranking(count):
    query, gallery = crowd(0, 3000)
    expected, found = nearest(query, gallery, count), nearest(query, gallery, count, "faiss")
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-12)


@with_faiss
@pytest.mark.parametrize("index", ["faiss", "faiss-hnsw"])
def test_equal_images_stand_by_their_rows_whatever_found_them(index):
    query, gallery = crowd(1, 40)
    gallery = np.concatenate([gallery, gallery])
    rows, _ = nearest(query, gallery, 80, index)
    expected, _ = nearest(query, gallery, 80)
    np.testing.assert_array_equal(rows, expected)


@with_faiss
def test_faiss_takes_lengths_and_zero_features_as_the_cosine_does():
    query, gallery = crowd(2, 50)
    gallery *= 2.0 ** np.random.default_rng(0).integers(-20, 20, (50, 1)).astype(np.float32)
    gallery[7] = 0
    expected, found = nearest(query, gallery, 50), nearest(query * 1e10, gallery, 50, "faiss")
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1][found[0] == 7] == 1


@with_faiss
def test_the_graph_finds_most_with_their_true_distances():
    query, gallery = crowd(3, 3000)
    rows, gaps = nearest(query, gallery, 20, "faiss-hnsw")
    everyone, true = nearest(query, gallery, 3000)
    assert len(np.intersect1d(rows, everyone[:20])) >= 10
    np.testing.assert_allclose(gaps, true[[everyone.tolist().index(row) for row in rows]], rtol=0, atol=1e-12)
    assert (np.diff(gaps) >= 0).all()


@with_faiss
@pytest.mark.parametrize("index", ["faiss", "faiss-hnsw"])
def test_faiss_is_given_nothing_that_is_not_finite(index):
    query, gallery = crowd(4, 5)
    gallery[2, 3] = np.inf
    with pytest.raises(StudyError, match="not finite"):
        nearest(query, gallery, 2, index)


@pytest.mark.parametrize("index", ["faiss", "faiss-hnsw"])
def test_without_the_package_one_sentence_says_how_to_get_it(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StudyError, match=rf"the index {index} needs the package faiss.*make extras"):
        nearest(*crowd(0, 3), 1, index)


def test_an_index_of_another_name_is_refused():
    with pytest.raises(StudyError, match="unknown index 'ivf'; expected one of exact, faiss, faiss-hnsw"):
        inspect.unwrap(nearest)(*crowd(0, 3), 1, "ivf")
