"""CMC, mAP and mINP of ranked galleries.

`rank_positions` sorts each query's gallery once. `score_queries` scores any gallery that is a subset of the sorted
images, so that all galleries of a protocol share one sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Num

CmcLevel = Literal["identity", "image"]
REMOVED = 2**30 - 1  # position of an image that the protocol removes; twice this and 1 more still fits int32
PAIRS = 2**22  # query-gallery pairs at a time: 32 MB of float64 distances


class QueryScores(NamedTuple):
    """Scores of each query against one gallery."""

    ap: Float[np.ndarray, " Q"]  # average precision, NaN without a match
    inp: Float[np.ndarray, " Q"]  # inverse negative penalty, NaN without a match
    first: Int[np.ndarray, " Q"]  # rank of the first match from 1, in identities or images; 0 without a match
    chance: Float[np.ndarray, " Q"]  # share of matches among the ranked images: expected Rank-1 of a random ranking


@dataclass(frozen=True)
class RetrievalMetrics:
    """Scores of one ranking, as fractions; `ap` and `inp` are NaN and `rank1` is False for a query without a match."""

    cmc: Float[np.ndarray, " R"]  # rank k at index k - 1; R gallery identities ("identity") or images ("image")
    mAP: float  # image-level, as mINP
    mINP: float
    n_valid: int  # queries that have a match
    ap: Float[np.ndarray, " Q"]
    inp: Float[np.ndarray, " Q"]
    rank1: Bool[np.ndarray, " Q"]
    valid: Bool[np.ndarray, " Q"]
    chance_rank1: float  # the Rank-1 to expect from a random ranking


def retrieval_metrics(
    distmat: Num[Any, "Q G"],
    q_pids: Integer[Any, " Q"],
    g_pids: Integer[Any, " G"],
    *,
    ignore: Bool[Any, "Q G"] | None = None,
    cmc: CmcLevel = "identity",
) -> RetrievalMetrics:
    """CMC, mAP and mINP of a distance matrix.

    Each query ranks the gallery by ascending distance, ties by ascending gallery index. With m matches at ranks
    r_1 < ... < r_m among the images left to the query: AP = 1/m sum_j j / r_j and INP = m / r_m. CMC at k is the share
    of queries whose first match is among the first k images ("image") or the first k distinct identities in order of
    first appearance ("identity"). Queries without a match are skipped.

    Args:
        distmat: (Q, G) distances, arrays or tensors, any unit; +inf is last, not removed.
        q_pids, g_pids: identities.
        ignore: (Q, G) pairs removed from the ranking: neither matches nor distractors.
        cmc: "identity" (SYSU-MM01) or "image" (RegDB).

    Raises ValueError for shapes that disagree, an empty gallery, a NaN distance, or if no query has a match.
    Source: AP and CMC as in the evaluation code of SYSU-MM01 and of Market-1501; INP as in Ye et al., "Deep Learning
    for Person Re-identification: A Survey and Outlook", 2021.
    """
    distmat, q_pids, g_pids = to_numpy(distmat), to_numpy(q_pids), to_numpy(g_pids)
    if distmat.shape != (len(q_pids), len(g_pids)):
        raise ValueError(f"distmat has shape {distmat.shape} for {len(q_pids)} q_pids and {len(g_pids)} g_pids")
    if ignore is not None and (ignore := to_numpy(ignore)).shape != distmat.shape:
        raise ValueError(f"ignore has shape {ignore.shape}, distmat {distmat.shape}")
    parts = []
    for rows in query_blocks(*distmat.shape):
        positions = rank_positions(distmat[rows], None if ignore is None else ignore[rows])
        parts.append(score_queries(positions, q_pids[rows], g_pids, cmc))
    return average(parts, len(np.unique(g_pids)) if cmc == "identity" else len(g_pids))


def query_blocks(n_query: int, n_gallery: int) -> Iterator[slice]:
    """Slices of queries that are scored at a time. Raises ValueError if either side is empty."""
    if n_query == 0 or n_gallery == 0:
        raise ValueError(f"nothing to rank: {n_query} queries against {n_gallery} gallery images")
    step = max(128, PAIRS // n_gallery)  # fewer rows would make the matrix product slow
    return (slice(start, min(start + step, n_query)) for start in range(0, n_query, step))


def rank_positions(
    distmat: Num[np.ndarray, "Q G"], ignore: Bool[np.ndarray, "Q G"] | None = None
) -> Int[np.ndarray, "Q G"]:
    """Position of each gallery image in its query's ranking, from 0, ties by gallery index; REMOVED if ignored.

    Raises ValueError for a NaN distance.
    """
    if np.isnan(distmat).any():
        raise ValueError("a distance is NaN and has no rank; look for NaN in the features")
    order = np.argsort(distmat, axis=1)
    ascending = np.take_along_axis(distmat, order, axis=1)
    tied = (ascending[:, 1:] == ascending[:, :-1]).any(axis=1)
    order[tied] = np.argsort(distmat[tied], axis=1, kind="stable")  # five times as slow as the default sort
    positions = np.empty(distmat.shape, dtype=np.int32)
    np.put_along_axis(positions, order, np.arange(distmat.shape[1], dtype=np.int32)[None], axis=1)
    if ignore is not None:
        positions[ignore] = REMOVED
    return positions


def score_queries(
    positions: Int[np.ndarray, "Q G"],
    q_pids: Integer[np.ndarray, " Q"],
    g_pids: Integer[np.ndarray, " G"],
    cmc: CmcLevel,
) -> QueryScores:
    """Scores of each query against a gallery, given its images' positions in a ranking (`rank_positions`).

    The ranking may contain more images than the gallery: only the order of `positions` counts.
    """
    if cmc not in ("identity", "image"):
        raise ValueError(f"cmc must be 'identity' or 'image', found {cmc!r}")
    n_query, n_gallery = positions.shape
    match = (q_pids[:, None] == g_pids) & (positions < REMOVED)
    ranked = np.sort(2 * positions + match, axis=1) & 1  # sorted by position, 1 for a match
    query, rank = np.nonzero(ranked)  # (M,) all matches, in rank order
    rank += 1
    n_match = np.bincount(query, minlength=n_query)
    valid = n_match > 0
    last = np.cumsum(n_match) - 1  # each query's last match among the M
    start = last + 1 - n_match
    hits = np.arange(1, len(query) + 1) - start[query]
    ap, inp = np.full(n_query, np.nan), np.full(n_query, np.nan)
    ap[valid] = np.bincount(query, hits / rank, n_query)[valid] / n_match[valid]
    inp[valid] = n_match[valid] / rank[last[valid]]
    first = np.zeros(n_query, dtype=np.int64)
    if cmc == "image":
        first[valid] = rank[start[valid]]
    else:
        by_identity = np.argsort(g_pids, kind="stable")
        pids, starts = np.unique(g_pids[by_identity], return_index=True)
        nearest = np.minimum.reduceat(positions[:, by_identity], starts, axis=1)  # (Q, I) of each identity
        own = nearest[valid, np.searchsorted(pids, q_pids[valid])]
        first[valid] = (nearest[valid] <= own[:, None]).sum(axis=1)
    return QueryScores(ap, inp, first, n_match / np.maximum((positions < REMOVED).sum(axis=1), 1))


def average(parts: Sequence[QueryScores], n_ranks: int) -> RetrievalMetrics:
    """Means over the valid queries of consecutive blocks. Raises ValueError if no query has a match."""
    ap, inp, first, chance = (np.concatenate(part) for part in zip(*parts, strict=True))
    valid = first > 0
    n_valid = int(valid.sum())
    if n_valid == 0:
        raise ValueError(f"none of {len(valid)} queries has a match in the gallery; check that identities correspond")
    return RetrievalMetrics(
        cmc=np.cumsum(np.bincount(first[valid], minlength=n_ranks + 1)[1:]) / n_valid,
        mAP=float(ap[valid].mean()),
        mINP=float(inp[valid].mean()),
        n_valid=n_valid,
        ap=ap,
        inp=inp,
        rank1=first == 1,
        valid=valid,
        chance_rank1=float(chance[valid].mean()),
    )


def to_numpy(values: Any) -> np.ndarray:
    """A numpy view of an array or of a tensor, which is copied from a GPU."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
