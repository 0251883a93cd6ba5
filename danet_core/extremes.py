"""The queries a model answers best and worst, small enough for a record: what ranked lists are drawn from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from danet_core.distances import Metric, distance_matrix
from danet_core.files import StudyError
from danet_core.ranking import rank_gallery

COUNT = 3  # queries at each end
SHOWN = 10  # ranks of each


class Side(NamedTuple):
    """Queries or gallery: n images by their rows in the store."""

    rows: Int[np.ndarray, " n"]
    feat: Float[np.ndarray, "n D"]
    pids: Int[np.ndarray, " n"]


def extreme_queries(
    query: Side, gallery: Side, ignore: Bool[np.ndarray, "Q G"] | None = None, metric: Metric = "cosine"
) -> dict[str, Any]:
    """The COUNT queries of highest and of lowest average precision against one gallery, with their first SHOWN ranks.

    Ties by gallery index, without re-ranking. At each end a person is asked for once, by the query
    that is most extreme, and equal precisions stand in the order of the rows. Queries without a match are left out.

    Args:
        query, gallery: both sides, with the feature that retrieval uses.
        ignore: (Q, G) pairs that the protocol removes.
        metric: the distance, "cosine" or "euclidean" between the features as they are.

    Returns:
        best and worst: lists of {row, ap (a fraction), n_right (matches in the gallery), ranked: {rows, distances,
        right}}, the most extreme first; ready for JSON.

    Raises StudyError when no query has a match.
    """
    distances = distance_matrix(query.feat, gallery.feat, metric)
    ranked = [
        rank_gallery(distances[index], int(query.pids[index]), gallery.pids, None if ignore is None else ignore[index])
        for index in range(len(query.rows))
    ]
    precision = np.array([one.average_precision for one in ranked])
    valid = [index for index in np.argsort(precision, kind="stable").tolist() if not math.isnan(precision[index])]
    if not valid:
        raise StudyError(
            f"none of the {len(ranked)} queries has a match in the gallery; check that both name identities alike"
        )
    worst_of: dict[int, int] = {}
    best_of: dict[int, int] = {}
    for index in valid:
        worst_of.setdefault(int(query.pids[index]), index)
    for index in sorted(valid, key=lambda index: (-precision[index], index)):
        best_of.setdefault(int(query.pids[index]), index)

    def entry(index: int) -> dict[str, Any]:
        one = ranked[index]
        return {
            "row": int(query.rows[index]),
            "ap": one.average_precision,
            "n_right": int(one.right.sum()),
            "ranked": {
                "rows": gallery.rows[one.order[:SHOWN]].tolist(),
                "distances": [round(float(value), 6) for value in one.distances[:SHOWN]],
                "right": one.right[:SHOWN].tolist(),
            },
        }

    return {
        "best": [entry(index) for index in list(best_of.values())[:COUNT]],
        "worst": [entry(index) for index in list(worst_of.values())[:COUNT]],
    }
