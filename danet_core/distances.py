"""Distances between features: how far the same and other identities lie, within and across modalities (Figure 1).

The geometry is the one of retrieval: features are L2-normalised and compared by cosine distance, unless a function is
told otherwise. NumPy only, so that tables, figures and interactive notebooks need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_core.files import StudyError

Metric = Literal["cosine", "euclidean"]


# The four kinds of image pairs, in the order in which figures and tables show them.
SAME_WITHIN, SAME_CROSS = "same_within", "same_cross"
DIFFERENT_WITHIN, DIFFERENT_CROSS = "different_within", "different_cross"
KINDS: Mapping[str, str] = {
    SAME_WITHIN: "same identity, same modality",
    SAME_CROSS: "same identity, other modality",
    DIFFERENT_WITHIN: "different identity, same modality",
    DIFFERENT_CROSS: "different identity, other modality",
}

_BLOCK = 1024  # rows per block of the pairwise loop: 8 MiB of float64 distances at a time
_COLUMNS = 8192  # rows of the second set at a time: 128 MiB of 2,048 float64 each
_EXACT_BELOW = 1e-7  # squared distance / squared norms below which the difference of the two vectors is taken directly


@dataclass(frozen=True)
class Distribution:
    """Distances of one kind of image pairs: `n` pairs, mean, standard deviation (ddof 0), counts per histogram bin."""

    n: int
    mean: float
    std: float
    counts: Int[np.ndarray, " bins"]

    def density(self, edges: Float[np.ndarray, " edges"]) -> Float[np.ndarray, " bins"]:
        """Histogram as a density over `edges` (area 1); zeros where there are no pairs."""
        return self.counts / (max(self.n, 1) * np.diff(edges))


@dataclass(frozen=True)
class Separation:
    """How well two distributions come apart.

    overlap: area under the lower of the two densities, 0 apart and 1 alike, at the resolution of the bins.
    d_prime: (mean of the second - mean of the first) / root of the mean of the two variances; negative when the second
    lies nearer.
    """

    overlap: float
    d_prime: float


@dataclass(frozen=True)
class Distributions:
    """The four distance distributions of one feature set; `edges` (bins + 1,) are common to all four."""

    metric: str
    edges: Float[np.ndarray, " edges"]
    kinds: Mapping[str, Distribution]

    def separation(self, first: str, second: str) -> Separation:
        """Separation of two of the four kinds; NaN where one of them has no pairs.

        The pairs that matter: (same_within, different_within) and (same_cross, different_cross) are what retrieval
        within and across modalities lives on; (different_within, same_cross) is Figure 1's claim, true in the mean
        where its d_prime is positive.
        """
        a, b = self.kinds[first], self.kinds[second]
        if a.n == 0 or b.n == 0:
            return Separation(float("nan"), float("nan"))
        overlap = float(np.minimum(a.counts / a.n, b.counts / b.n).sum())
        gap, spread = b.mean - a.mean, float(np.sqrt((a.std**2 + b.std**2) / 2))
        if spread > 0:
            return Separation(overlap, gap / spread)
        return Separation(overlap, 0.0 if gap == 0 else float(np.copysign(np.inf, gap)))


@dataclass(frozen=True)
class IdentityClaims:
    """Figure 1's claim for each of P identities (see `identity_claims`); arrays are ordered by ascending pid.

    cross: distance between the identity's visible and infrared centres.
    nearest_visible, nearest_infrared: distance from its centre to the nearest other identity's centre of that modality.
    neighbour_visible, neighbour_infrared: the pid of that other identity.
    between: [modality, p, q] distance between the centres of p and q in that modality, infinite for p itself.
    """

    pids: Int[np.ndarray, " P"]
    cross: Float[np.ndarray, " P"]
    nearest_visible: Float[np.ndarray, " P"]
    nearest_infrared: Float[np.ndarray, " P"]
    neighbour_visible: Int[np.ndarray, " P"]
    neighbour_infrared: Int[np.ndarray, " P"]
    between: Float[np.ndarray, "2 P P"]

    def row(self, pid: int) -> int:
        """Where `pid` stands in the arrays. Raises StudyError when it is none of the identities."""
        found = np.flatnonzero(self.pids == pid)
        if len(found) == 0:
            raise StudyError(
                f"identity {pid} is not among the {len(self.pids)} test identities "
                f"({self.pids[0]} to {self.pids[-1]}); choose one of them"
            )
        return int(found[0])

    @property
    def holds_visible(self) -> Bool[np.ndarray, " P"]:
        """Whether the claim holds seen from the visible centre."""
        return self.cross > self.nearest_visible

    @property
    def holds_infrared(self) -> Bool[np.ndarray, " P"]:
        """Whether the claim holds seen from the infrared centre."""
        return self.cross > self.nearest_infrared


@dataclass(frozen=True)
class Plane:
    """Points of N features in a plane (`principal_plane`), and the share of the variance along each of its axes."""

    points: Float[np.ndarray, "N 2"]
    explained: Float[np.ndarray, " 2"]


def normalise(feat: Float[np.ndarray, "N D"], first: int = 0) -> Float[np.ndarray, "N D"]:
    """Rows of `feat` scaled to length 1, in float64; a row of zeros has no direction and stays zero.

    Raises StudyError for a value that is not finite, counting rows from `first`.
    """
    feat = feat.astype(np.float64)
    finite = np.isfinite(feat).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise StudyError(
            f"feature row {first + row} holds a value that is not finite ({int((~finite).sum())} of {len(feat)} do);"
            " the model that made it diverged: train it again with a lower learning rate"
        )
    # Scaling by the largest value first keeps the squares of very large and very small features in range.
    largest = np.abs(feat).max(axis=1, keepdims=True, initial=0.0)
    feat = feat / np.where(largest > 0, largest, 1.0)
    length = np.linalg.norm(feat, axis=1, keepdims=True)
    return feat / np.where(length > 0, length, 1.0)


def distance_matrix(
    a: Float[np.ndarray, "A D"], b: Float[np.ndarray, "B D"], metric: Metric = "cosine"
) -> Float[np.ndarray, "A B"]:
    """Distances of every row of `a` to every row of `b`, float64; memory: the result, `a` in float64, and 1 GB.

    "cosine": 1 - cosine of the angle, in [0, 2]; lengths do not matter; a zero row is at distance 1 from everything.
    "euclidean": L2 norm of the difference of the rows as given (not normalised).
    Equal rows are at distance 0 exactly and near ones lose no digits: small distances are not left to the
    cancellation of |a|^2 + |b|^2 - 2ab, but recomputed from the difference.
    Raises StudyError for an unknown metric or a value that is not finite.
    """
    if metric not in get_args(Metric):
        raise StudyError(f"unknown distance {metric!r}; expected one of cosine, euclidean")
    if metric == "euclidean":
        for name, feat in (("a", a), ("b", b)):
            if not np.isfinite(feat).all():
                raise StudyError(
                    f"feature set {name} holds a value that is not finite; the model that made it diverged"
                )
    a = normalise(a) if metric == "cosine" else a.astype(np.float64)
    distances = np.empty((len(a), len(b)))
    for start in range(0, len(b), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        if metric == "euclidean":
            distances[:, columns] = np.sqrt(_squared_distances(a, b[columns].astype(np.float64)))
            continue
        unit = normalise(b[columns], start)
        # For unit vectors 1 - cos = |a - b|^2 / 2; for a zero row it is 1 by the definition above.
        zero = np.logical_or.outer(~a.any(axis=1), ~unit.any(axis=1))  # (A, columns)
        distances[:, columns] = np.where(zero, 1.0, np.minimum(_squared_distances(a, unit) / 2, 2.0))
    return distances


def distance_distributions(
    feat: Float[np.ndarray, "N D"],
    pids: Int[np.ndarray, " N"],
    modalities: Int[np.ndarray, " N"],
    *,
    metric: Metric = "cosine",
    bins: int = 100,
    upper: float | None = None,
) -> Distributions:
    """Distances of all N (N - 1) / 2 image pairs, split into same or different identity x same or other modality.

    modalities: 0 visible, 1 infrared. Pairs are unordered, an image is never paired with itself, and cameras play no
    part, so that images of one camera taken moments apart count too.
    `bins` equal bins cover [0, `upper`]; the default is the largest distance possible (cosine 2, euclidean twice the
    greatest norm), and a larger distance falls into the last bin. Give panels that are compared one `upper`.
    Memory: one block of distances, never the whole N x N matrix.
    Raises StudyError for lengths that differ, a modality other than 0 and 1, or a value that is not finite.
    """
    _check(feat, pids, modalities)
    if upper is None:
        upper = 2.0 if metric == "cosine" else 2.0 * float(np.linalg.norm(feat, axis=1).max(initial=0.0)) or 1.0
    edges = np.linspace(0.0, upper, bins + 1)
    tallies = {kind: _Tally(bins) for kind in KINDS}
    for start in range(0, len(feat), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(feat)))
        block = distance_matrix(feat[rows], feat[start:], metric)  # (b, N - start): the rest of the upper triangle
        upper_triangle = np.triu(np.ones(block.shape, dtype=bool), k=1)
        same = pids[rows, None] == pids[None, start:]
        cross = modalities[rows, None] != modalities[None, start:]
        index = np.minimum((block / upper * bins).astype(np.int64), bins - 1)
        for kind, mask in (
            (SAME_WITHIN, same & ~cross),
            (SAME_CROSS, same & cross),
            (DIFFERENT_WITHIN, ~same & ~cross),
            (DIFFERENT_CROSS, ~same & cross),
        ):
            chosen = mask & upper_triangle
            tallies[kind].add(block[chosen], index[chosen])
    return Distributions(metric, edges, {kind: tally.result() for kind, tally in tallies.items()})


def identity_claims(
    feat: Float[np.ndarray, "N D"], pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"]
) -> IdentityClaims:
    """Figure 1's claim: is an identity's other-modality centre farther than the nearest same-modality other identity?

    Features are L2-normalised; the centre of an identity in a modality is the mean of its normalised features there;
    distances between centres are cosine distances. For identity p with centres v_p (visible) and r_p (infrared), true
        from the visible side    if d(v_p, r_p) > min over q != p of d(v_p, v_q),
        from the infrared side   if d(v_p, r_p) > min over q != p of d(r_p, r_q),
    A tie does not count.

    modalities: 0 visible, 1 infrared. Every identity needs an image of both; raises StudyError naming the pid and the
    modality that is missing, or when there are fewer than two identities.
    Source: the paper, Figure 1 and its caption. Choice: the paper gives neither feature, nor distance, nor count.
    """
    _check(feat, pids, modalities)
    ids, label = np.unique(pids, return_inverse=True)
    if len(ids) < 2:
        raise StudyError(f"Figure 1's claim compares identities, and the features hold {len(ids)}; expected at least 2")
    centres = np.zeros((2, len(ids), feat.shape[1]))  # (modality, P, D)
    images = np.zeros((2, len(ids)), dtype=np.int64)
    for start in range(0, len(feat), _COLUMNS):
        rows = slice(start, start + _COLUMNS)
        np.add.at(centres, (modalities[rows], label[rows]), normalise(feat[rows], start))
    np.add.at(images, (modalities, label), 1)
    if not images.all():
        modality, row = (int(index[0]) for index in np.nonzero(images == 0))
        raise StudyError(
            f"pid {int(ids[row])} has no {MODALITIES[modality]} image among the {len(feat)} features "
            f"({int((images == 0).any(axis=0).sum())} identities lack a modality); Figure 1's claim needs both: "
            "drop the identity in data_prep or restore its images"
        )
    centres /= images[:, :, None]
    cross = np.array([distance_matrix(v[None], r[None])[0, 0] for v, r in zip(*centres, strict=True)])
    between = np.stack([distance_matrix(centres[modality], centres[modality]) for modality in (VISIBLE, INFRARED)])
    between[:, np.arange(len(ids)), np.arange(len(ids))] = np.inf
    nearest, neighbour = between.min(axis=2), ids[between.argmin(axis=2)]  # (modality, P) each
    return IdentityClaims(
        ids, cross, nearest[VISIBLE], nearest[INFRARED], neighbour[VISIBLE], neighbour[INFRARED], between
    )


def centre_claim(
    feat: Float[np.ndarray, "N D"], pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"]
) -> dict[str, float | int]:
    """The share of identities for which Figure 1's claim holds, as an evaluation record stores it.

    share_visible, share_infrared: seen from the visible and from the infrared centre; share: from both sides at once;
    n_identities: how many identities that is out of. The claim, its geometry and its errors: see `identity_claims`.
    A share of 0 means that the modality gap never exceeds the distance to a neighbour, 1 that it always does.
    """
    claims = identity_claims(feat, pids, modalities)
    visible, infrared = claims.holds_visible, claims.holds_infrared
    return {
        "share": float((visible & infrared).mean()),
        "share_visible": float(visible.mean()),
        "share_infrared": float(infrared.mean()),
        "n_identities": len(claims.pids),
    }


def principal_plane(feat: Float[np.ndarray, "N D"], metric: Metric = "cosine") -> Plane:
    """Features on the plane in which they spread most: their first two principal components, D >= 2.

    "cosine": the rows are L2-normalised first, so that the plane is one of the space that is searched; "euclidean": as
    they are. The components are the right singular vectors of the centred features, taken as eigenvectors of their
    D x D scatter matrix, which is a third of the time of the SVD; a component's largest weight is made positive, since
    its sign is free otherwise. Distances in the plane are smaller than in full, so that neighbours in it need be none.
    Raises StudyError for an unknown metric or a value that is not finite.
    """
    if metric not in get_args(Metric):
        raise StudyError(f"unknown distance {metric!r}; expected one of cosine, euclidean")
    unit = normalise(feat)  # which also refuses what is not finite
    centred = unit if metric == "cosine" else feat.astype(np.float64)
    centred = centred - centred.mean(axis=0)
    spread, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = vectors[:, :-3:-1]  # (D, 2)
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    total = spread.sum()
    return Plane(centred @ axes, spread[:-3:-1] / total if total > 0 else np.zeros(2))


class _Tally:
    """Count, mean, variance and histogram of distances that arrive in blocks (Chan et al.'s pairwise update)."""

    def __init__(self, bins: int) -> None:
        self.n, self.mean, self.squares = 0, 0.0, 0.0
        self.counts = np.zeros(bins, dtype=np.int64)

    def add(self, values: Float[np.ndarray, " n"], index: Int[np.ndarray, " n"]) -> None:
        if not len(values):
            return
        mean, total = float(values.mean()), self.n + len(values)
        gap = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + gap**2 * self.n * len(values) / total
        self.mean += gap * len(values) / total
        self.n = total
        self.counts += np.bincount(index, minlength=len(self.counts))

    def result(self) -> Distribution:
        if not self.n:
            return Distribution(0, float("nan"), float("nan"), self.counts)
        return Distribution(self.n, self.mean, float(np.sqrt(self.squares / self.n)), self.counts)


def _squared_distances(a: Float[np.ndarray, "A D"], b: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "A B"]:
    norms = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :]  # (A, B)
    squared = np.maximum(norms - 2.0 * (a @ b.T), 0.0)
    near_a, near_b = np.nonzero(squared <= _EXACT_BELOW * norms)
    step = max(
        1, 2**21 // max(1, a.shape[1])
    )  # pairs at a time: 16 MiB of differences even when everything has collapsed
    for start in range(0, len(near_a), step):
        i, j = near_a[start : start + step], near_b[start : start + step]
        squared[i, j] = ((a[i] - b[j]) ** 2).sum(axis=1)
    return squared


def _check(feat: np.ndarray, pids: np.ndarray, modalities: np.ndarray) -> None:
    if not len(feat) == len(pids) == len(modalities):
        raise StudyError(
            "features, pids and modalities must have one entry per image; "
            f"found {len(feat)}, {len(pids)} and {len(modalities)}"
        )
    strange = np.setdiff1d(modalities, (VISIBLE, INFRARED))
    if len(strange):
        raise StudyError(f"modality {int(strange[0])} is unknown; expected 0 (visible) or 1 (infrared)")
