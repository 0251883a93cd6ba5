"""The retrieval protocols of SYSU-MM01 and RegDB, and retrieval within one modality.

What differs between protocols is data: which images form a gallery, which pairs are removed, and what a rank of the CMC
counts. Each query ranks the whole pool of gallery images once; every trial and every setting is read off that ranking,
so that the four settings of SYSU-MM01 with ten trials each cost about as much as one. Re-ranked distances depend on
the gallery, and are computed for each trial apart.
The distance matrix is streamed (similarity.py; a small one of RegDB's is held, for both directions) and ranked
metrics.BLOCK pairs at a time, which changes no bit, since a query's ranking is its own. 100,000 queries and as many
gallery images of 2,048 numbers: docs/SCALE.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from danet_core.files import StudyError
from danet_core.metrics import (
    CmcLevel,
    QueryScores,
    as_array,
    as_ints,
    average,
    join,
    query_blocks,
    rank_order,
    score_queries,
)
from danet_core.parameters import Rerank
from danet_core.similarity import (
    WIDEST_PRODUCT,
    Distance,
    Distances,
    Images,
    both_ways,
    product_blocks,
    streamed,
)

SYSU_INFRARED = (3, 6)  # cameras of the queries
SYSU_VISIBLE = (1, 2, 4, 5)  # cameras of the galleries; 1 and 2 are indoors
SAME_PLACE = (3, 2)  # camera 3 is infrared and camera 2 visible, in the same room
SEARCHES = {"all": SYSU_VISIBLE, "indoor": (1, 2)}  # cameras of the gallery


@dataclass(frozen=True)
class ProtocolResult:
    """Scores of one setting of a protocol, as fractions.

    Attributes:
        mean: cmc1, cmc5, cmc10, cmc20, mAP and mINP, each the unweighted mean over the trials.
        per_trial: the same keys for each trial, in the order of the galleries.
        n_valid: queries with a match, the fewest over the trials. With SYSU-MM01's galleries all trials agree, because
            every trial draws from the same (camera, identity) cells.
        n_valid_per_trial: the same number for each trial; a trial's scores are means over its own valid queries.
        n_query: queries asked, valid or not.
        gallery_size: images in each trial's gallery.
        cmc: (ranks,) float64, mean CMC curve over the trials, rank k at index k - 1, held at its last value beyond
            the gallery.
        cmc_range: (2, ranks) float64, at each rank the lowest and the highest CMC among the trials.
        cmc_level: what a rank of the CMC counts, "identity" or "image".
        per_query: of the V queries with a match in any gallery, (V,) each: `index` among the queries, ascending, and
            `cmc1` and `ap`, each the mean over the galleries in which the query has a match. Where all trials have the
            same valid queries, as with SYSU-MM01's galleries, their means are `mean`'s cmc1 and mAP.
    """

    mean: dict[str, float]
    per_trial: tuple[dict[str, float], ...]
    n_valid: int
    n_valid_per_trial: tuple[int, ...]
    n_query: int
    gallery_size: int
    cmc: np.ndarray
    cmc_range: np.ndarray
    cmc_level: CmcLevel
    per_query: dict[str, np.ndarray]


def evaluate_sysu(
    q_feat: Float[np.ndarray, "Q D"] | Float[Tensor, "Q D"],
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    q_camids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_feat: Float[np.ndarray, "G D"] | Float[Tensor, "G D"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    g_camids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    galleries: Integer[np.ndarray, "T S"] | Integer[Tensor, "T S"],
    *,
    distance: Distance = "cosine",
    ranks: int = 50,
    rerank: Rerank | None = None,
) -> ProtocolResult:
    """SYSU-MM01: infrared queries against T random galleries of visible images.

    A query of camera 3 ignores every gallery image of camera 2, of whatever identity, because both look at the same
    place. CMC is identity-level. A query whose identity is not left in the gallery is skipped. The score is the mean
    over the trials.

    Args:
        q_feat: (Q, D) features of the queries (cameras 3 and 6); any length, the cosine distance normalises them.
        q_pids, q_camids: (Q,) their identities and cameras.
        g_feat: (G, D) features of the pool that the galleries are drawn from.
        g_pids, g_camids: (G,) their identities and cameras.
        galleries: (T, S) indices into the pool, one gallery a row. Equal distances are ranked by ascending pool index.
        distance: "cosine", the protocol's, or "euclidean" on the features as they are.
        ranks: length of the stored CMC curve.
        rerank: no part of the protocol: re-rank (rerank.py) all queries with each trial's gallery, cosine only. Pairs
            of cameras 3 and 2 take part in that, and are ignored afterwards.

    Returns:
        ProtocolResult.

    Raises:
        StudyError (a ValueError): lengths disagree, a feature is not finite, a gallery index is out of range or listed
            twice in a trial, query and gallery are swapped (by their cameras), no query of a trial has a match, or
            `rerank` comes with another distance than cosine.

    Source: the evaluation code published with SYSU-MM01 (Wu et al., ICCV 2017).
    """
    settings = evaluate_sysu_settings(
        q_feat,
        q_pids,
        q_camids,
        g_feat,
        g_pids,
        g_camids,
        {"SYSU-MM01": galleries},
        distance=distance,
        ranks=ranks,
        rerank=rerank,
    )
    return settings["SYSU-MM01"]


def evaluate_sysu_settings(
    q_feat: Float[np.ndarray, "Q D"] | Float[Tensor, "Q D"],
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    q_camids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_feat: Float[np.ndarray, "G D"] | Float[Tensor, "G D"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    g_camids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    settings: Mapping[str, Any],
    *,
    distance: Distance = "cosine",
    ranks: int = 50,
    rerank: Rerank | None = None,
) -> dict[str, ProtocolResult]:
    """`evaluate_sysu` for several sets of galleries of one pool, with one ranking of the pool for all of them.

    Args:
        settings: name -> galleries (T, S), as {"all_single": (10, 301), ..., "indoor_multi": (10, 1120)}; T and S may
            differ between settings. Everything else as in `evaluate_sysu`.

    Returns:
        name -> ProtocolResult, in the order of `settings`.

    Raises:
        StudyError: as `evaluate_sysu`, naming the setting; or `settings` is empty.
    """
    if not settings:
        raise StudyError("no setting to evaluate: `settings` maps a name to galleries (T, S), and it is empty")
    query, pool = Images.of(q_feat, q_pids, "q"), Images.of(g_feat, g_pids, "g")
    q_camids, g_camids = as_ints(q_camids, "q_camids", len(query.pids)), as_ints(g_camids, "g_camids", len(pool.pids))
    members = {name: _members(galleries, len(pool.pids), name) for name, galleries in settings.items()}
    all_members = np.concatenate(list(members.values()))
    _refuse_swapped(q_camids, g_camids[all_members.any(axis=0)])

    def score(trials: np.ndarray) -> QueryScores:
        used = np.flatnonzero(trials.any(axis=0))  # ascending, so ties keep their order
        drawn = pool if len(used) == len(pool.pids) else Images(pool.feat[used], pool.pids[used])
        return _score(
            query,
            drawn,
            trials[:, used],
            lambda rows: same_place(q_camids[rows], g_camids[used]),
            ["identity"],
            _distances(query, drawn, distance, rerank),
        )["identity"]

    if rerank is None:
        scores = score(all_members)
    else:
        alone = [score(trial[None]) for trial in all_members]
        scores = QueryScores(*(np.concatenate(parts, axis=1) for parts in zip(*alone, strict=True)))
    results, done = {}, 0
    for name, mask in members.items():
        trials = QueryScores(*(part[:, done : done + len(mask)] for part in scores))
        results[name] = _result(trials, int(mask[0].sum()), "identity", ranks, name)
        done += len(mask)
    return results


def same_place(q_camids: Integer[np.ndarray, " Q"], g_camids: Integer[np.ndarray, " G"]) -> Bool[np.ndarray, "Q G"]:
    """Pairs that SYSU-MM01's protocol ignores: a query of camera 3 with a gallery image of camera 2.

    RegDB's protocol ignores none, and this gives none there, since RegDB has no camera 3.
    Source: the evaluation code published with SYSU-MM01 (Wu et al., ICCV 2017).
    """
    return np.logical_and.outer(q_camids == SAME_PLACE[0], g_camids == SAME_PLACE[1])


def evaluate_regdb(
    q_feat: Float[np.ndarray, "Q D"] | Float[Tensor, "Q D"],
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_feat: Float[np.ndarray, "G D"] | Float[Tensor, "G D"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    *,
    cmc: CmcLevel = "image",
    distance: Distance = "cosine",
    ranks: int = 50,
    rerank: Rerank | None = None,
) -> ProtocolResult:
    """RegDB, one trial in one direction: every image of one modality against every image of the other.

    No pair is removed: the two cameras are one visible and one thermal. The protocol's score is the mean over ten
    trials with a model each, which the caller takes. "Visible to thermal" means that the query is visible.

    Args:
        q_feat: (Q, D) features of the queries; any length, the cosine distance normalises them.
        q_pids: (Q,) their identities: the folder numbers, since class labels restart in each split.
        g_feat: (G, D) features of the gallery.
        g_pids: (G,) their identities.
        cmc: "image", as most papers report, or "identity"; they agree at rank 1 and differ beyond.
        distance: "cosine", or "euclidean" on the features as they are.
        ranks: length of the stored CMC curve.
        rerank: no part of the protocol: re-rank (rerank.py) all queries with the gallery, cosine only.

    Returns:
        ProtocolResult with one entry in `per_trial`.

    Raises:
        StudyError (a ValueError): lengths disagree, a feature is not finite, no query has a match, or `rerank` comes
            with another distance than cosine.

    Source: RegDB (Nguyen et al., Sensors 2017), with the search protocol of Ye et al., AAAI 2018.
    """
    query, gallery = Images.of(q_feat, q_pids, "q"), Images.of(g_feat, g_pids, "g")
    return _regdb(query, gallery, [cmc], _distances(query, gallery, distance, rerank), ranks)[cmc]


def evaluate_regdb_settings(
    t_feat: Float[np.ndarray, "N D"] | Float[Tensor, "N D"],
    t_pids: Integer[np.ndarray, " N"] | Integer[Tensor, " N"],
    v_feat: Float[np.ndarray, "M D"] | Float[Tensor, "M D"],
    v_pids: Integer[np.ndarray, " M"] | Integer[Tensor, " M"],
    *,
    distance: Distance = "cosine",
    ranks: int = 50,
    rerank: Rerank | None = None,
) -> dict[str, dict[CmcLevel, ProtocolResult]]:
    """`evaluate_regdb` in both directions and at both levels of the CMC, with one ranking for both levels.

    Both directions are read off one matrix of cosine distances where it has at most similarity.WIDEST_PRODUCT pairs;
    the last bit of a distance may then differ from `evaluate_regdb`'s in the second direction. A larger matrix is
    streamed, once for each direction. So are Euclidean and re-ranked distances, which differ with the direction.

    Args:
        t_feat, t_pids: (N, D) features and (N,) identities of the thermal images.
        v_feat, v_pids: (M, D) and (M,) those of the visible images. Everything else as in `evaluate_regdb`.

    Returns:
        direction -> level -> ProtocolResult: thermal_to_visible, then visible_to_thermal; image, then identity.

    Raises:
        StudyError: as `evaluate_regdb`.
    """
    thermal, visible = Images.of(t_feat, t_pids, "t"), Images.of(v_feat, v_pids, "v")
    levels: list[CmcLevel] = ["image", "identity"]
    one_matrix = distance == "cosine" and rerank is None and len(thermal.pids) * len(visible.pids) <= WIDEST_PRODUCT
    sides = {"thermal_to_visible": (thermal, visible), "visible_to_thermal": (visible, thermal)}
    shared = dict(zip(sides, both_ways(thermal, visible), strict=True)) if one_matrix else {}
    # what one direction is ranked by is let go before the other's is made
    return {
        name: _regdb(query, gallery, levels, shared.get(name) or _distances(query, gallery, distance, rerank), ranks)
        for name, (query, gallery) in sides.items()
    }


def within_modality(
    feat: Float[np.ndarray, "N D"] | Float[Tensor, "N D"],
    pids: Integer[np.ndarray, " N"] | Integer[Tensor, " N"],
    camids: Integer[np.ndarray, " N"] | Integer[Tensor, " N"],
    *,
    distance: Distance = "cosine",
    ranks: int = 50,
) -> ProtocolResult:
    """Retrieval among the images of one modality: each image against all the others, image-level CMC.

    Where the modality has several cameras, a query ignores the images of its own identity in its own camera
    (Market-1501's convention: a neighbouring frame is no evidence); where it has one camera, only the query image
    itself. The two cases are not comparable with each other, nor with cross-modality scores on other galleries.

    Args:
        feat: (N, D) features of all test images of one modality.
        pids, camids: (N,) their identities and cameras.
        distance: "cosine", or "euclidean" on the features as they are.
        ranks: length of the stored CMC curve.

    Returns:
        ProtocolResult with one entry in `per_trial`; `gallery_size` is N, before anything is ignored.

    Raises:
        StudyError (a ValueError): lengths disagree, a feature is not finite, or no query has a match.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark" (Market-1501), ICCV 2015.
    """
    images = Images.of(feat, pids, "")
    camids = as_ints(camids, "camids", len(images.pids))
    everyone = np.arange(len(camids))
    several_cameras = len(np.unique(camids)) > 1

    def ignore(rows: slice) -> np.ndarray:
        if several_cameras:
            return (images.pids[rows, None] == images.pids) & (camids[rows, None] == camids)
        return everyone[rows, None] == everyone

    members = np.ones((1, len(images.pids)), dtype=bool)
    scores = _score(images, images, members, ignore, ["image"], _distances(images, images, distance))["image"]
    return _result(scores, len(images.pids), "image", ranks, "within one modality")


def camera_pairs(
    q_feat: Float[np.ndarray, "Q D"] | Float[Tensor, "Q D"],
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    q_camids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_feat: Float[np.ndarray, "G D"] | Float[Tensor, "G D"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    g_camids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    *,
    distance: Distance = "cosine",
) -> list[dict[str, float | int]]:
    """Which pair of cameras is how hard: all images of one camera as queries against all images of another.

    No part of a protocol: nothing is drawn and no pair is removed, so that cameras 3 and 2, which look at the same
    place and which SYSU-MM01's protocol leaves out, stand beside the others. mAP depends on the size of the gallery and
    on the matches in it, so pairs compare well between models and only roughly with one another.

    Args:
        q_feat: (Q, D) features of the queries, all of one modality; g_feat: (G, D) those of the other modality.
        q_pids, q_camids, g_pids, g_camids: identities and cameras of both.
        distance: "cosine", or "euclidean" on the features as they are.

    Returns:
        One entry per pair in which any query has a match, by query camera, then gallery camera: query_camera,
        gallery_camera, cmc1 (image-level) and mAP as fractions, n_query, n_valid (queries with a match, which the means
        are over) and gallery_size.

    Raises:
        StudyError (a ValueError): lengths disagree, a feature is not finite, or there is no image on one side.
    """
    query, pool = Images.of(q_feat, q_pids, "q"), Images.of(g_feat, g_pids, "g")
    q_camids, g_camids = as_ints(q_camids, "q_camids", len(query.pids)), as_ints(g_camids, "g_camids", len(pool.pids))
    cameras = np.unique(g_camids)
    members = g_camids == cameras[:, None]  # (cameras, G): each camera's images are one gallery of the ranked pool
    scores = _score(query, pool, members, None, ["image"], _distances(query, pool, distance))["image"]
    pairs: list[dict[str, float | int]] = []
    for asked in np.unique(q_camids):
        own = QueryScores(*(part[q_camids == asked] for part in scores))
        for gallery, camera in enumerate(cameras):
            if not own.first[:, gallery].any():
                continue
            found = average(own, gallery, 1)
            pairs.append(
                {
                    "query_camera": int(asked),
                    "gallery_camera": int(camera),
                    "cmc1": float(found.cmc[0]),
                    "mAP": found.mAP,
                    "n_query": len(own.ap),
                    "n_valid": found.n_valid,
                    "gallery_size": int(members[gallery].sum()),
                }
            )
    return pairs


def chance_rank1(
    q_pids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    q_camids: Integer[np.ndarray, " Q"] | Integer[Tensor, " Q"],
    g_pids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    g_camids: Integer[np.ndarray, " G"] | Integer[Tensor, " G"],
    galleries: Integer[np.ndarray, "T S"] | Integer[Tensor, "T S"],
) -> float:
    """The Rank-1 to expect from a random ranking: the share of matches among the images left to a query.

    Mean over the queries that have a match, then over the trials, as the scores are. The camera rule is SYSU-MM01's;
    RegDB has no camera 3, so that nothing is removed there. It is the same for both levels of the CMC.

    Args:
        q_pids, q_camids: (Q,) identities and cameras of the queries.
        g_pids, g_camids: (G,) those of the pool.
        galleries: (T, S) indices into the pool, one gallery a row.

    Returns:
        A fraction.

    Raises:
        StudyError (a ValueError): lengths disagree, an index is out of range or repeated, or a trial has no match.
    """
    q_pids, g_pids = as_array(q_pids, "q_pids", ndim=1), as_array(g_pids, "g_pids", ndim=1)
    q_pids, g_pids = as_ints(q_pids, "q_pids", len(q_pids)), as_ints(g_pids, "g_pids", len(g_pids))
    q_camids, g_camids = as_ints(q_camids, "q_camids", len(q_pids)), as_ints(g_camids, "g_camids", len(g_pids))
    members = _members(galleries, len(g_pids), "the chance level")
    pids, codes = np.unique(np.concatenate([q_pids, g_pids]), return_inverse=True)
    q_codes, g_codes = codes[: len(q_pids)], codes[len(q_pids) :]
    shares = np.zeros((len(members), len(q_pids)))  # (T, Q)
    for at_one_place in (False, True):
        left = members & (g_camids != SAME_PLACE[1]) if at_one_place else members
        queries = np.flatnonzero((q_camids == SAME_PLACE[0]) == at_one_place)
        of_pid = np.stack([np.bincount(g_codes[trial], minlength=len(pids)) for trial in left])  # (T, I)
        share = of_pid / np.maximum(left.sum(axis=1, keepdims=True), 1)  # (T, I)
        shares[:, queries] = share[:, q_codes[queries]]
    valid = (shares > 0).sum(axis=1)  # (T,)
    if not valid.all():
        raise StudyError(
            f"no query has a match in the gallery of trial {int(np.argmin(valid))}, so there is no chance level;"
            " check that q_pids and g_pids name identities alike"
        )
    return float((shares.sum(axis=1) / valid).mean())


def random_seed_galleries(
    pids: Integer[np.ndarray, " G"],
    camids: Integer[np.ndarray, " G"],
    paths: Sequence[str],
    trials: int = 10,
) -> dict[str, Integer[np.ndarray, "T S"]]:
    """SYSU-MM01's second convention for galleries: in trial t, counted from 0, `random.seed(t)` and random choices.

    For each identity, ascending, and each camera of the search, ascending, that has images of it: one `random.choice`
    from these images in the order of their paths as text. Each search starts its generator anew. Single-shot only. The
    scores are not comparable with those on the galleries of rand_perm_cam.mat, the protocol's.

    Args:
        pids, camids: (G,) identities and cameras of the pool: the visible test images.
        paths: (G,) where they come from, as in the manifest.
        trials: galleries of each search.

    Returns:
        all_single and indoor_single, each (trials, S) indices into the pool, one gallery a row, ascending.

    Raises:
        StudyError (a ValueError): lengths disagree, or a search has no image.

    Source: the AGW code base of Ye et al. (TPAMI 2021), repository mangye16/Cross-Modal-Re-ID-baseline.
    """
    camids = as_ints(camids, "camids", len(pids))
    if len(paths) != len(pids):
        raise StudyError(f"paths must have one entry per image, {len(pids)}, found {len(paths)}")
    cells: dict[tuple[int, int], list[int]] = {}
    for index in sorted(range(len(pids)), key=lambda index: paths[index]):
        cells.setdefault((int(pids[index]), int(camids[index])), []).append(index)
    galleries = {}
    for search, cameras in SEARCHES.items():
        asked = [cells[cell] for cell in sorted(cells) if cell[1] in cameras]
        if not asked:
            raise StudyError(f"{search} search has no image of cameras {cameras} to draw galleries from")
        drawn = []
        for trial in range(trials):
            generator = random.Random(trial)  # the same numbers as after random.seed(trial)
            drawn.append(sorted(generator.choice(cell) for cell in asked))
        galleries[f"{search}_single"] = np.array(drawn)
    return galleries


def _distances(query: Images, gallery: Images, distance: Distance, rerank: Rerank | None = None) -> Distances:
    """What to rank the gallery by; re-ranking is among all queries and the whole gallery, which is one trial's then."""
    if rerank is None:
        return streamed(query, gallery, distance)
    if distance != "cosine":
        raise StudyError(f"re-ranking starts from the cosine distance, found {distance!r}; leave out one of the two")
    from danet_core.rerank import rerank as reranked  # brings scipy, which no other scoring needs

    return reranked(query.feat, gallery.feat, **asdict(rerank)).__getitem__


def _regdb(
    query: Images, gallery: Images, levels: Sequence[CmcLevel], distances: Distances, ranks: int
) -> dict[CmcLevel, ProtocolResult]:
    """RegDB in one direction, at each level of the CMC."""
    members = np.ones((1, len(gallery.pids)), dtype=bool)
    scores = _score(query, gallery, members, None, levels, distances)
    return {level: _result(scores[level], len(gallery.pids), level, ranks, "RegDB") for level in levels}


def _score(
    query: Images,
    gallery: Images,
    members: np.ndarray,
    ignore: Callable[[slice], np.ndarray] | None,
    levels: Sequence[CmcLevel],
    distances: Distances,
) -> dict[CmcLevel, QueryScores]:
    """Scores (Q, T) of all queries in the T subsets `members` (T, G) of the gallery, a block of queries at a time.

    One ranking serves all levels of the CMC.
    """
    scores = []
    for product in product_blocks(len(query.pids), len(gallery.pids)):
        block = distances(product)
        for part in query_blocks(len(block), len(gallery.pids)):
            rows = slice(product.start + part.start, product.start + part.stop)
            order = rank_order(block[part], None if ignore is None else ignore(rows))
            scores.append(score_queries(order, query.pids[rows], gallery.pids, members, levels))
    return {level: join([block[level] for block in scores]) for level in levels}


def _members(galleries: Any, n_pool: int, name: str) -> np.ndarray:
    """(T, G) membership mask of galleries (T, S) given as pool indices."""
    galleries = as_array(galleries, f"the galleries of {name}", ndim=2)
    n_trials, size = galleries.shape
    if galleries.size == 0 or galleries.dtype.kind not in "iu":
        raise StudyError(
            f"the galleries of {name} must be integers (trials, images) with at least one of each,"
            f" found {galleries.dtype} {galleries.shape}"
        )
    if galleries.min() < 0 or galleries.max() >= n_pool:
        raise StudyError(
            f"the galleries of {name} hold indices from {int(galleries.min())} to {int(galleries.max())} and the pool"
            f" {n_pool} images; give indices into g_feat, not rows of the whole store"
        )
    members = np.zeros((n_trials, n_pool), dtype=bool)
    members[np.arange(n_trials)[:, None], galleries.astype(np.int64)] = True
    repeated = np.flatnonzero(members.sum(axis=1) != size)
    if len(repeated):
        raise StudyError(f"trial {int(repeated[0])} of {name} lists an image twice; a gallery holds each image once")
    return members


def _refuse_swapped(q_camids: np.ndarray, g_camids: np.ndarray) -> None:
    for side, camids, wrong in (("query", q_camids, SYSU_VISIBLE), ("gallery", g_camids, SYSU_INFRARED)):
        found = camids[np.isin(camids, wrong)]
        if len(found):
            raise StudyError(
                f"a {side} image is of camera {int(found[0])}, but SYSU-MM01's queries are infrared (cameras 3, 6) and"
                " its galleries visible (1, 2, 4, 5); query and gallery may be swapped"
            )


def _result(scores: QueryScores, gallery_size: int, level: CmcLevel, ranks: int, name: str) -> ProtocolResult:
    if ranks < 1:
        raise StudyError(f"a CMC curve has at least one rank, found ranks={ranks}")
    try:
        trials = [average(scores, trial, max(ranks, 20)) for trial in range(scores.ap.shape[1])]
    except StudyError as error:
        raise StudyError(f"{name}: {error}") from None
    per_trial = tuple(
        {f"cmc{rank}": float(trial.cmc[rank - 1]) for rank in (1, 5, 10, 20)} | {"mAP": trial.mAP, "mINP": trial.mINP}
        for trial in trials
    )
    n_valid = tuple(trial.n_valid for trial in trials)
    curves = np.array([trial.cmc[:ranks] for trial in trials])  # (T, ranks)
    return ProtocolResult(
        mean={key: float(np.mean([trial[key] for trial in per_trial])) for key in per_trial[0]},
        per_trial=per_trial,
        n_valid=min(n_valid),
        n_valid_per_trial=n_valid,
        n_query=len(scores.ap),
        gallery_size=gallery_size,
        cmc=curves.mean(axis=0),
        cmc_range=np.stack([curves.min(axis=0), curves.max(axis=0)]),
        cmc_level=level,
        per_query=_per_query(scores),
    )


def _per_query(scores: QueryScores) -> dict[str, np.ndarray]:
    """See ProtocolResult; an AP without a match is 0, so that it adds nothing."""
    galleries = (scores.first > 0).sum(axis=1)  # (Q,) in which the query has a match
    asked = np.flatnonzero(galleries)
    sums = {"cmc1": (scores.first == 1).sum(axis=1), "ap": scores.ap.sum(axis=1)}
    return {"index": asked, **{key: total[asked] / galleries[asked] for key, total in sums.items()}}
