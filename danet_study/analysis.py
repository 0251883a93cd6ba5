"""What features look like: distance distributions, the modality gap of Figure 1, a modality probe, ranked lists.

Features are L2-normalized and compared by cosine distance unless `metric` is "euclidean". N images of P identities with
D features each; `modalities` is 0 for visible and 1 for infrared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from danet_core import INFRARED, VISIBLE
from danet_study.files import StudyError

Metric = Literal["cosine", "euclidean"]

SAME_WITHIN, SAME_CROSS = "same_within", "same_cross"
DIFFERENT_WITHIN, DIFFERENT_CROSS = "different_within", "different_cross"
KINDS: Mapping[str, str] = {  # of image pairs, in the order of figures and tables
    SAME_WITHIN: "same identity, same modality",
    SAME_CROSS: "same identity, other modality",
    DIFFERENT_WITHIN: "different identity, same modality",
    DIFFERENT_CROSS: "different identity, other modality",
}
PROBE_FOLDS = 5
PROBE_RIDGE = 1e-3  # penalty as a share of the feature's mean variance per dimension
_BLOCK = 1024  # rows per block of distances


def normalize(feat: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows at length 1, in float64; a row of zeros stays zero. Raises StudyError for a value that is not finite."""
    feat = _finite(feat)
    feat = feat / np.maximum(np.abs(feat).max(axis=1, keepdims=True, initial=0), 1e-300)  # squares may overflow
    length = np.linalg.norm(feat, axis=1, keepdims=True)
    return feat / np.where(length > 0, length, 1)


