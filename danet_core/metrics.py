"""CMC, mAP and mINP of a ranked gallery, by one sort per query and no loop over queries.

A ranking is held as `order` (Q, G): the gallery index at each rank, smallest distance first, equal distances in
ascending gallery index. A pair that the protocol removes carries the index G, "nobody", which belongs to no gallery and
matches no query. One ranking of a pool of images serves every gallery drawn from that pool: a gallery is a row of
`members` (T, G), and the rank of a match is the number of its members that have come so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Integer, Num
from torch import Tensor
from torch.nn import functional

from danet_core.files import StudyError

CmcLevel = Literal["identity", "image"]
BLOCK = 2**21  # query-gallery pairs ranked at once: 16 MB per 64-bit array, whatever the number of queries


@dataclass(frozen=True)
class RetrievalMetrics:
    """Scores of one ranking, as fractions.

    Attributes:
        cmc: (R,) float64, rank k at index k - 1; R is the number of gallery identities ("identity") or images
            ("image"). It never falls, and stays at its last value where a query's ranking is shorter than R.
        mAP: mean average precision over the valid queries, image-level.
        mINP: mean inverse negative penalty over the valid queries, image-level.
        n_valid: queries with at least one match; the others are in none of the means.
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    n_valid: int


class QueryScores(NamedTuple):
    """Scores of each query against each of T galleries."""

    ap: np.ndarray  # (Q, T) float64, 0 where there is no match
    inp: np.ndarray  # (Q, T) float64, 0 where there is no match
    first: np.ndarray  # (Q, T) int64, rank of the first match from 1, in identities or images; 0 without a match


def retrieval_metrics(
    distmat: Num[np.ndarray, "Q G"] | Num[Tensor, "Q G"],
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    *,
    ignore: Bool[np.ndarray, "Q G"] | Bool[Tensor, "Q G"] | None = None,
    cmc: CmcLevel = "identity",
) -> RetrievalMetrics:
    """Score a distance matrix: CMC, mAP and mINP.

    Each query ranks the gallery by ascending distance, equal distances by ascending gallery index. With m matches at
    ranks r_1 < ... < r_m, counted over the images left to that query: AP = 1/m sum_j j / r_j and INP = m / r_m. CMC at
    k is the share of queries whose first match is among the first k images ("image") or the first k distinct identities
    in order of first appearance ("identity"). Queries without a match are skipped.

    Args:
        distmat: (Q, G) distances, smaller is closer; any unit, since only their order counts. Infinities are allowed
            and are ranked like any number, so +inf means "last" and not "removed"; for that there is `ignore`.
        q_pids: (Q,) identities of the queries.
        g_pids: (G,) identities of the gallery images.
        ignore: (Q, G) pairs removed from the ranking: neither matches nor distractors.
        cmc: "identity" (SYSU-MM01) or "image" (RegDB, Market-1501); mAP and mINP are image-level in both.

    Returns:
        RetrievalMetrics. No input is modified.

    Raises:
        StudyError (a ValueError): shapes disagree, the gallery is empty, a distance is NaN, no query has a match, or
            `cmc` is another word.

    Source: AP and CMC as in the evaluation code published with SYSU-MM01 (identity-level CMC) and with Market-1501
    (image-level CMC); INP as in Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", 2021.
    """
    distmat = as_array(distmat, "distmat", ndim=2)
    q_pids, g_pids = as_ints(q_pids, "q_pids", len(distmat)), as_ints(g_pids, "g_pids", distmat.shape[1])
    if ignore is not None:
        ignore = as_array(ignore, "ignore", ndim=2)
        if ignore.shape != distmat.shape or ignore.dtype != np.bool_:
            raise StudyError(
                f"`ignore` must be a boolean array of distmat's shape {distmat.shape}, found {ignore.dtype}"
                f" {ignore.shape}; give one entry per query-gallery pair"
            )
    members = np.ones((1, len(g_pids)), dtype=bool)
    blocks = []
    for rows in query_blocks(len(q_pids), len(g_pids)):
        _refuse_nan(distmat[rows], rows.start)
        order = rank_order(distmat[rows], None if ignore is None else ignore[rows])
        blocks.append(score_queries(order, q_pids[rows], g_pids, members, [cmc])[cmc])
    n_ranks = len(np.unique(g_pids)) if cmc == "identity" else len(g_pids)
    return average(join(blocks), 0, n_ranks)


