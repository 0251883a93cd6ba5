"""The best and worst answered queries are those by average precision, one for each person."""

from __future__ import annotations

import json

import numpy as np
import pytest

from danet_core import extremes
from danet_core.extremes import COUNT, SHOWN, Side, extreme_queries
from danet_core.files import StudyError
from danet_core.metrics import retrieval_metrics


def sides(queries: int = 40, images: int = 60, people: int = 8, seed: int = 0) -> tuple[Side, Side]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, 6))
    q_pids, g_pids = rng.integers(0, people, queries), rng.integers(0, people, images)
    query = centres[q_pids] + rng.normal(size=(queries, 6))
    gallery = centres[g_pids] + rng.normal(size=(images, 6))
    return Side(100 + np.arange(queries), query, q_pids), Side(500 + np.arange(images), gallery, g_pids)


def precisions(query: Side, gallery: Side, ignore: np.ndarray) -> np.ndarray:
    """AP of each query, by the metric that the tables print."""
    a, b = (side.feat / np.linalg.norm(side.feat, axis=1, keepdims=True) for side in (query, gallery))
    rows = range(len(query.rows))
    alone = [retrieval_metrics(1 - a[[i]] @ b.T, query.pids[[i]], gallery.pids, ignore=ignore[[i]]).mAP for i in rows]
    return np.array(alone)


def test_they_are_the_extremes_of_average_precision_with_one_query_for_each_person():
    query, gallery = sides()
    ignore = np.random.default_rng(1).random((40, 60)) < 0.2
    found, expected = extreme_queries(query, gallery, ignore.__getitem__), precisions(query, gallery, ignore)
    for end, pick in (("best", max), ("worst", min)):
        of_person = sorted((pick(expected[query.pids == pid]) for pid in np.unique(query.pids)), reverse=end == "best")
        assert [one["ap"] for one in found[end]] == pytest.approx(of_person[:COUNT])
        for one in found[end]:
            assert one["ap"] == pytest.approx(expected[one["row"] - 100])
        people = [query.pids[one["row"] - 100] for one in found[end]]
        assert len(set(people)) == COUNT


def test_each_shows_its_nearest_gallery_images_and_never_an_ignored_one():
    query, gallery = sides()
    ignore = np.zeros((40, 60), dtype=bool)
    ignore[:, ::3] = True
    for one in [one for end in extreme_queries(query, gallery, ignore.__getitem__).values() for one in end]:
        ranked, row = one["ranked"], one["row"] - 100
        images = np.array(ranked["rows"]) - 500
        assert len(images) == SHOWN and not (images % 3 == 0).any()
        assert ranked["distances"] == sorted(ranked["distances"])
        assert ranked["right"] == (gallery.pids[images] == query.pids[row]).tolist()
        assert one["n_right"] == ((gallery.pids == query.pids[row]) & ~ignore[row]).sum()


def test_equal_queries_stand_in_the_order_of_their_rows():
    feat, pids = np.eye(4), np.arange(4)
    found = extreme_queries(Side(pids, feat, pids), Side(10 + pids, feat, pids))
    assert [one["row"] for one in found["best"]] == [one["row"] for one in found["worst"]] == [0, 1, 2]


@pytest.mark.parametrize("queries_at_a_time", [1, 2, 7, 41])
def test_blocks_of_queries_give_the_same_extremes(queries_at_a_time, monkeypatch):
    # Whole numbers in unit vectors of length 2: every distance is exact, whatever the shape of the product.
    rng = np.random.default_rng(2)
    query, gallery = (
        Side(side.rows, rng.choice([-1.0, 1.0], (len(side.rows), 16)), side.pids)
        for side in sides(queries=41, images=60)
    )
    ignore = rng.random((41, 60)) < 0.2
    whole = extreme_queries(query, gallery, ignore.__getitem__)
    monkeypatch.setattr(extremes, "_PAIRS", 60 * queries_at_a_time)
    assert extreme_queries(query, gallery, ignore.__getitem__) == whole


def test_what_it_gives_is_plain_json():
    found = extreme_queries(*sides())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_query_without_a_match_is_left_out_and_none_with_one_is_an_error():
    query, gallery = sides(people=8)
    alone = Side(query.rows, query.feat, np.where(query.pids == 3, 3, 99))
    shown = [one["row"] for end in extreme_queries(alone, gallery).values() for one in end]
    assert {int(query.pids[row - 100]) for row in shown} == {3}
    with pytest.raises(StudyError, match="none of the 40 queries has a match"):
        extreme_queries(Side(query.rows, query.feat, query.pids + 50), gallery)
