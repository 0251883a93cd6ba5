"""Slow reference implementations, written from the paper's equations and the protocols' rules, one loop per sum or set.

They share no code with danet_core. The losses take torch tensors and are differentiable through every loop; the
retrieval scores use plain Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean; a plain zero (no gradient) for equal vectors, where the norm has no derivative."""
    square = ((a - b) ** 2).sum()
    return square.sqrt() if float(square.detach()) > 0 else square.detach()


def value_of(number: Tensor) -> float:
    return float(number.detach())


def hinge(value: Tensor) -> Tensor:
    return value if float(value.detach()) > 0 else 0 * value


def triplet(
    feat: Tensor, margin: float, positive: Callable[[int, int], bool], negative: Callable[[int, int], bool]
) -> Tensor:
    count = len(feat)
    total = feat.new_zeros(())
    for i in range(count):
        farthest = max((distance(feat[i], feat[j]) for j in range(count) if positive(i, j)), key=value_of)
        nearest = min((distance(feat[i], feat[k]) for k in range(count) if negative(i, k)), key=value_of)
        total = total + hinge(margin - nearest + farthest)
    return total / count


def eq1(feat: Tensor, y: Sequence[int], margin: float) -> Tensor:
    return triplet(feat, margin, lambda i, j: y[i] == y[j], lambda i, k: y[i] != y[k])


def eq2(feat: Tensor, y: Sequence[int], s: Sequence[int], margin: float) -> Tensor:
    return triplet(feat, margin, lambda i, j: y[i] == y[j] and s[i] != s[j], lambda i, k: y[i] != y[k] and s[i] != s[k])


def eq3(feat: Tensor, y: Sequence[int], s: Sequence[int], margin: float, negatives: str) -> tuple[Tensor, Tensor]:
    """Pull and push, each a mean over the anchors."""
    count = len(feat)
    pull, push = feat.new_zeros(()), feat.new_zeros(())
    for i in range(count):
        members = [feat[j] for j in range(count) if y[j] == y[i] and s[j] != s[i]]
        centre = sum(members[1:], start=members[0]) / len(members)
        wanted = s[i] if negatives == "anchor" else 1 - s[i]
        nearest = min(
            (distance(centre, feat[k]) for k in range(count) if y[k] != y[i] and s[k] == wanted), key=value_of
        )
        pull = pull + distance(feat[i], centre)
        push = push + hinge(margin - nearest)
    return pull / count, push / count


def softmax(row: Tensor) -> Tensor:
    weights = (row - row.max().detach()).exp()
    return weights / weights.sum()


def eq4(visible: Tensor, infrared: Tensor, y: Sequence[int], s: Sequence[int]) -> Tensor:
    total = visible.new_zeros(())
    for modality, logits in ((0, visible), (1, infrared)):
        rows = [i for i in range(len(y)) if s[i] == modality]
        for i in rows:
            total = total - softmax(logits[i])[y[i]].log() / len(rows)
    return total


def eq5(visible: Tensor, infrared: Tensor, s: Sequence[int]) -> Tensor:
    total = visible.new_zeros(())
    for modality, first, second in ((0, infrared, visible), (1, visible, infrared)):
        rows = [i for i in range(len(s)) if s[i] == modality]
        for i in rows:
            p, q = softmax(first[i]), softmax(second[i])
            for c in range(len(p)):
                total = total + p[c] * (p[c] / q[c]).log() / len(rows)
    return total


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
