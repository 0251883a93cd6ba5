"""One query's ranked gallery, image by image: what a ranked list shows. Scores over all queries are metrics.py's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Integer, Num

from danet_core.files import StudyError


@dataclass(frozen=True)
class RankedGallery:
    """A gallery as one query ranks it: R images nearest first, and I images that the protocol takes out of the ranking.

    order: gallery index at each rank. distances: its distance to the query, in the unit it was given in.
    right: whether it shows the query's identity. ignored: gallery indices never ranked, nearest first.
    """

    order: Int[np.ndarray, " R"]
    distances: Num[np.ndarray, " R"]
    right: Bool[np.ndarray, " R"]
    ignored: Int[np.ndarray, " I"]

    @property
    def match_ranks(self) -> Int[np.ndarray, " M"]:
        """Ranks of the right images, from 1, ascending."""
        return np.flatnonzero(self.right) + 1

    @property
    def average_precision(self) -> float:
        """AP of this query as a fraction: mean over the right images of (right images so far) / rank; NaN without one.

        Source: metrics.retrieval_metrics, whose mAP is the mean of these over the queries with a match.
        """
        ranks = self.match_ranks
        return float((np.arange(1, len(ranks) + 1) / ranks).mean()) if len(ranks) else float("nan")


def rank_gallery(
    distances: Num[np.ndarray, " G"],
    q_pid: int,
    g_pids: Integer[np.ndarray, " G"],
    ignore: Bool[np.ndarray, " G"] | None = None,
) -> RankedGallery:
    """Rank a gallery for one query: ascending distance, equal distances by ascending gallery index.

    Args:
        distances: (G,) distance of each gallery image to the query, smaller is closer; any unit.
        q_pid: identity of the query.
        g_pids: (G,) identities of the gallery images.
        ignore: (G,) images that the protocol removes for this query (protocols.same_place): neither matches nor
            distractors, and named apart. None removes nothing.

    Raises StudyError when a distance is NaN, which has no rank, or the lengths differ.
    """
    ignore = np.zeros(len(distances), dtype=bool) if ignore is None else ignore
    if not len(distances) == len(g_pids) == len(ignore):
        raise StudyError(
            "distances, g_pids and ignore must have one entry per gallery image; "
            f"found {len(distances)}, {len(g_pids)} and {len(ignore)}"
        )
    if distances.dtype.kind == "f" and np.isnan(distances).any():
        raise StudyError(
            f"the distance to gallery image {int(np.argmax(np.isnan(distances)))} is NaN, which has no rank; "
            "look for NaN in the features (a diverged run)"
        )
    order = np.argsort(distances, kind="stable")
    left_out = ignore[order]
    ranked = order[~left_out]
    return RankedGallery(ranked, distances[ranked], g_pids[ranked] == q_pid, order[left_out])
