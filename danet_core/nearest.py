"""The gallery images nearest to one query: exactly, or among the candidates of an optional faiss index.

A faiss index only proposes candidates. They are then compared as the exact search compares all, in float64 and with
equal distances by ascending index, so that a distance is the same whatever found it, but for float64's last bits.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from danet_core.distances import distance_matrix
from danet_core.files import StudyError
from danet_core.similarity import unit

Index = Literal["exact", "faiss", "faiss-hnsw"]
DESCRIPTIONS: dict[Index, str] = {
    "exact": "exact search",
    "faiss": "faiss's exact inner product",
    "faiss-hnsw": "faiss's HNSW graph: approximate, its recall is not 1, so that a nearer crop may be missing",
}
_LINKS = 32  # neighbours of a node of the graph
_BREADTH = 64  # candidates the graph is searched with, at least


def nearest(
    query: Float[np.ndarray, " D"], gallery: Float[np.ndarray, "G D"], count: int, index: Index = "exact"
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """The min(count, G) gallery rows nearest to a query by cosine distance, and these distances, ascending.

    index: "exact" compares with every row, in blocks. "faiss" takes the candidates of faiss.IndexFlatIP, which are the
    same rows but for those whose similarities float32 rounds together at the end of the list. "faiss-hnsw" takes those
    of faiss.IndexHNSWFlat: faster once it is built, which takes far longer than one exact search; its recall is not 1,
    and it may give fewer than `count`.
    Memory beside the gallery: 1 GB; with faiss two float32 copies of the gallery more, one scaled and one indexed.

    Raises StudyError for another word, a value that is not finite, or an index whose package is not installed.
    Source: faiss (Johnson et al., "Billion-scale similarity search with GPUs", 2021); HNSW (Malkov and Yashunin, 2020).
    """
    require(index)
    count = min(count, len(gallery))
    if index == "exact":
        distances = distance_matrix(query[None], gallery)[0]
        first = np.argsort(distances, kind="stable")[:count]
        return first, distances[first]
    if not (np.isfinite(query).all() and np.isfinite(gallery).all()):
        raise StudyError("a feature to search with is not finite; the model that made it diverged: train it again")
    built = build(unit(gallery.astype(np.float32, copy=False)), index, count)
    _, found = built.search(unit(query[None].astype(np.float32, copy=False)), count)
    candidates = np.unique(found[found >= 0])  # -1 where the graph found fewer
    first, distances = nearest(query, gallery[candidates], count)
    return candidates[first], distances


def require(index: str) -> None:
    """Raise StudyError for an index of another name, or one whose package is not installed."""
    if index not in get_args(Index):
        raise StudyError(f"unknown index {index!r}; expected one of {', '.join(get_args(Index))}")
    if index != "exact" and importlib.util.find_spec("faiss") is None:
        raise StudyError(
            f"the index {index} needs the package faiss, which is not installed: `make extras`, or leave the"
            " index at exact, which finds the nearest too"
        )


def build(feat: Float[np.ndarray, "G D"], index: Index, count: int) -> Any:
    """A faiss index of unit float32 features; its `search(queries, k)` gives similarities (Q, k) and rows (Q, k).

    count: the longest list that will be asked of it, which a graph is searched broadly enough for.
    The package must be installed (`require`).
    """
    import faiss

    dimensions = feat.shape[1]
    built: Any
    if index == "faiss":
        built = faiss.IndexFlatIP(dimensions)
    else:
        built = faiss.IndexHNSWFlat(dimensions, _LINKS, faiss.METRIC_INNER_PRODUCT)
        built.hnsw.efSearch = max(_BREADTH, count)
    built.add(feat)
    return built
