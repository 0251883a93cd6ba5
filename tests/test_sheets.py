"""Sheets of crops: each crop in its row and column, what is missing stays grey, and a rendered set says so."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from stores import PARAMS

from danet_core import sheets
from danet_core.augment import normalise
from danet_core.config import load_study
from danet_core.files import StudyError

HEIGHT, WIDTH = 8, 4
GREY = 225
ABOUT = {"title": "somewhere", "synthetic": True}


def crop(value: int) -> np.ndarray:
    return np.full((3, HEIGHT, WIDTH), value, np.uint8)


def store(*rows: tuple[int, int, str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Images whose every pixel is 10 times their row number, with pid, camid and modality."""
    return np.stack([crop(10 * k) for k in range(len(rows))]), pd.DataFrame(rows, columns=["pid", "camid", "modality"])


def shown(figure: Figure) -> list[list[int]]:
    """The sheet's crops by the value of their middle pixel, row by row, found through the gaps between them."""
    (axis,) = figure.axes
    sheet = np.asarray(axis.images[0].get_array())[:, :, 0].astype(int)
    rows = np.flatnonzero((sheet != 255).any(1))
    tops = [row for row in rows if row - 1 not in rows]
    columns = np.flatnonzero((sheet != 255).any(0))
    lefts = [column for column in columns if column - 1 not in columns]
    return [[int(sheet[top + HEIGHT // 2, left + WIDTH // 2]) for left in lefts] for top in tops]


def labels(figure: Figure) -> tuple[list[str], list[str]]:
    (axis,) = figure.axes
    return [t.get_text() for t in axis.get_yticklabels()], [t.get_text() for t in axis.get_xticklabels()]


def test_a_contact_sheet_has_identities_as_rows_and_cameras_as_columns_visible_ones_first() -> None:
    images, manifest = store(
        (7, 3, "infrared"), (7, 1, "visible"), (7, 1, "visible"), (7, 1, "visible"), (9, 3, "infrared")
    )
    figure = sheets.contact_sheet(images, manifest, [7, 9], per_camera=2, **ABOUT)
    assert shown(figure) == [[10, 20, 0, GREY], [GREY, GREY, 40, GREY]]
    assert labels(figure) == (["identity 7", "identity 9"], ["visible\ncamera 1", "infrared\ncamera 3"])


def test_an_identity_sheet_puts_its_infrared_crops_below_its_visible_ones() -> None:
    images, manifest = store((7, 1, "visible"), (7, 3, "infrared"), (7, 2, "visible"), (8, 1, "visible"))
    figure = sheets.identity_sheet(images, manifest, [7], count=2, **ABOUT)
    assert shown(figure) == [[0, 20], [10, GREY]]
    assert labels(figure)[0] == ["identity 7\nvisible", "identity 7\ninfrared"]


def test_a_column_name_stands_over_the_middle_of_its_crops() -> None:
    figure = sheets.image_grid([[crop(0), crop(10), crop(20), crop(30)]], rows=["a"], columns=["x", "y"], **ABOUT)
    (axis,) = figure.axes
    sheet = np.asarray(axis.images[0].get_array())[0, :, 0].astype(int)
    filled = np.flatnonzero(sheet != 255)
    halves = [filled[sheet[filled] < 15], filled[sheet[filled] > 15]]
    assert list(axis.get_xticks()) == [half.min() + (half.max() + 1 - half.min()) / 2 for half in halves]


@pytest.mark.parametrize("synthetic", [True, False])
def test_a_sheet_of_rendered_crops_says_synthetic(synthetic: bool) -> None:
    figure = sheets.image_grid([[crop(0)]], rows=["a"], columns=["x"], title="somewhere", synthetic=synthetic)
    title = figure._suptitle.get_text()  # type: ignore[attr-defined]
    assert title.startswith("somewhere") and ("synthetic" in title) == synthetic


def test_an_empty_sheet_is_an_error() -> None:
    with pytest.raises(StudyError, match="no crop to draw"):
        sheets.image_grid([[None]], rows=["a"], columns=["x"], **ABOUT)


def test_spread_values_are_different_ascending_and_start_with_the_first() -> None:
    assert sheets.spread([9, 1, 5, 5, 3, 7, 1], 3) == [1, 3, 7]
    assert sheets.spread([4, 2, 2], 3) == [2, 4]
    assert sheets.spread([], 3) == []


def test_unnormalised_images_are_the_bytes_that_were_normalised() -> None:
    augment = load_study(PARAMS).dataset("synth_sysu").recipe.augment
    images = np.random.default_rng(0).integers(0, 256, (2, 3, HEIGHT, WIDTH), dtype=np.uint8)
    floats = normalise(torch.from_numpy(images), augment).numpy()
    np.testing.assert_array_equal(sheets.unnormalise(floats, augment.mean, augment.std), images)
