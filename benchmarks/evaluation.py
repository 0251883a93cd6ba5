"""Evaluation at the full size of both data sets against a loop over queries and against the bare matrix product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.measure import growth, interleaved, main, page, table
from danet_core.protocols import (
    SAME_PLACE,
    SEARCHES,
    evaluate_regdb,
    evaluate_regdb_settings,
    evaluate_sysu_settings,
)

ROUNDS, SLOW_ROUNDS = 7, 3
SYSU, REGDB = (96, 3803, 6775), (206, 2060, 2060)  # test identities, queries, gallery pool
FEATURES, TRIALS = 2048, 10


class Sides:
    """Random features of queries and gallery around a centre for each identity: scores between chance and 1."""

    def __init__(self, ids: int, queries: int, pool: int, features: int, cameras: tuple[tuple[int, ...], ...]) -> None:
        generator = np.random.default_rng(0)
        centres = generator.standard_normal((ids, features), dtype=np.float32)
        self.pids, self.camids, self.feat = [], [], []
        for count, choice in zip((queries, pool), cameras, strict=True):
            pids = generator.permutation(np.arange(count) % ids)
            noise = generator.standard_normal((count, features), dtype=np.float32)
            self.pids.append(pids)
            self.camids.append(generator.choice(choice, count))
            self.feat.append(centres[pids] + 4 * noise)
        self.query, self.gallery = (
            (feat, pids, camids) for feat, pids, camids in zip(self.feat, self.pids, self.camids, strict=True)
        )

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        query, gallery = (feat / np.linalg.norm(feat, axis=1, keepdims=True) for feat in self.feat)
        return query, gallery

    def product(self) -> np.ndarray:
        """The bare product of queries and pool."""
        return self.feat[0] @ self.feat[1].T


def galleries(sides: Sides) -> dict[str, np.ndarray]:
    """Both searches, single- and multi-shot (1 and 10 images of each identity and camera), TRIALS draws each."""
    generator = np.random.default_rng(1)
    pids, camids = sides.pids[1], sides.camids[1]
    drawn = {}
    for search, cameras in SEARCHES.items():
        cells = [np.flatnonzero((pids == pid) & (camids == camera)) for pid in np.unique(pids) for camera in cameras]
        for name, shots in (("single", 1), ("multi", 10)):
            size = [
                np.concatenate([generator.permutation(cell)[:shots] for cell in cells if len(cell)])
                for _ in range(TRIALS)
            ]
            drawn[f"{search}_{name}"] = np.stack(size)
    return drawn


def one_query(scores: np.ndarray, matches: np.ndarray, ids: np.ndarray | None) -> tuple[float, ...] | None:
    """Rank-1, Rank-10, AP and INP of one query; `ids` for identity-level ranks."""
    order = np.argsort(-scores)  # ties in any order, as public code leaves them; a stable sort takes four times as long
    ranks = np.flatnonzero(matches[order]) + 1
    if len(ranks) == 0:
        return None
    first = ranks[0]
    if ids is not None:
        _, seen = np.unique(ids[order], return_index=True)
        first = np.searchsorted(np.sort(seen), ranks[0] - 1) + 1
    return (
        float(first == 1),
        float(first <= 10),
        float((np.arange(1, len(ranks) + 1) / ranks).mean()),
        len(ranks) / ranks[-1],
    )


def sysu_by_query(sides: Sides, drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The protocol as public code writes it: a product for each gallery, then query after query."""
    query, gallery = sides.units()
    results = {}
    for name, trials in drawn.items():
        means = []
        for members in trials:
            scores = query @ gallery[members].T
            pids, camids = sides.pids[1][members], sides.camids[1][members]
            rows = []
            for i, (pid, camid) in enumerate(zip(sides.pids[0], sides.camids[0], strict=True)):
                left = camids != SAME_PLACE[1] if camid == SAME_PLACE[0] else np.ones(len(camids), dtype=bool)
                rows.append(one_query(scores[i][left], pids[left] == pid, pids[left]))
            means.append(np.mean([row for row in rows if row is not None], axis=0))
        results[name] = np.mean(means, axis=0)
    return results


