"""The retrieval protocols: which images are query and gallery, which pairs are ignored, what a rank of the CMC counts.

PROTOCOLS is their table. A data set names its protocol in params.yaml; a new protocol is one entry.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from danet_core import INFRARED, VISIBLE
from danet_study.analysis import Metric, normalize
from danet_study.files import StudyError
from danet_study.metrics import (
    CmcLevel,
    RetrievalMetrics,
    average,
    query_blocks,
    rank_positions,
    score_queries,
    to_numpy,
)

RANKS = 20  # length of a result's CMC curve
SCORES = ("cmc1", "cmc5", "cmc10", "cmc20", "mAP", "mINP")
SYSU_SEARCHES = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # cameras of the gallery
_SYSU_SETTINGS = {
    f"{search}_{shots}": f"{search}-search, {shots}-shot" for search in SYSU_SEARCHES for shots in ("single", "multi")
}
_DIRECTIONS = {"infrared_to_visible": "infrared to visible", "visible_to_infrared": "visible to infrared"}


@dataclass(frozen=True)
class Images:
    """N images as a protocol sees them. `rows`: their rows in the store; modalities: 0 visible, 1 infrared."""

    feat: Float[np.ndarray, "N D"]
    pids: Integer[np.ndarray, " N"]
    camids: Integer[np.ndarray, " N"]
    modalities: Integer[np.ndarray, " N"]
    rows: Integer[np.ndarray, " N"]

    @classmethod
    def of(cls, feat: Any, pids: Any, camids: Any = None, modalities: Any = None, rows: Any = None) -> Images:
        """Checked arrays; camera and modality 0 and rows 0..N-1 by default.

        Raises StudyError for a feature that is not finite, ValueError for lengths that differ.
        """
        feat, zeros = to_numpy(feat), np.zeros(len(feat), np.int64)
        rows = np.arange(len(feat)) if rows is None else rows
        columns = [zeros if given is None else to_numpy(given) for given in (pids, camids, modalities, rows)]
        for values in columns:
            if feat.ndim != 2 or values.shape != feat.shape[:1] or values.dtype.kind not in "iu":
                raise ValueError(f"features {feat.shape} need one integer per row, found {values.dtype} {values.shape}")
        if infinite := int((~np.isfinite(feat).all(axis=1)).sum()):
            raise StudyError(f"{infinite} of {len(feat)} features are not finite; the run diverged, lower its lr")
        return cls(feat, *columns)

    def __getitem__(self, index: Any) -> Images:
        return Images(self.feat[index], self.pids[index], self.camids[index], self.modalities[index], self.rows[index])

    def __len__(self) -> int:
        return len(self.pids)

    def of_modality(self, modality: int) -> Images:
        """The visible or the infrared images."""
        return self[self.modalities == modality]


Ignore = Callable[[Images, Images], Bool[np.ndarray, "Q G"]]


@dataclass(frozen=True)
class ProtocolResult:
    """Scores of one setting, as fractions."""

    mean: dict[str, float]  # SCORES, means over the trials
    per_trial: tuple[dict[str, float], ...]
    n_valid: int  # queries with a match, the fewest over the trials
    n_query: int
    gallery_size: int  # images per trial
    gallery: Int[np.ndarray, " G"]  # the first trial's indices into the given pool, ascending
    cmc: Float[np.ndarray, " ranks"]  # RANKS means over the trials, constant beyond the last rank
    cmc_level: CmcLevel
    chance_rank1: float  # of a random ranking
    trials: tuple[RetrievalMetrics, ...]  # with scores per query

    def per_query(self) -> tuple[Bool[np.ndarray, " Q"], Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
        """valid in any trial; Rank-1 and AP of each query, means over the trials in which it is valid, 0 if in none."""
        n_valid = np.sum([trial.valid for trial in self.trials], axis=0)
        n = np.maximum(n_valid, 1)
        rank1 = np.sum([trial.rank1 for trial in self.trials], axis=0) / n
        ap = np.nansum([trial.ap for trial in self.trials], axis=0) / n
        return n_valid > 0, rank1, ap


def evaluate_sysu(
    q_feat: Float[Any, "Q D"],
    q_pids: Integer[Any, " Q"],
    q_camids: Integer[Any, " Q"],
    g_feat: Float[Any, "G D"],
    g_pids: Integer[Any, " G"],
    g_camids: Integer[Any, " G"],
    galleries: Integer[Any, "T S"],
    *,
    metric: Metric = "cosine",
) -> ProtocolResult:
    """SYSU-MM01: infrared queries (cameras 3 and 6) against T random galleries of visible images; the mean over the T.

    A camera-3 query ignores every camera-2 gallery image, of whatever identity: both cameras show the same place. CMC
    is identity-level. A query whose identity is not in the gallery is skipped.

    Args:
        q_feat, g_feat: arrays or tensors, not normalized. g_*: the pool that galleries are drawn from.
        galleries: indices into the pool, one gallery per row. Ties are ranked by pool index.
        metric: "cosine", or "euclidean" between features as given.

    Raises ValueError for features that are not finite, galleries that are no sets of pool indices, swapped sides, or a
    trial without a match.
    Source: the evaluation code of SYSU-MM01 (Wu et al., ICCV 2017).
    """
    query, pool = Images.of(q_feat, q_pids, q_camids), Images.of(g_feat, g_pids, g_camids)
    if np.isin(query.camids, SYSU_SEARCHES["all"]).any() or np.isin(pool.camids, (3, 6)).any():
        raise StudyError("SYSU-MM01 queries are infrared (cameras 3, 6) and galleries visible; swap the two sides")
    return score_settings(query, pool, {"SYSU-MM01": galleries}, _sysu_ignore, "identity", metric)["SYSU-MM01"]


def evaluate_regdb(
    q_feat: Float[Any, "Q D"],
    q_pids: Integer[Any, " Q"],
    g_feat: Float[Any, "G D"],
    g_pids: Integer[Any, " G"],
    *,
    cmc: CmcLevel = "image",
    metric: Metric = "cosine",
) -> ProtocolResult:
    """RegDB, one split in one direction: all images of one modality against all of the other. Nothing is ignored.

    The published score is the mean over ten splits with a model each. "Visible to thermal": the query is visible.

    Args:
        q_pids, g_pids: folder numbers, because class labels restart in each split.
        cmc: "image" as most papers report, or "identity"; they agree at rank 1 and differ beyond.
        metric: "cosine", or "euclidean" between features as given.

    Raises ValueError for features that are not finite, an empty side, or if no query has a match.
    Source: RegDB (Nguyen et al., Sensors 2017); Ye et al., AAAI 2018.
    """
    query, gallery = Images.of(q_feat, q_pids), Images.of(g_feat, g_pids)
    return score_settings(query, gallery, {"RegDB": np.arange(len(gallery))[None]}, no_pair, cmc, metric)["RegDB"]


def within_modality(images: Images, metric: Metric = "cosine") -> ProtocolResult:
    """Retrieval among images of one modality: each against all others, image-level CMC.

    With several cameras a query ignores images of its identity in its own camera, as in Market-1501; with one camera
    only itself. The two are not comparable, nor either with cross-modality scores.
    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
    """
    if len(np.unique(images.camids)) == 1:
        images = Images.of(images.feat, images.pids, camids=np.arange(len(images)))  # every image its own camera
    everyone = {"within": np.arange(len(images))[None]}
    return score_settings(images, images, everyone, same_identity_and_camera, "image", metric)["within"]


def camera_pairs(query: Images, gallery: Images, metric: Metric = "cosine") -> list[dict[str, float | int]]:
    """How hard each pair of cameras is: all images of one as queries against all of another; nothing is ignored.

    One entry per pair with a match: query_camera, gallery_camera, cmc1, mAP, n_query, n_valid, gallery_size. mAP
    depends on gallery size and matches: compare a pair between models rather than pairs with each other.
    """
    pairs = []
    for asked, camera in itertools.product(np.unique(query.camids), np.unique(gallery.camids)):
        side, members = query[query.camids == asked], gallery[gallery.camids == camera]
        if np.isin(side.pids, members.pids).any():
            result = evaluate_regdb(side.feat, side.pids, members.feat, members.pids, metric=metric)
            pair: dict[str, float | int] = {"query_camera": int(asked), "gallery_camera": int(camera)}
            pair |= {key: result.mean[key] for key in ("cmc1", "mAP")}
            pairs.append(pair | {key: getattr(result, key) for key in ("n_query", "n_valid", "gallery_size")})
    return pairs


def random_seed_gallery(
    pids: Integer[np.ndarray, " G"],
    camids: Integer[np.ndarray, " G"],
    paths: Sequence[str],
    cameras: Sequence[int],
    trials: int = 10,
) -> Int[np.ndarray, "T S"]:
    """A second convention for galleries, single-shot: in trial t, from 0, `random.seed(t)` and one choice per cell.

    Cells are identities, ascending, and `cameras`, ascending, that have images; the choice is among a cell's images in
    the order of their paths. Not comparable with the galleries of rand_perm_cam.mat.

    Returns one gallery per row, ascending indices. Raises StudyError if no image is of these cameras.
    Source: the AGW code of Ye et al. (TPAMI 2021), repository mangye16/Cross-Modal-Re-ID-baseline.
    """
    cells: dict[tuple[int, int], list[int]] = {}
    for index in sorted(np.flatnonzero(np.isin(camids, cameras)).tolist(), key=lambda index: paths[index]):
        cells.setdefault((int(pids[index]), int(camids[index])), []).append(index)
    if not cells:
        raise StudyError(f"no gallery image is of the cameras {tuple(cameras)}; check the data set's protocol")
    generators = [random.Random(trial) for trial in range(trials)]  # each draws as after random.seed(trial)
    return np.array([sorted(generator.choice(cells[cell]) for cell in sorted(cells)) for generator in generators])


def score_settings(
    query: Images, pool: Images, settings: Mapping[str, Any], ignore: Ignore, cmc: CmcLevel, metric: Metric
) -> dict[str, ProtocolResult]:
    """Score several sets of galleries of one pool with one distance matrix and one sort, a block of queries at a time.

    settings: name -> (T, S) pool indices. Errors as in `evaluate_sysu`.
    """
    checked = {name: _checked(galleries, len(pool), name) for name, galleries in settings.items()}
    used = np.unique(np.concatenate([galleries.ravel() for galleries in checked.values()]))
    drawn = pool[used]
    members = {name: [np.searchsorted(used, gallery) for gallery in checked[name]] for name in checked}
    parts: dict[str, list[list[Any]]] = {name: [[] for _ in galleries] for name, galleries in members.items()}
    for rows, distances in _distance_blocks(query.feat, drawn.feat, metric):
        asked = query[rows]
        positions = rank_positions(distances, ignore(asked, drawn))
        for name, galleries in members.items():
            for part, gallery in zip(parts[name], galleries, strict=True):
                part.append(score_queries(positions[:, gallery], asked.pids, drawn.pids[gallery], cmc))
    results = {}
    for name, galleries in members.items():
        try:
            trials = [average(part, len(gallery)) for part, gallery in zip(parts[name], galleries, strict=True)]
        except ValueError as error:
            raise StudyError(f"{name}: {error}") from None
        results[name] = over_trials(trials, checked[name][0], cmc)
    return results


def _checked(galleries: Any, n_pool: int, name: str) -> Int[np.ndarray, "T S"]:
    """Galleries with ascending indices."""
    galleries = to_numpy(galleries)
    if galleries.ndim != 2 or galleries.size == 0 or galleries.dtype.kind not in "iu":
        raise ValueError(f"galleries of {name}: expected (trials, images), found {galleries.dtype} {galleries.shape}")
    galleries = np.sort(galleries.astype(np.int64), axis=1)
    if galleries.min() < 0 or galleries.max() >= n_pool or (np.diff(galleries, axis=1) == 0).any():
        raise ValueError(f"galleries of {name}: an index is not in 0..{n_pool - 1}, or twice in a trial")
    return galleries


def _distance_blocks(
    q_feat: Float[np.ndarray, "Q D"], g_feat: Float[np.ndarray, "G D"], metric: Metric
) -> Iterator[tuple[slice, Float[np.ndarray, "q G"]]]:
    """Blocks of queries with numbers that order the gallery as its distances do, in float64.

    "cosine" gives minus the similarity, "euclidean" half the squared distance without the query's own part, relative to
    the gallery's mean: a difference of squares cancels far from the origin.
    """
    assert metric in ("cosine", "euclidean"), metric
    if q_feat.shape[1] != g_feat.shape[1]:
        raise ValueError(f"query features have {q_feat.shape[1]} dimensions and gallery features {g_feat.shape[1]}")
    if metric == "cosine":
        gallery, offset = normalize(g_feat), 0.0
    else:
        center = g_feat.mean(axis=0, dtype=np.float64)
        gallery = g_feat - center
        offset = np.einsum("gd,gd->g", gallery, gallery) / 2
    # A matrix product may round equal columns differently; equal features must tie.
    firsts: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in gallery)
    same = [firsts.setdefault(digest, index) for index, digest in enumerate(digests)]
    for rows in query_blocks(len(q_feat), len(g_feat)):
        query = normalize(q_feat[rows]) if metric == "cosine" else q_feat[rows] - center
        distances = offset - query @ gallery.T
        yield rows, distances if len(firsts) == len(same) else distances[:, same]


def over_trials(trials: Sequence[RetrievalMetrics], gallery: Int[np.ndarray, " G"], cmc: CmcLevel) -> ProtocolResult:
    """Means over trials; `gallery` is that of the first."""
    curves = [np.pad(trial.cmc, (0, RANKS), mode="edge")[:RANKS] for trial in trials]
    per_trial = tuple(
        {**{f"cmc{k}": float(curve[k - 1]) for k in (1, 5, 10, 20)}, "mAP": trial.mAP, "mINP": trial.mINP}
        for curve, trial in zip(curves, trials, strict=True)
    )
    return ProtocolResult(
        mean={key: float(np.mean([trial[key] for trial in per_trial])) for key in SCORES},
        per_trial=per_trial,
        n_valid=min(trial.n_valid for trial in trials),
        n_query=len(trials[0].valid),
        gallery_size=len(gallery),
        gallery=gallery,
        cmc=np.mean(curves, axis=0),
        cmc_level=cmc,
        chance_rank1=float(np.mean([trial.chance_rank1 for trial in trials])),
        trials=tuple(trials),
    )


def no_pair(query: Images, gallery: Images) -> Bool[np.ndarray, "Q G"]:
    """Nothing is ignored."""
    return np.zeros((len(query), len(gallery)), dtype=bool)


def same_identity_and_camera(query: Images, gallery: Images) -> Bool[np.ndarray, "Q G"]:
    """A query ignores images of its own identity in its own camera."""
    return (query.pids[:, None] == gallery.pids) & (query.camids[:, None] == gallery.camids)


def _sysu_ignore(query: Images, gallery: Images) -> Bool[np.ndarray, "Q G"]:
    """A camera-3 query ignores every camera-2 gallery image: both cameras show indoor room 2."""
    return np.logical_and.outer(query.camids == 3, gallery.camids == 2)


@dataclass(frozen=True)
class Protocol:
    """A row of PROTOCOLS.

    settings: key -> title, in the order of tables. ablation: the setting of Table 3, of rankings and of scores per
    identity. sides: key -> modality of query and gallery. ignore: pairs that are not ranked. trials: splits over which
    published scores are averaged, with a model each. caption: what a table must say about the settings.
    score: (test images, PackedStore, config.Evaluation) to the results of all settings, or of those that can be scored.
    """

    settings: Mapping[str, str]
    ablation: str
    sides: Mapping[str, tuple[int, int]]
    score: Callable[[Images, Any, Any], dict[str, ProtocolResult]]
    ignore: Ignore = no_pair
    trials: int = 1
    caption: str = ""


def _score_sysu(images: Images, store: Any, evaluation: Any) -> dict[str, ProtocolResult]:
    query, pool = images.of_modality(INFRARED), images.of_modality(VISIBLE)
    if evaluation.galleries == "random_seed":
        paths = store.manifest["path"].iloc[pool.rows].tolist()
        galleries = {
            f"{search}_single": random_seed_gallery(pool.pids, pool.camids, paths, cameras, evaluation.trials)
            for search, cameras in SYSU_SEARCHES.items()
            if search == "all" or np.isin(pool.camids, cameras).any()  # validation images may be of fewer cameras
        }
    else:
        if missing := sorted(_SYSU_SETTINGS.keys() - store.galleries.keys()):
            raise StudyError(
                f"{store.root} has no galleries {', '.join(missing)}; set evaluation.galleries: random_seed"
            )
        stored = {name: store.galleries[name][: evaluation.trials] for name in _SYSU_SETTINGS}
        if not all(np.isin(rows, pool.rows).all() for rows in stored.values()):
            raise StudyError(f"{store.root}: its galleries are of test images; set evaluation.galleries: random_seed")
        galleries = {name: np.searchsorted(pool.rows, rows) for name, rows in stored.items()}
    return score_settings(query, pool, galleries, _sysu_ignore, "identity", evaluation.metric)


def _score_llcm(images: Images, store: Any, evaluation: Any) -> dict[str, ProtocolResult]:
    """LLCM. Both settings sample one image per identity and camera in each trial: the visible gallery of the first, the
    infrared queries of the second, whose trials therefore have different queries.

    Source: the evaluation code of the repository ZYK100/LLCM (Zhang and Wang, CVPR 2023).
    """
    infrared, visible = images.of_modality(INFRARED), images.of_modality(VISIBLE)

    def sampled(side: Images) -> Int[np.ndarray, "T S"]:
        paths = store.manifest["path"].iloc[side.rows].tolist()
        return random_seed_gallery(side.pids, side.camids, paths, np.unique(side.camids).tolist(), evaluation.trials)

    def score(query: Images, galleries: Int[np.ndarray, "T S"]) -> ProtocolResult:
        settings = {"LLCM": galleries}
        return score_settings(query, visible, settings, same_identity_and_camera, "identity", evaluation.metric)["LLCM"]

    everyone = np.arange(len(visible))
    trials = [score(infrared[queries], everyone[None]).trials[0] for queries in sampled(infrared)]
    second = over_trials(trials, everyone, "identity")
    return {"infrared_to_visible": score(infrared, sampled(visible)), "visible_to_infrared": second}


def _score_both_ways(images: Images, store: Any, evaluation: Any, *, names: Sequence[str]) -> dict[str, ProtocolResult]:
    """All infrared images against all visible ones, and the reverse; nothing is ignored. names: of the two settings."""
    results = {}
    for name, query, gallery in zip(names, (INFRARED, VISIBLE), (VISIBLE, INFRARED), strict=True):
        q, g = images.of_modality(query), images.of_modality(gallery)
        results[name] = evaluate_regdb(q.feat, q.pids, g.feat, g.pids, metric=evaluation.metric)
    return results


def _both_ways(names: Mapping[str, str], trials: int = 1) -> Protocol:
    """Both directions, infrared queries first. names: key -> title."""
    sides = dict(zip(names, ((INFRARED, VISIBLE), (VISIBLE, INFRARED)), strict=True))
    score = functools.partial(_score_both_ways, names=tuple(names))
    return Protocol(settings=names, ablation=next(iter(names)), sides=sides, score=score, trials=trials)


PROTOCOLS: dict[str, Protocol] = {
    "sysu_mm01": Protocol(
        settings=_SYSU_SETTINGS,
        ablation="all_single",
        sides=dict.fromkeys(_SYSU_SETTINGS, (INFRARED, VISIBLE)),
        score=_score_sysu,
        ignore=_sysu_ignore,
    ),
    "regdb": _both_ways(
        {"thermal_to_visible": "thermal to visible", "visible_to_thermal": "visible to thermal"}, trials=10
    ),
    "llcm": Protocol(
        settings=_DIRECTIONS,
        ablation="infrared_to_visible",
        sides=dict.fromkeys(_DIRECTIONS, (INFRARED, VISIBLE)),
        score=_score_llcm,
        ignore=same_identity_and_camera,
        caption="As published, visible to infrared does not mirror the other direction: sampled infrared images are "
        "queries, all visible images the gallery.",
    ),
    "both_ways": _both_ways(_DIRECTIONS),  # for photographs of one's own
}
