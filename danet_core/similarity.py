"""What a gallery is ranked by: distances between queries and gallery images, for a block of queries at a time.

Features are multiplied in float32 (float64 if either side is float64), on the host. The rows of one matrix product are
settled by the size of the gallery alone. Against one product of everything, or another BLAS, the last bit of a distance
may differ, and with it the order of images that rounding cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from danet_core.files import StudyError
from danet_core.metrics import as_array, as_ints, query_blocks

Distance = Literal["cosine", "euclidean"]
Distances = Callable[[slice], np.ndarray]  # from a block of queries to numbers (rows, G) in the order of distances

# Rows of one matrix product: with fewer than 256 the time goes into reading the gallery, half of it with 20.
_PRODUCT_PAIRS = 2**21
_PRODUCT_ROWS = 256
WIDEST_PRODUCT = 2**26  # pairs, 256 MB of float32, which caps the rows beyond 262,144 gallery images
_NUMBERS = 2**20  # of features, scaled at a time


@dataclass(frozen=True)
class Images:
    """Features (N, D), float32 or float64 and finite, with their identities (N,)."""

    feat: np.ndarray
    pids: np.ndarray

    @classmethod
    def of(cls, feat: Any, pids: Any, side: str) -> Images:
        prefix = f"{side}_" if side else ""
        feat = as_array(feat, f"{prefix}feat", ndim=2)
        feat = feat.astype(np.promote_types(feat.dtype, np.float32), copy=False)
        finite = np.isfinite(feat).all(axis=1)
        if not finite.all():
            raise StudyError(
                f"{prefix}feat has NaN or infinite values, first in row {int(np.argmin(finite))} of {len(feat)};"
                " the model that made these features has diverged, and its distances have no order"
            )
        return cls(feat, as_ints(pids, f"{prefix}pids", len(feat)))


def streamed(query: Images, gallery: Images, distance: Distance = "cosine") -> Distances:
    """The distances of a block of queries from the whole gallery, multiplied when they are asked for.

    Only the order is used, so "cosine" gives minus the similarity (1 - s would round near ties together), and
    "euclidean" half the squared distance less the query's own part. That one is measured in float64 from the gallery's
    mean, because a difference of squares cancels: float32 features far from the origin would be ranked by rounding.
    """
    _refuse_no_pairs(query, gallery)
    q_feat, g_feat = query.feat, gallery.feat
    if distance == "cosine":
        return _multiplied(lambda rows: unit(q_feat[rows]), unit(g_feat), 0)
    if distance == "euclidean":
        centre = g_feat.mean(axis=0, dtype=np.float64)
        g_part = g_feat - centre
        return _multiplied(lambda rows: q_feat[rows] - centre, g_part, np.einsum("gd,gd->g", g_part, g_part) / 2)
    raise StudyError(f"distance must be 'cosine' or 'euclidean', found {distance!r}")


def _multiplied(q_part: Callable[[slice], np.ndarray], g_part: np.ndarray, offset: np.ndarray | int) -> Distances:
    """`offset` less the products of the queries' rows with the gallery's."""
    as_one = _equal_columns(g_part)

    def distances(rows: slice) -> np.ndarray:
        block = q_part(rows) @ g_part.T
        np.subtract(offset, block, out=block)
        return as_one(block)

    return distances


def _equal_columns(feat: Float[np.ndarray, "N D"]) -> Callable[[np.ndarray], np.ndarray]:
    """What makes the columns of a block of distances from `feat` equal where its rows are.

    A matrix product may round equal columns differently, by their place in it; equal features must tie.
    """
    same = first_equal(feat)
    all_differ = bool((same == np.arange(len(same))).all())
    return lambda block: block if all_differ else block[:, same]


def both_ways(first: Images, second: Images) -> tuple[Distances, Distances]:
    """Cosine distances of `first` from `second`, as `streamed` gives them, and of `second` from `first`: one matrix.

    All pairs are held: meant for at most WIDEST_PRODUCT of them.
    """
    _refuse_no_pairs(first, second)
    first_unit = unit(first.feat)
    forth = _multiplied(first_unit.__getitem__, unit(second.feat), 0)
    matrix = np.empty((len(first.pids), len(second.pids)), np.result_type(first.feat, second.feat))
    for rows in product_blocks(*matrix.shape):
        matrix[rows] = forth(rows)
    as_one = _equal_columns(first_unit)
    # A sort of columns would be slow.
    return matrix.__getitem__, lambda rows: as_one(np.ascontiguousarray(matrix.T[rows]))


def product_blocks(n_query: int, n_gallery: int) -> Iterator[slice]:
    """Slices of the queries that are multiplied with the gallery at once."""
    return query_blocks(n_query, n_gallery, max(_PRODUCT_PAIRS, min(_PRODUCT_ROWS * n_gallery, WIDEST_PRODUCT)))


def unit(feat: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows at unit length; a zero row stays zero (it is at right angles to everything).

    A row's result depends on that row alone. Memory: the result and a few MB, whatever N.
    """
    scaled = np.empty(feat.shape, feat.dtype)
    step = max(1, _NUMBERS // max(1, feat.shape[1]))
    for start in range(0, len(feat), step):
        rows = slice(start, start + step)
        # The largest value is taken out first, so that squares neither overflow nor vanish.
        largest = np.abs(feat[rows]).max(axis=1, keepdims=True, initial=0)
        np.divide(feat[rows], np.where(largest > 0, largest, 1), out=scaled[rows])
        length = np.linalg.norm(scaled[rows], axis=1, keepdims=True)
        scaled[rows] /= np.where(length > 0, length, 1)
    return scaled


def first_equal(feat: Float[np.ndarray, "N D"]) -> Int[np.ndarray, " N"]:
    """(N,) for each row the index of the first row with the same bytes."""
    # Rows that begin as no other does are done; of the rest, those of one hash are few and compared in full. Kept as
    # bytes, all rows would be a second copy of the features.
    result = np.arange(len(feat))
    begins = np.ascontiguousarray(feat[:, :1]).view(np.uint8).reshape(len(feat), -1)
    _, kind, count = np.unique(begins, axis=0, return_inverse=True, return_counts=True)
    rows_of: dict[int, list[int]] = {}
    for index in np.flatnonzero(count[kind.reshape(-1)] > 1).tolist():
        content = feat[index].tobytes()
        firsts = rows_of.setdefault(hash(content), [])
        equal = [first for first in firsts if feat[first].tobytes() == content]
        result[index] = equal[0] if equal else index
        firsts += [] if equal else [index]
    return result


def _refuse_no_pairs(query: Images, gallery: Images) -> None:
    if query.feat.shape[1] != gallery.feat.shape[1]:
        raise StudyError(
            f"query features have {query.feat.shape[1]} dimensions and gallery features {gallery.feat.shape[1]};"
            " both must come from the same model"
        )
    query_blocks(len(query.pids), len(gallery.pids))  # raises where there is none