def regdb_by_query(sides: Sides, one_product: bool) -> dict[tuple[str, str], np.ndarray]:
    """Both directions at both levels, query after query, with a product for each of the four or for each query."""
    thermal, visible = zip(sides.units(), sides.pids, strict=True)
    results = {}
    for direction, (query, q_pids), (gallery, g_pids) in (
        ("thermal_to_visible", thermal, visible),
        ("visible_to_thermal", visible, thermal),
    ):
        for level, ids in (("image", None), ("identity", g_pids)):
            scores = query @ gallery.T if one_product else (gallery @ feat for feat in query)
            rows = [one_query(own, g_pids == pid, ids) for own, pid in zip(scores, q_pids, strict=True)]
            results[direction, level] = np.mean([row for row in rows if row is not None], axis=0)
    return results


def row(
    name: str, ours: Callable[[], object], loop: Callable[[], object], sides: Sides, rounds: int, slow: int
) -> tuple[object, ...]:
    """One line of the table: the evaluation beside the product, and the loop beside the evaluation."""
    fast = interleaved({"evaluation": ours, "product": sides.product}, rounds)
    both = interleaved({"evaluation": ours, "loop": loop}, slow, warm=True)  # the check has called both
    evaluation = fast["evaluation"]
    return (
        name,
        evaluation,
        fast["product"],
        evaluation.over(fast["product"]),
        both["loop"],
        both["loop"].over(both["evaluation"]),
    )


def section(tiny: bool) -> str:
    rounds, slow, features = (2, 1, 8) if tiny else (ROUNDS, SLOW_ROUNDS, FEATURES)
    sysu = Sides(*((6, 30, 200) if tiny else SYSU), features, ((3, 6), (1, 2, 4, 5)))
    regdb = Sides(*((6, 30, 30) if tiny else REGDB), features, ((2,), (1,)))
    drawn = galleries(sysu)

    def score_sysu() -> dict[str, dict[str, float]]:
        scored = evaluate_sysu_settings(*sysu.query, *sysu.gallery, drawn)
        return {name: result.mean for name, result in scored.items()}

    def score_regdb() -> dict[tuple[str, str], dict[str, float]]:
        scored = evaluate_regdb_settings(*regdb.query[:2], *regdb.gallery[:2])
        return {(name, level): result.mean for name, levels in scored.items() for level, result in levels.items()}

    expected, found = sysu_by_query(sysu, drawn), score_sysu()
    for name, scores in expected.items():
        check(scores, found[name])
    for one_product in (True, False):
        both = score_regdb()
        for setting, scores in regdb_by_query(regdb, one_product).items():
            check(scores, both[setting])
    sizes = (50, 100) if tiny else (1000, 2000, 4000, 8000)
    times = []
    for size in sizes:
        part = Sides(sysu.pids[0].max() + 1, min(1000, size), size, features, ((3, 6), (1, 2, 4, 5)))
        action = {"evaluation": lambda part=part: evaluate_regdb(*part.query[:2], *part.gallery[:2])}
        times.append(interleaved(action, rounds)["evaluation"])
    rows = [
        row("SYSU-MM01, four settings, ten trials", score_sysu, lambda: sysu_by_query(sysu, drawn), sysu, rounds, slow),
        row(
            "RegDB, both directions, both levels",
            score_regdb,
            lambda: regdb_by_query(regdb, False),
            regdb,
            rounds,
            slow,
        ),
        row(
            "the same, the loop after a product for each setting",
            score_regdb,
            lambda: regdb_by_query(regdb, True),
            regdb,
            rounds,
            slow,
        ),
    ]
    return page(
        "## Evaluation",
        f"""From features of {features} numbers to all scores on one thread, at the size of the data sets' test splits:
        {len(sysu.pids[0]):,} queries against a pool of {len(sysu.pids[1]):,} images, and {len(regdb.pids[0]):,} against
        {len(regdb.pids[1]):,} in both directions and at both levels of the CMC. Product: one of all queries with the
        pool. Loop: the protocol written query after query, each setting by itself, with a product for each gallery
        (SYSU-MM01) or each query (RegDB), checked to give the same scores. The last line's loop multiplies all queries
        with the gallery at once, and a large part of it is those products.""",
        table(("protocol", "evaluation", "product", "over the product", "loop", "loop / evaluation"), rows),
        "How one evaluation of as many queries, but at most 1,000, grows with the gallery:",
        growth("gallery images", sizes, times),
    )


def check(expected: np.ndarray, found: dict[str, float]) -> None:
    """Both ways of scoring have to agree, but for the order of features that float32 cannot tell apart."""
    scores = [found[name] for name in ("cmc1", "cmc10", "mAP", "mINP")]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


if __name__ == "__main__":
    main(section)
