"""What features look like: distance distributions, the modality gap of Figure 1, a modality probe, ranked lists.

Features are L2-normalized and compared by cosine distance unless `metric` is "euclidean". NumPy only. N images of P
identities with D features each; `modalities` is 0 for visible and 1 for infrared.
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
_COLUMNS = 8192
_CANCELED = 1e-7  # squared distance / squared norms below which |a|^2 + |b|^2 - 2ab has lost too many digits


def normalize(feat: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows at length 1, in float64; a row of zeros stays zero. Raises StudyError for a value that is not finite."""
    feat = np.asarray(feat, dtype=np.float64)
    if infinite := int((~np.isfinite(feat).all(axis=1)).sum()):
        raise StudyError(f"{infinite} of {len(feat)} features are not finite; the run diverged, lower its lr")
    largest = np.abs(feat).max(axis=1, keepdims=True, initial=0)  # scaled first: squares neither overflow nor vanish
    feat = feat / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(feat, axis=1, keepdims=True)
    return feat / np.where(length > 0, length, 1)


def distance_matrix(
    a: Float[np.ndarray, "A D"], b: Float[np.ndarray, "B D"], metric: Metric = "cosine"
) -> Float[np.ndarray, "A B"]:
    """Distances of all rows of `a` to all rows of `b`, float64.

    "cosine": 1 - cosine, in [0, 2]; a zero row has distance 1 to everything. "euclidean": norm of the difference of the
    rows as given. Equal rows have distance 0 exactly. Raises StudyError for a value that is not finite.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', found {metric!r}")
    a_unit, distances = normalize(a), np.empty((len(a), len(b)))
    for start in range(0, len(b), _COLUMNS):  # b is never held in float64 as a whole
        columns = slice(start, start + _COLUMNS)
        b_unit = normalize(b[columns])
        if metric == "euclidean":
            distances[:, columns] = np.sqrt(_squared(np.asarray(a, np.float64), np.asarray(b[columns], np.float64)))
        else:
            zero = np.logical_or.outer(~a_unit.any(axis=1), ~b_unit.any(axis=1))
            distances[:, columns] = np.where(zero, 1.0, np.minimum(_squared(a_unit, b_unit) / 2, 2.0))
    return distances


def _squared(a: Float[np.ndarray, "A D"], b: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "A B"]:
    norms = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    squared = np.maximum(norms - 2 * (a @ b.T), 0)
    near = squared <= _CANCELED * norms
    for row in np.flatnonzero(near.any(axis=1)):
        squared[row, near[row]] = ((a[row] - b[near[row]]) ** 2).sum(axis=1)
    return squared


@dataclass(frozen=True)
class Distribution:
    """Distances of `n` image pairs of one kind: mean, standard deviation (ddof 0), counts per histogram bin."""

    n: int
    mean: float
    std: float
    counts: Int[np.ndarray, " bins"]

    def density(self, edges: Float[np.ndarray, " edges"]) -> Float[np.ndarray, " bins"]:
        """Histogram with area 1; zeros if there are no pairs."""
        return self.counts / (max(self.n, 1) * np.diff(edges))


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
        if a.n == 0 or b.n == 0:
            return Separation(math.nan, math.nan)
        overlap = float(np.minimum(a.counts / a.n, b.counts / b.n).sum())
        gap, spread = b.mean - a.mean, math.sqrt((a.std**2 + b.std**2) / 2)
        if spread == 0:
            return Separation(overlap, math.copysign(math.inf, gap) if gap else 0.0)
        return Separation(overlap, gap / spread)


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
    n, mean, squares = np.zeros(4), np.zeros(4), np.zeros(4)
    counts = np.zeros(4 * bins, dtype=np.int64)
    for start in range(0, len(feat), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = distance_matrix(feat[rows], feat[start:], metric)
        pairs = np.triu(np.ones(block.shape, dtype=bool), k=1)
        different, cross = (values[rows, None] != values[start:] for values in (pids, modalities))
        kind, values = (2 * different + cross)[pairs], block[pairs]  # index into KINDS
        index = np.minimum((values / upper * bins).astype(np.int64), bins - 1)
        counts += np.bincount(kind * bins + index, minlength=4 * bins)
        new = np.bincount(kind, minlength=4)  # merged as in Chan et al.: sums of squares would cancel
        new_mean = np.bincount(kind, values, 4) / np.maximum(new, 1)
        gap, total = new_mean - mean, np.maximum(n + new, 1)
        squares += np.bincount(kind, (values - new_mean[kind]) ** 2, 4) + gap**2 * n * new / total
        mean += gap * new / total
        n += new
    std = np.sqrt(squares / np.maximum(n, 1))
    mean[n == 0] = std[n == 0] = np.nan
    found = zip(KINDS, n, mean, std, counts.reshape(4, bins), strict=True)
    kinds = {name: Distribution(int(n), float(mean), float(std), counts) for name, n, mean, std, counts in found}
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

    @property
    def exceeds_nearest(self) -> Bool[np.ndarray, "2 P"]:
        """Whether Figure 1 holds, seen from the visible and from the infrared center. A tie does not count."""
        return self.cross > self.nearest

    def row(self, pid: int) -> int:
        """Index of `pid`. Raises StudyError for an unknown one."""
        found = np.flatnonzero(self.pids == pid)
        if len(found) == 0:
            raise StudyError(f"pid {pid} is not a test identity; choose one of {self.pids[0]} to {self.pids[-1]}")
        return int(found[0])


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
    visible, infrared = centers[:, both] / images[:, both, None]
    cross = np.array([distance_matrix(v[None], r[None])[0, 0] for v, r in zip(visible, infrared, strict=True)])
    between = np.stack([distance_matrix(side, side) for side in (visible, infrared)])
    between[:, np.arange(len(cross)), np.arange(len(cross))] = np.nan
    return IdentityGaps(ids[both], cross, between)


def modality_gap(
    feat: Float[np.ndarray, "N D"], pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"]
) -> dict[str, float | int]:
    """Figure 1 as shares of identities: is the own other-modality center farther than other identities' centers are?

    For p with centers v_p, r_p, `nearest` is the share with d(v_p, r_p) > min over q != p of d(v_p, v_q), and likewise
    > min d(r_p, r_q); `median` and `mean` have the median and the mean over q in place of the minimum. `n`: identities.
    Source: the paper, Figure 1. Choice: it gives neither feature, nor distance, nor count.
    """
    gaps = identity_gaps(feat, pids, modalities)
    median, mean = np.nanmedian(gaps.between, axis=2), np.nanmean(gaps.between, axis=2)
    others = {"nearest": gaps.nearest, "median": median, "mean": mean}
    shares = {name: float((gaps.cross > other).all(axis=0).mean()) for name, other in others.items()}
    return {**shares, "n": len(gaps.pids)}


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
        fitted = fold != held_out
        if len(np.unique(modalities[fitted])) < 2:
            raise StudyError("the modality probe needs two identities and both modalities; give it all test images")
        direction, offset = _fit_probe(unit[fitted], modalities[fitted])
        infrared[~fitted] = unit[~fitted] @ direction > offset
    recalls = [(infrared[modalities == one] == (one == INFRARED)).mean() for one in (VISIBLE, INFRARED)]
    return float(np.mean(recalls))


def _fit_probe(unit: np.ndarray, modalities: np.ndarray) -> tuple[np.ndarray, float]:
    """Direction and threshold; a projection above the threshold means infrared."""
    weight = 0.5 / np.bincount(modalities, minlength=2)[modalities]
    center = weight @ unit
    centered = unit - center
    covariance = (centered * weight[:, None]).T @ centered
    variance = np.trace(covariance)
    if variance < 1e-20:  # equal features, up to rounding
        return np.zeros(len(covariance)), 0.0
    penalty = PROBE_RIDGE * variance / len(covariance)
    target = (weight * np.where(modalities == INFRARED, 1.0, -1.0)) @ centered
    direction = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), target)
    return direction, float(center @ direction) + 1e-9  # a projection on the threshold, up to rounding, is not above it


class Plane(NamedTuple):
    """Features in a plane (`principal_plane`), and the share of the variance along each axis."""

    points: Float[np.ndarray, "N 2"]
    explained: Float[np.ndarray, " 2"]


def principal_plane(feat: Float[np.ndarray, "N D"], metric: Metric = "cosine") -> Plane:
    """The first two principal components of the features, normalized for "cosine"; D >= 2.

    Each axis's largest weight is positive, because its sign is arbitrary. Neighbors in the plane need not be neighbors
    in full. Raises StudyError for a value that is not finite.
    """
    unit = normalize(feat)
    centered = unit if metric == "cosine" else np.asarray(feat, dtype=np.float64)
    centered = centered - centered.mean(axis=0)
    spread, vectors = np.linalg.eigh(centered.T @ centered)  # ascending
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    total = spread.sum()
    return Plane(centered @ axes, spread[:-3:-1] / total if total > 0 else np.zeros(2))


@dataclass(frozen=True)
class RankedGallery:
    """A query's ranking."""

    order: Int[np.ndarray, " R"]  # gallery index at each rank
    distances: Num[np.ndarray, " R"]
    right: Bool[np.ndarray, " R"]  # whether it shows the query's identity
    ignored: Int[np.ndarray, " I"]  # gallery indices that the protocol removes for this query, nearest first

    @property
    def average_precision(self) -> float:
        """As in metrics.retrieval_metrics; NaN without a match."""
        ranks = np.flatnonzero(self.right) + 1
        return float((np.arange(1, len(ranks) + 1) / ranks).mean()) if len(ranks) else math.nan


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
    return RankedGallery(ranked, distances[ranked], g_pids[ranked] == q_pid, order[left_out])


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
