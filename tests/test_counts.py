"""Counts by split and camera agree with what is published or asked for, and say where they do not."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from stores import PARAMS

from danet_core.config import load_study
from danet_core.files import StudyError
from danet_core.parameters import Dataset, RenderRegdb, RenderSysu, SplitCounts
from data_prep.counts import counts_by_camera
from data_prep.sysu_mm01 import EXPECTED

STUDY = load_study(PARAMS)
INFRARED_CAMERAS = (3, 6)


def manifest(*cells: tuple[str, int, str, int, int]) -> pd.DataFrame:
    """From (split, camid, modality, pid, number of images)."""
    rows = [(pid, camid, modality, split) for split, camid, modality, pid, n in cells for _ in range(n)]
    return pd.DataFrame(rows, columns=["pid", "camid", "modality", "split_1"])


def published_sysu() -> pd.DataFrame:
    """A manifest with SYSU-MM01's published counts; which identity a camera misses is not published, so any will do."""
    cells, first = [], 0
    for split in ("train", "val", "test"):
        total = EXPECTED.ids[split]
        for k, (ids, images) in enumerate(zip(EXPECTED.split_ids[split], EXPECTED.split_images[split], strict=True)):
            for i in range(ids):  # the last one has what is left over
                n = images // ids if i else images - (ids - 1) * (images // ids)
                pid = first + (k * 50 + i) % total
                cells.append((split, k + 1, "infrared" if k + 1 in INFRARED_CAMERAS else "visible", pid, n))
        first += total
    return manifest(*cells)


def test_published_counts_of_sysu_agree_line_by_line() -> None:
    table = counts_by_camera(STUDY.dataset("sysu"), published_sysu())
    assert table["agrees"].all()
    assert len(table) == 6 + 3 + 6 + 3  # cameras of each split, and a total each
    assert table.loc[("train", "3", "infrared"), ["identities", "images"]].tolist() == [293, 5929]
    assert table.loc[("test", "all", "both"), "identities"] == 96
    trained = table.loc[("train", "all", "both"), "images"] + table.loc[("val", "all", "both"), "images"]
    assert trained == 22_258 + 11_909  # the paper's numbers


def test_one_image_too_few_is_seen_in_its_camera_and_in_the_total() -> None:
    full = published_sysu()
    lost = full.index[(full.split_1 == "test") & (full.camid == 6)][0]
    table = counts_by_camera(STUDY.dataset("sysu"), full.drop(lost))
    assert table.index[~table["agrees"]].tolist() == [("test", "6", "infrared"), ("test", "all", "both")]


def test_a_camera_that_is_missing_altogether_is_a_line_with_nothing_found() -> None:
    full = published_sysu()
    table = counts_by_camera(STUDY.dataset("sysu"), full[full.camid != 4])
    line = table.loc[("val", "4", "visible")]
    assert (line["images"], line["expected images"], line["agrees"]) == (0, 990, False)


def rendered(dataset: str, render: RenderSysu | RenderRegdb) -> Dataset:
    return dataclasses.replace(STUDY.dataset(dataset), render=render)


def test_a_rendering_fixes_images_of_an_identity_but_not_which_cameras_see_it() -> None:
    dataset = rendered("synth_sysu", RenderSysu(5, 2, 2, 2, SplitCounts(2, 3, 4), 0.1, 0.6, 64))
    cells = [("train", 1, "visible", 1, 2), ("train", 1, "visible", 2, 2), ("train", 3, "infrared", 1, 2)]
    cells += [("val", 3, "infrared", pid, 3) for pid in (3, 4)] + [("test", 6, "infrared", pid, 4) for pid in (5, 6)]
    table = counts_by_camera(dataset, manifest(*cells))
    assert table["agrees"].all()
    assert table.loc[("train", "1", "visible"), "expected images"] == 4
    assert table.loc[("train", "all", "both"), "expected identities"] == 2
    assert pd.isna(table.loc[("train", "1", "visible"), "expected identities"])
    cells[-1] = ("test", 6, "infrared", 6, 3)
    table = counts_by_camera(dataset, manifest(*cells))
    assert table.index[~table["agrees"]].tolist() == [("test", "6", "infrared")]
    table = counts_by_camera(dataset, manifest(*cells[:-1]))
    assert ("test", "all", "both") in table.index[~table["agrees"]]


@pytest.mark.parametrize(
    ("dataset", "train", "test", "images"),
    [(STUDY.dataset("regdb"), 206, 206, 10), (rendered("synth_regdb", RenderRegdb(5, 6, 3)), 3, 3, 3)],
    ids=["published", "rendered"],
)
def test_counts_of_regdb_agree_and_images_in_neither_split_are_left_out(
    dataset: Dataset, train: int, test: int, images: int
) -> None:
    cells = [
        (split, camid, modality, pid, images)
        for camid, modality in ((1, "visible"), (2, "infrared"))
        for pid, split in enumerate(["train"] * train + ["test"] * test)
    ]
    table = counts_by_camera(dataset, manifest(*cells, ("", 1, "visible", 999, 5)))
    assert table["agrees"].all()
    assert table["images"].tolist() == [train * images, train * images, 2 * train * images] * 2


def test_another_trial_than_the_manifest_has_is_an_error() -> None:
    with pytest.raises(StudyError, match="regdb has no split of trial 4"):
        counts_by_camera(STUDY.dataset("regdb"), manifest(("train", 1, "visible", 1, 1)), 4)