def _finite(feat: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    if infinite := int((~np.isfinite(feat).all(axis=1)).sum()):
        raise StudyError(f"{infinite} of {len(feat)} features are not finite; the run diverged, lower its lr")
    return np.asarray(feat, dtype=np.float64)


def distance_matrix(
    a: Float[np.ndarray, "A D"], b: Float[np.ndarray, "B D"], metric: Metric = "cosine"
) -> Float[np.ndarray, "A B"]:
    """Distances of all rows of `a` to all rows of `b`, float64.

    "cosine": 1 - cosine, in [0, 2], to 12 decimals; a zero row has distance 1 to everything. "euclidean": norm of
    the difference of the rows as given; a millionth of their norms counts as 0. Raises StudyError for a value that is
    not finite.
    """
    if metric == "cosine":
        return (1 - normalize(a) @ normalize(b).T).round(12)  # rounding errors would part equal rows
    assert metric == "euclidean", metric
    a, b = _finite(a), _finite(b)
    center = b.mean(axis=0)  # far from the origin the squares cancel
    a, b = a - center, b - center
    norms = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    squared = norms - 2 * (a @ b.T)
    return np.sqrt(np.where(squared > 1e-12 * norms, squared, 0))


class Distribution(NamedTuple):
    """Distances of `n` image pairs of one kind; the rest is NaN if there is none."""

    n: int
    mean: float
    std: float  # ddof 0
    density: Float[np.ndarray, " bins"]  # histogram with area 1


class Separation(NamedTuple):
    """overlap: area under the lower of two densities. d_prime: difference of means / root mean variance."""

    overlap: float
    d_prime: float


@dataclass(frozen=True)
class Distributions:
    """The four distance distributions of a feature set over common bin `edges`."""

    metric: str
    edges: Float[np.ndarray, " edges"]
    kinds: Mapping[str, Distribution]

    def separation(self, first: str, second: str) -> Separation:
        """How well two kinds come apart; NaN if one has no pairs. d_prime > 0: the second is farther on average.

        (same_cross, different_cross) is what cross-modality retrieval needs; (different_within, same_cross) Figure 1.
        """
        a, b = self.kinds[first], self.kinds[second]
        overlap = float(np.minimum(a.density, b.density) @ np.diff(self.edges))
        gap, spread = b.mean - a.mean, math.sqrt((a.std**2 + b.std**2) / 2)
        return Separation(overlap, gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0)


def distance_distributions(
    feat: Float[np.ndarray, "N D"],
    pids: Int[np.ndarray, " N"],
    modalities: Int[np.ndarray, " N"],
    *,
    metric: Metric = "cosine",
    bins: int = 100,
    upper: float | None = None,
) -> Distributions:
    """Distances of all N (N - 1) / 2 image pairs by KINDS. Cameras play no part.

    `bins` equal bins cover [0, `upper`], by default the largest possible distance; larger distances count in the last
    bin. The N x N matrix is never held. Raises StudyError for a value that is not finite.
    """
    if upper is None:
        upper = 2.0 if metric == "cosine" else 2 * float(np.linalg.norm(feat, axis=1).max(initial=0)) or 1.0
    n, sums, squares, counts = np.zeros(4), np.zeros(4), np.zeros(4), np.zeros(4 * bins)
    for start in range(0, len(feat), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = distance_matrix(feat[rows], feat[start:], metric)
        pairs = np.triu(np.ones(block.shape, dtype=bool), k=1)
        different, cross = (values[rows, None] != values[start:] for values in (pids, modalities))
        kind, values = (2 * different + cross)[pairs], block[pairs]  # index into KINDS
        index = np.minimum((values * (bins / upper)).astype(np.int64), bins - 1)
        counts += np.bincount(kind * bins + index, minlength=4 * bins)
        n += np.bincount(kind, minlength=4)
        sums += np.bincount(kind, values, 4)
        squares += np.bincount(kind, values**2, 4)
    with np.errstate(invalid="ignore"):  # 0 / 0
        mean, density = sums / n, counts.reshape(4, bins) / (n[:, None] * upper / bins)
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    found = zip(KINDS, n, mean, std, density, strict=True)
    kinds = {name: Distribution(int(n), float(mean), float(std), density) for name, n, mean, std, density in found}
    return Distributions(metric, np.linspace(0, upper, bins + 1), kinds)


@dataclass(frozen=True)
class IdentityGaps:
    """Distances between the centers of P identities, ascending pid (`identity_gaps`)."""

    pids: Int[np.ndarray, " P"]
    cross: Float[np.ndarray, " P"]  # from an identity's visible to its infrared center
    between: Float[np.ndarray, "2 P P"]  # [modality, p, q]: from p's to q's center, NaN for p itself

    @property
    def nearest(self) -> Float[np.ndarray, "2 P"]:
        """Distance to the nearest other identity's center in each modality."""
        return np.nanmin(self.between, axis=2)

    @property
    def neighbors(self) -> Int[np.ndarray, "2 P"]:
        """The pid of that identity."""
        return self.pids[np.nanargmin(self.between, axis=2)]

    def shares(self) -> dict[str, float | int]:
        """Figure 1, as `modality_gap` returns it. A tie does not count."""
        others = {"nearest": self.nearest, "median": np.nanmedian(self.between, axis=2)}
        others["mean"] = np.nanmean(self.between, axis=2)
        shares = {name: float((self.cross > other).all(axis=0).mean()) for name, other in others.items()}
        return {**shares, "n": len(self.pids)}


def identity_gaps(
    feat: Float[np.ndarray, "N D"], pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"]
) -> IdentityGaps:
    """Cosine distances between the centers of identities, across and within modalities.

    A center is the mean of an identity's normalized features in a modality. Identities without images of both are left
    out. Raises StudyError if fewer than two are left.
    """
    ids, label = np.unique(pids, return_inverse=True)
    centers, images = np.zeros((2, len(ids), feat.shape[1])), np.zeros((2, len(ids)))
    np.add.at(centers, (modalities, label), normalize(feat))
    np.add.at(images, (modalities, label), 1)
    both = images.all(axis=0)
    if both.sum() < 2:
        raise StudyError(f"the modality gap needs two identities with images of both modalities, found {both.sum()}")
    visible, infrared = centers[:, both]  # their sums: the cosine ignores lengths
    between = np.stack([distance_matrix(side, side) for side in (visible, infrared)])
    between[:, np.arange(both.sum()), np.arange(both.sum())] = np.nan
    return IdentityGaps(ids[both], distance_matrix(visible, infrared).diagonal(), between)


def modality_gap(
    feat: Float[np.ndarray, "N D"], pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"]
) -> dict[str, float | int]:
    """Figure 1 as shares of identities: is the own other-modality center farther than other identities' centers are?

    For p with centers v_p, r_p, `nearest` is the share with d(v_p, r_p) > min over q != p of d(v_p, v_q), and likewise
    > min d(r_p, r_q); `median` and `mean` have the median and the mean over q in place of the minimum. `n`: identities.
    Source: the paper, Figure 1. Choice: it gives neither feature, nor distance, nor count.
    """
    return identity_gaps(feat, pids, modalities).shares()


def modality_probe(
    feat: Float[np.ndarray, "N D"],
    pids: Int[np.ndarray, " N"],
    modalities: Int[np.ndarray, " N"],
    *,
    folds: int = PROBE_FOLDS,
) -> float:
    """Balanced accuracy of a linear probe for the modality on identities that it was not fitted to; 0.5 is chance.

    Ridge regression of the normalized features on -1 (visible) and +1 (infrared), both modalities weighted equally,
    with an intercept and the fixed penalty PROBE_RIDGE times the mean variance per dimension: nothing is tuned.
    Identities, ascending, are dealt to `folds` folds in turn; each fold is predicted by a probe fitted to the others.
    Raises StudyError for fewer than two identities or if a probe would see one modality only.
    Choice: the paper has no such number. The direction is the one of Fisher's linear discriminant, regularized.
    """
    ids, label = np.unique(pids, return_inverse=True)
    unit, fold = normalize(feat), label % min(folds, len(ids))
    infrared = np.zeros(len(unit), dtype=bool)
    for held_out in np.unique(fold):
        fitted, side = unit[fold != held_out], modalities[fold != held_out]
        if len(np.unique(side)) < 2:
            raise StudyError("the modality probe needs two identities and both modalities; give it all test images")
        weight = 0.5 / np.bincount(side, minlength=2)[side]
        center = weight @ fitted
        covariance = ((fitted - center) * weight[:, None]).T @ (fitted - center)
        variance = np.trace(covariance)
        if variance < 1e-20:  # equal features, up to rounding
            continue
        penalty = PROBE_RIDGE * variance / len(covariance) * np.eye(len(covariance))
        target = (weight * np.where(side == INFRARED, 1.0, -1.0)) @ (fitted - center)
        direction = np.linalg.solve(covariance + penalty, target)
        infrared[fold == held_out] = (unit[fold == held_out] - center) @ direction > 1e-9  # rounding is not above 0
    recalls = [(infrared[modalities == one] == (one == INFRARED)).mean() for one in (VISIBLE, INFRARED)]
    return float(np.mean(recalls))


class Plane(NamedTuple):
    """Features in a plane (`principal_plane`), and the share of the variance along each axis."""

    points: Float[np.ndarray, "N 2"]
    explained: Float[np.ndarray, " 2"]


def principal_plane(feat: Float[np.ndarray, "N D"], metric: Metric = "cosine") -> Plane:
    """The first two principal components of the features, normalized for "cosine"; D >= 2.

    Each axis's largest weight is positive, because its sign is arbitrary. Neighbors in the plane need not be neighbors
    in full. Raises StudyError for a value that is not finite.
    """
    feat = normalize(feat) if metric == "cosine" else _finite(feat)
    centered = feat - feat.mean(axis=0)
    spread, vectors = np.linalg.eigh(centered.T @ centered)  # ascending
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return Plane(centered @ axes, spread[:-3:-1] / (spread.sum() or 1))


class RankedGallery(NamedTuple):
    """A query's ranking; `average_precision` as in metrics.retrieval_metrics, NaN without a match."""

    order: Int[np.ndarray, " R"]  # gallery index at each rank
    distances: Num[np.ndarray, " R"]
    right: Bool[np.ndarray, " R"]  # whether it shows the query's identity
    ignored: Int[np.ndarray, " I"]  # gallery indices that the protocol removes for this query, nearest first
    average_precision: float


def rank_gallery(
    distances: Num[np.ndarray, " G"],
    q_pid: int,
    g_pids: Int[np.ndarray, " G"],
    ignore: Bool[np.ndarray, " G"] | None = None,
) -> RankedGallery:
    """Rank a gallery for one query: ascending distance, ties by gallery index. `ignore`: images that are not ranked."""
    order = np.argsort(distances, kind="stable")
    left_out = np.zeros(len(order), dtype=bool) if ignore is None else ignore[order]
    ranked = order[~left_out]
    right = g_pids[ranked] == q_pid
    ranks = np.flatnonzero(right) + 1
    precision = float((np.arange(1, len(ranks) + 1) / ranks).mean()) if len(ranks) else math.nan
    return RankedGallery(ranked, distances[ranked], right, order[left_out], precision)


def best_and_worst_queries(
    ap: Float[np.ndarray, " Q"],
    query: Any,
    gallery: Any,
    ignore: Bool[np.ndarray, "Q G"],
    *,
    metric: Metric = "cosine",
    count: int = 3,
    shown: int = 10,
) -> dict[str, list[dict[str, Any]]]:
    """The `count` queries of highest and of lowest average precision, with the first `shown` ranks of each.

    At most one query per identity; ties keep the order of the queries.

    Args:
        ap: average precision of each query; NaN where it has no match.
        query, gallery: protocols.Images of both sides; their `rows` name images of the store.
        ignore: pairs that the protocol removes.

    Returns:
        best, worst: lists of {row, ap, n_right, ranked: {rows, distances, right}}, ready for JSON.
    """

    def entry(index: int) -> dict[str, Any]:
        distances = distance_matrix(query.feat[index : index + 1], gallery.feat, metric)[0]
        ranked = rank_gallery(distances, int(query.pids[index]), gallery.pids, ignore[index])
        return {
            "row": int(query.rows[index]),
            "ap": round(ranked.average_precision, 6),
            "n_right": int(ranked.right.sum()),
            "ranked": {
                "rows": gallery.rows[ranked.order[:shown]].tolist(),
                "distances": ranked.distances[:shown].round(6).tolist(),
                "right": ranked.right[:shown].tolist(),
            },
        }

    valid, ends = np.flatnonzero(~np.isnan(ap)), {}
    for end, sign in (("best", -1), ("worst", 1)):
        firsts: dict[int, int] = {}  # of each identity
        for index in valid[np.argsort(sign * ap[valid], kind="stable")].tolist():
            firsts.setdefault(int(query.pids[index]), index)
        ends[end] = [entry(index) for index in list(firsts.values())[:count]]
    return ends
