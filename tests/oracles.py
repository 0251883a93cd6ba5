"""Slow reference implementations, written from the protocols' rules, one loop per sum or set, in plain Python numbers.

They share no code with danet_core. Those of the losses are danet_core/slow.py, which the method notebook shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def retrieval(
    dist: Sequence[Sequence[float]],
    q_pids: Sequence[int],
    g_pids: Sequence[int],
    ignored: Callable[[int, int], bool] = lambda q, g: False,
    level: str = "identity",
    ranks: int | None = None,
) -> dict[str, Any] | None:
    """CMC (`ranks` long), mAP, mINP and the number of valid queries; None where no query is valid."""
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
    return {
        "cmc": [hit / len(aps) for hit in hits],
        "mAP": math.fsum(aps) / len(aps),
        "mINP": math.fsum(inps) / len(inps),
        "n_valid": len(aps),
    }
