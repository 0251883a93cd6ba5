"""The queries a model answers best and worst, small enough for a record: what ranked lists are drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from danet_core.distances import Metric, distance_matrix
from danet_core.files import StudyError
from danet_core.ranking import RankedGallery, rank_gallery

COUNT = 3  # queries at each end
SHOWN = 10  # ranks of each
_PAIRS = 2**25  # distances at a time, 256 MB: enough queries that the gallery is seldom brought to float64 anew


class Side(NamedTuple):
    """Queries or gallery: n images by their rows in the store."""

    rows: Int[np.ndarray, " n"]
    feat: Float[np.ndarray, "n D"]
    pids: Int[np.ndarray, " n"]


def extreme_queries(
    query: Side,
    gallery: Side,
    ignore: Callable[[slice], np.ndarray] | None = None,
    metric: Metric = "cosine",
) -> dict[str, Any]:
    """The COUNT queries of highest and of lowest average precision against one gallery, with their first SHOWN ranks.

    Ties by gallery index, without re-ranking. At each end a person is asked for once, by the query
    that is most extreme, and equal precisions stand in the order of the rows. Queries without a match are left out.
    Memory: the gallery and a block of distances; of a query no more is kept than an entry.

    Args:
        query, gallery: both sides, with the feature that retrieval uses.
        ignore: for a block of queries, the pairs (rows, G) that the protocol removes, True; None removes none.
        metric: the distance, "cosine" or "euclidean" between the features as they are.

    Returns:
        best and worst: lists of {row, ap (a fraction), n_right (matches in the gallery), ranked: {rows, distances,
        right}}, the most extreme first; ready for JSON.

    Raises StudyError when no query has a match.
    """
    entries: list[dict[str, Any]] = []
    step = max(1, _PAIRS // max(1, len(gallery.rows)))
    for start in range(0, len(query.rows), step):
        rows = slice(start, min(start + step, len(query.rows)))
        distances = distance_matrix(query.feat[rows], gallery.feat, metric)
        left_out = None if ignore is None else ignore(rows)
        for at, index in enumerate(range(rows.start, rows.stop)):
            pid, ignored = int(query.pids[index]), None if left_out is None else left_out[at]
            ranked = rank_gallery(distances[at], pid, gallery.pids, ignored)
            entries.append(_entry(int(query.rows[index]), ranked, gallery))
    precision = [entry["ap"] for entry in entries]
    valid = [index for index in np.argsort(precision, kind="stable").tolist() if not math.isnan(precision[index])]
    if not valid:
        raise StudyError(
            f"none of the {len(entries)} queries has a match in the gallery; check that both name identities alike"
        )
    worst_of: dict[int, int] = {}
    best_of: dict[int, int] = {}
    for index in valid:
        worst_of.setdefault(int(query.pids[index]), index)
    for index in sorted(valid, key=lambda index: (-precision[index], index)):
        best_of.setdefault(int(query.pids[index]), index)

    return {
        "best": [entries[index] for index in list(best_of.values())[:COUNT]],
        "worst": [entries[index] for index in list(worst_of.values())[:COUNT]],
    }


def _entry(row: int, ranked: RankedGallery, gallery: Side) -> dict[str, Any]:
    """What the record keeps of one query, which is row `row` of the store."""
    return {
        "row": row,
        "ap": ranked.average_precision,
        "n_right": int(ranked.right.sum()),
        "ranked": {
            "rows": gallery.rows[ranked.order[:SHOWN]].tolist(),
            "distances": [round(float(value), 6) for value in ranked.distances[:SHOWN]],
            "right": ranked.right[:SHOWN].tolist(),
        },
    }
