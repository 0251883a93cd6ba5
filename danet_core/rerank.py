"""k-reciprocal re-ranking: images that have each other among their nearest neighbours move closer together.

The order of a re-ranked gallery depends on all queries asked with it, so such scores stand apart from plain ones.
Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, whose equations are
numbered here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
from jaxtyping import Float
from scipy import sparse

from danet_core.files import StudyError
from danet_core.similarity import first_equal, unit

_ROWS = 64  # queries at a time where pairs of images are listed, so that memory stays bounded


def rerank(
    q_feat: Float[np.ndarray, "Q D"], g_feat: Float[np.ndarray, "G D"], k1: int, k2: int, lambda_value: float
) -> Float[np.ndarray, "Q G"]:
    """Distances between queries and gallery after k-reciprocal re-ranking among all Q + G images.

    With d the cosine distance divided by the largest of its row, so that it lies in [0, 1] as d_J does:
        N(p, k)    p and the k images nearest to it, ties by position, queries before gallery          (Eq. 2)
        R(p, k)    {g in N(p, k): p in N(g, k)}                                                        (Eq. 3)
        R*(p)      R(p, k1) and each R(q, k1/2), q in R(p, k1), two thirds of which lie in R(p, k1)     (Eq. 5)
        V_p(g)     exp(-d(p, g)) in R*(p), 0 elsewhere                                                 (Eq. 7)
        V_p        then the mean of V over the k2 images nearest to p, p being the first               (Eq. 11)
        d_J(p, g)  1 - sum min(V_p, V_g) / sum max(V_p, V_g)                                           (Eq. 10)
        result     (1 - lambda_value) d_J + lambda_value d                                             (Eq. 12)
    The paper leaves open the scale of d and whether p is its own neighbour; both are taken from the authors' code, as
    is k1/2 rounded to the even number. Their code also divides V by its sum and asks for more than two thirds, which
    the paper does not: its scores differ from these by a little.

    Args:
        q_feat, g_feat: (Q, D) and (G, D) features of any length, computed in their own precision.
        k1, k2: numbers of neighbours, 20 and 6 in the paper; where there are fewer images, all of them.
        lambda_value: weight of the distance as it was, 0.3 in the paper; 1 leaves every ranking as it is.

    Returns:
        (Q, G) float64, in [0, 1].

    Raises:
        StudyError (a ValueError): k1 or k2 below 1, lambda_value outside [0, 1], a feature that is not finite, or sides
            that are empty or of different lengths D; or less memory is left than the arrays of all pairs need
            (`needed_memory`: 560 GB for 100,000 queries and as many gallery images).
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise StudyError(
            f"re-ranking expects k1 and k2 of at least 1 and lambda_value from 0 to 1, found k1={k1}, k2={k2},"
            f" lambda_value={lambda_value}; correct `evaluation.rerank`"
        )
    if not len(q_feat) or not len(g_feat) or q_feat.shape[1] != g_feat.shape[1]:
        raise StudyError(
            f"re-ranking expects queries and gallery of the same number of dimensions, found {q_feat.shape} and"
            f" {g_feat.shape}; both must come from the same model"
        )
    _refuse_too_many(len(q_feat), len(g_feat), np.result_type(q_feat, g_feat, np.float32).itemsize)
    feat = np.concatenate([q_feat, g_feat])
    if not np.isfinite(feat).all():
        raise StudyError("a feature to re-rank is NaN or infinite; the model that made it has diverged")
    n_query, n = len(q_feat), len(feat)
    similarity = _similarity(unit(feat.astype(np.promote_types(feat.dtype, np.float32), copy=False)))
    largest = 1 - similarity.min(axis=1).astype(np.float64)  # (N,) of each row's cosine distances
    largest[largest <= 0] = 1  # all images are equal
    nearest = _nearest(similarity, max(k1, k2 - 1))

    wide, narrow = _reciprocal(nearest, k1), _reciprocal(nearest, round(k1 / 2))
    shared = sparse.csr_array((wide @ narrow.T).multiply(wide))  # [p, q] = |R(p, k1) and R(q, k1/2)|, q in R(p, k1)
    shared.data = (3 * shared.data >= 2 * narrow.sum(axis=1)[shared.indices]).astype(np.int32)
    shared.eliminate_zeros()
    encoded = sparse.csr_array(wide + shared @ narrow)
    rows = np.repeat(np.arange(n), np.diff(encoded.indptr))
    weights = np.exp(-np.maximum(1 - similarity[rows, encoded.indices].astype(np.float64), 0) / largest[rows])
    encoded = sparse.csr_array((weights, encoded.indices, encoded.indptr), shape=(n, n))
    encoded = sparse.csr_array(_members(nearest[:, :k2]) @ encoded)  # sums do for means: d_J has no scale
    distance = np.maximum(1 - similarity[:n_query, n_query:].astype(np.float64), 0) / largest[:n_query, None]
    jaccard = _jaccard(sparse.csr_array(encoded[:n_query]), sparse.csr_array(encoded[n_query:]))
    return (1 - lambda_value) * jaccard + lambda_value * distance