def query_blocks(n_query: int, n_gallery: int, pairs: int | None = None) -> Iterator[slice]:
    """Slices of queries whose pairs with the gallery number at most `pairs`, or BLOCK; at least one query in each.

    Raises StudyError for an empty set of queries or gallery images.
    """
    if n_query == 0 or n_gallery == 0:
        raise StudyError(
            f"there is nothing to rank: {n_query} queries against {n_gallery} gallery images; give at least one of each"
        )
    step = max(1, (BLOCK if pairs is None else pairs) // n_gallery)
    return (slice(start, min(start + step, n_query)) for start in range(0, n_query, step))


def rank_order(
    distmat: Num[np.ndarray, "Q G"], ignore: Bool[np.ndarray, "Q G"] | None = None
) -> Integer[np.ndarray, "Q G"]:
    """Gallery index at each rank, nearest first, ties by ascending index; an ignored pair stays in place, as G.

    Args:
        distmat: (Q, G) distances, smaller is closer, none of them NaN.
        ignore: (Q, G) pairs to mark as "nobody".

    Returns:
        (Q, G) int64.
    """
    n_gallery = distmat.shape[1]
    if distmat.dtype == np.float16:
        distmat = distmat.astype(np.float32)
    if distmat.dtype == np.float32 and n_gallery < 2**31:
        # Distance and index in one integer: a plain sort is then stable, and ten times as fast as a stable argsort.
        bits = (distmat + np.float32(0)).view(np.int32)  # adding zero makes -0.0 equal to 0.0
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # order of the integers = order of the floats
        keys <<= 32
        keys |= np.arange(n_gallery)
        keys.sort(axis=1)
        order = np.bitwise_and(keys, 0xFFFFFFFF, out=keys)
    else:
        order = np.argsort(distmat, axis=1, kind="stable")
    if ignore is not None:
        order[np.take_along_axis(ignore, order, axis=1)] = n_gallery
    return order


def score_queries(
    order: Integer[np.ndarray, "Q G"],
    q_pids: Integer[np.ndarray, " Q"],
    g_pids: Integer[np.ndarray, " G"],
    members: Bool[np.ndarray, "T G"],
    levels: Sequence[CmcLevel],
) -> dict[CmcLevel, QueryScores]:
    """AP, INP and rank of the first match of each query in each of T galleries that are subsets of one ranked pool.

    Args:
        order: (Q, G) ranking of the pool, from `rank_order`; the value G is "nobody".
        q_pids: (Q,) identities of the queries.
        g_pids: (G,) identities of the pool.
        members: (T, G) True where a pool image is in the gallery.
        levels: what `first` is to count, "identity", "image" or both.

    Returns:
        For each level QueryScores with arrays (Q, T), the same but for `first`.

    Raises:
        StudyError: a level is another word.
    """
    for level in levels:
        if level not in get_args(CmcLevel):
            raise StudyError(f"cmc must be 'identity' (SYSU-MM01) or 'image' (RegDB), found {level!r}")
    (n_query, n_gallery), n_trials = order.shape, len(members)
    pids, codes = np.unique(g_pids, return_inverse=True)  # identities as 0..I-1; "nobody" gets I, an unknown query -1
    place = np.minimum(np.searchsorted(pids, q_pids), len(pids) - 1)
    q_codes = np.where(pids[place] == q_pids, place, -1)
    by_rank = np.append(codes, len(pids))[order]  # (Q, G) identity at each rank
    match = by_rank == q_codes[:, None]  # (Q, G)

    at = np.flatnonzero(match)  # (M,) every match of every query, in rank order
    query = at // n_gallery  # (M,)
    has_match, start, n_match = np.unique(query, return_index=True, return_counts=True)  # (V,) each
    ap, inp = np.zeros((n_query, n_trials)), np.zeros((n_query, n_trials))
    first = {level: np.zeros((n_query, n_trials), dtype=np.int64) for level in levels}
    if len(at) == 0:
        return {level: QueryScores(ap, inp, first[level]) for level in levels}

    weight = np.zeros((n_gallery + 1, n_trials), dtype=np.float32)  # last row: nobody
    weight[:-1] = members.T
    # (M, T) images of the gallery up to and including the match
    if members.all() and order.max() < n_gallery:
        rank = np.repeat(at[:, None] % n_gallery + 1.0, n_trials, axis=1)
    else:
        rank = _ranks_of_matches(order, at, query, weight)
    member = weight[order.ravel()[at]].astype(np.float64)  # (M, T) 1 where the match is in the gallery
    hits = np.cumsum(member, axis=0)
    hits -= np.repeat(hits[start] - member[start], n_match, axis=0)  # (M, T) matches so far, of the same query
    is_member = member > 0
    precision = np.divide(hits, rank, out=np.zeros_like(rank), where=is_member)
    total = np.add.reduceat(member, start, axis=0)  # (V, T)
    last = np.maximum.reduceat(rank * member, start, axis=0)  # (V, T)
    found = total > 0
    zeros = np.zeros_like(total)
    ap[has_match] = np.divide(np.add.reduceat(precision, start, axis=0), total, out=zeros.copy(), where=found)
    inp[has_match] = np.divide(total, last, out=zeros, where=found)
    if "image" in levels:
        best = np.minimum.reduceat(np.where(is_member, rank, np.inf), start, axis=0)
        first["image"][has_match] = np.where(found, best, 0).astype(np.int64)
    if "identity" in levels:
        if n_trials == 1:
            if not members.all():
                by_rank = np.append(np.where(members[0], codes, len(pids)), len(pids))[order]
            first["identity"][:] = _identity_ranks_of_one(by_rank, q_codes, len(pids))
        else:
            first["identity"][:] = _identity_ranks(order, q_codes, codes, members)
    return {level: QueryScores(ap, inp, first[level]) for level in levels}


def average(scores: QueryScores, trial: int, n_ranks: int) -> RetrievalMetrics:
    """Means over the valid queries of one gallery, with a CMC curve of `n_ranks` ranks held at its last value.

    Raises StudyError where no query has a match: there is no score then, neither 0 nor 1.
    """
    first = scores.first[:, trial]
    valid = first > 0
    n_valid = int(valid.sum())
    if n_valid == 0:
        raise StudyError(
            f"none of the {len(valid)} queries has a match in the gallery (trial {trial}), so there is no score;"
            " check that q_pids and g_pids name identities alike"
        )
    hits = np.bincount(np.minimum(first[valid], n_ranks + 1), minlength=n_ranks + 2)[1 : n_ranks + 1]
    return RetrievalMetrics(
        cmc=np.cumsum(hits) / n_valid,
        mAP=float(scores.ap[valid, trial].mean()),
        mINP=float(scores.inp[valid, trial].mean()),
        n_valid=n_valid,
    )


def join(blocks: list[QueryScores]) -> QueryScores:
    """Scores of consecutive blocks of queries as one."""
    return QueryScores(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def as_array(values: Any, name: str, ndim: int) -> np.ndarray:
    """A numpy view of an array or tensor (copied to the host from a device), of `ndim` axes or a StudyError."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    values = np.asarray(values)
    if values.ndim != ndim:
        raise StudyError(f"{name} must have {ndim} axes, found shape {values.shape}")
    return values


def as_ints(values: Any, name: str, length: int) -> np.ndarray:
    """An int64 array (length,), or a StudyError; identities and cameras are never taken from floats."""
    values = as_array(values, name, ndim=1)
    if len(values) != length:
        raise StudyError(f"{name} must have one entry per image, {length}, found {len(values)}")
    if length and values.dtype.kind not in "iu":
        raise StudyError(f"{name} must be integers, found {values.dtype}; convert them before the call")
    return values.astype(np.int64)


def _refuse_nan(distances: np.ndarray, first_query: int) -> None:
    if distances.dtype.kind == "f" and np.isnan(distances).any():
        query, image = np.argwhere(np.isnan(distances))[0]
        raise StudyError(
            f"the distance between query {first_query + query} and gallery image {image} is NaN, which has no rank;"
            " look for NaN in the features (a diverged run, or a division by zero)"
        )


def _ranks_of_matches(order: np.ndarray, at: np.ndarray, query: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(M, T) gallery members at or before each match, for matches at flat positions `at` of the ranking.

    The rankings, laid end to end, are cut after every match and at every query's end; the members in each piece are
    counted for all galleries at once (an embedding bag: a sum of table rows per piece), then added up along the pieces.
    """
    n_query, n_gallery = order.shape
    row_ends = np.arange(1, n_query + 1) * n_gallery
    cuts = np.sort(np.concatenate([[0], at + 1, row_ends]))
    pieces = functional.embedding_bag(
        torch.from_numpy(order).reshape(-1),
        torch.from_numpy(weight),
        torch.from_numpy(cuts),
        mode="sum",
        include_last_offset=True,
    )  # (M + Q, T): small whole numbers, exact in float32
    so_far = np.cumsum(pieces.numpy(), axis=0, dtype=np.float64)
    before = np.zeros((n_query, weight.shape[1]))  # members in the rows of earlier queries
    before[1:] = so_far[np.searchsorted(query, np.arange(n_query - 1), side="right") + np.arange(n_query - 1)]
    return so_far[np.arange(len(at)) + query] - before[query]  # each earlier row adds one piece: its end


def _identity_ranks(order: np.ndarray, q_codes: np.ndarray, codes: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(Q, T) rank of the query's identity among each gallery's identities, by their nearest images; 0 if absent."""
    n_query, n_gallery = order.shape
    place = np.full((n_query, n_gallery + 1), n_gallery, dtype=np.int32)  # rank of each image, G for the ignored
    np.put_along_axis(place, order, np.arange(n_gallery, dtype=np.int32)[None], axis=1)
    place = np.ascontiguousarray(place[:, :n_gallery].T)  # (G, Q): galleries are then whole rows
    by_identity = np.argsort(codes, kind="stable")
    ranks = np.zeros((n_query, len(members)), dtype=np.int64)
    for trial, member in enumerate(members):
        images = by_identity[member[by_identity]]
        if len(images) == 0:
            continue
        present, start, count = np.unique(codes[images], return_index=True, return_counts=True)  # (I,)
        largest_first = np.argsort(-count, kind="stable")
        present, start, count = present[largest_first], start[largest_first], count[largest_first]
        nearest = place[images[start]]  # (I, Q), lowered by the identities' second images, then the third: whole rows
        for further in range(1, count[0]):
            rows = images[start[: (count > further).sum()] + further]
            np.minimum(nearest[: len(rows)], place[rows], out=nearest[: len(rows)])
        row_of = np.full(codes.max() + 2, -1)  # the last one is an unknown query's
        row_of[present] = np.arange(len(present))
        row = row_of[q_codes]
        own = nearest[row, np.arange(n_query)]
        found = (row >= 0) & (own < n_gallery)
        ranks[:, trial] = np.where(found, (nearest <= own).sum(axis=0), 0)
    return ranks


def _identity_ranks_of_one(by_rank: np.ndarray, q_codes: np.ndarray, nobody: int) -> np.ndarray:
    """`_identity_ranks` for T = 1, from the identity at each rank; a tenth of the time where nothing is shared."""
    n_query, n_gallery = by_rank.shape
    nearest = torch.full((n_query, nobody + 1), n_gallery, dtype=torch.int32)  # rank of each identity's first image
    ranks = torch.arange(n_gallery, dtype=torch.int32).expand(n_query, n_gallery)
    nearest.scatter_reduce_(1, torch.from_numpy(by_rank), ranks, "amin")
    of_each = nearest[:, :nobody].numpy()
    own = of_each[np.arange(n_query), q_codes]  # of whoever it is where the query is unknown, with code -1
    found = (q_codes >= 0) & (own < n_gallery)
    return np.where(found, (of_each <= own[:, None]).sum(axis=1), 0)[:, None]