def needed_memory(n_query: int, n_gallery: int, itemsize: int) -> int:
    """Bytes that `rerank` needs for arrays of all pairs: one (N, N) of the features' precision, five (Q, G) of float64.

    The sparse arrays, some kB an image, come on top.
    """
    return (n_query + n_gallery) ** 2 * itemsize + 5 * 8 * n_query * n_gallery


def _refuse_too_many(n_query: int, n_gallery: int, itemsize: int) -> None:
    needed, available = needed_memory(n_query, n_gallery, itemsize), psutil.virtual_memory().available
    if needed > available:
        raise StudyError(
            f"re-ranking {n_query:,} queries with {n_gallery:,} gallery images needs {needed / 1e9:,.1f} GB of memory,"
            f" and {available / 1e9:,.1f} GB are available; set `evaluation.rerank` to null, or take fewer images"
        )


def _similarity(feat: np.ndarray) -> np.ndarray:
    """(N, N) cosines of unit rows; equal rows have equal cosines, which a matrix product alone may round apart."""
    similarity, same = feat @ feat.T, first_equal(feat)
    return similarity if (same == np.arange(len(same))).all() else similarity[np.ix_(same, same)]


def _nearest(similarity: np.ndarray, k: int) -> np.ndarray:
    """(N, k + 1) each image, then its k nearest others in order, ties by ascending index; fewer where N is smaller."""
    n = len(similarity)
    k = min(k, n - 1)
    parts = []
    for start in range(0, n, _ROWS):
        block = -similarity[start : start + _ROWS]
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        row, column = np.nonzero(block <= np.partition(block, k, axis=1)[:, k, None])  # more than k + 1 where they tie
        order = np.lexsort((column, block[row, column], row))
        first = np.searchsorted(row, own)  # `row` ascends, and `order` keeps it so
        parts.append(column[order][first[:, None] + np.arange(k + 1)])
    return np.concatenate(parts)


def _members(nearest: np.ndarray) -> Any:
    """(N, N) sparse, 1 where the column's image is listed in the row."""
    n, k = nearest.shape
    return sparse.csr_array((np.ones(n * k, dtype=np.int32), nearest.ravel(), np.arange(n + 1) * k), shape=(n, n))


def _reciprocal(nearest: np.ndarray, k: int) -> Any:
    """(N, N) sparse, 1 at the pairs that have each other in N(., k)."""
    near = _members(nearest[:, : k + 1])
    return sparse.csr_array(near.multiply(near.T))


def _jaccard(query: Any, gallery: Any) -> np.ndarray:
    """(Q, G) 1 - sum min / sum max of the rows of two sparse matrices (Q, N) and (G, N), both with positive entries.

    sum max is what both rows sum to less sum min, and only columns that both rows have add to sum min: each entry of a
    query is laid beside the gallery entries of its column.
    """
    columns = sparse.csc_array(gallery)
    n_gallery, height = gallery.shape[0], np.diff(columns.indptr)
    totals = query.sum(axis=1)[:, None] + gallery.sum(axis=1)
    smaller = np.empty(totals.shape)
    for start in range(0, len(smaller), _ROWS):
        stop = min(start + _ROWS, len(smaller))
        entries = slice(query.indptr[start], query.indptr[stop])
        column, value = query.indices[entries], query.data[entries]
        row = np.repeat(np.arange(stop - start), np.diff(query.indptr[start : stop + 1]))
        count = height[column]
        ends = np.cumsum(count)
        at = np.arange(ends[-1]) + np.repeat(columns.indptr[column] - (ends - count), count)
        place = np.repeat(row, count) * n_gallery + columns.indices[at]
        sums = np.bincount(place, np.minimum(np.repeat(value, count), columns.data[at]), (stop - start) * n_gallery)
        smaller[start:stop] = sums.reshape(stop - start, n_gallery)
    return 1 - smaller / (totals - smaller)
