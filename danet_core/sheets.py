"""Sheets of packed crops in rows and columns, to look at the data. Nothing here reads or writes a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib.layout_engine import ConstrainedLayoutEngine

from danet_core import MODALITIES
from danet_core.style import StudyFigure, need, style, titled


def image_grid(
    cells: Sequence[Sequence[UInt8[np.ndarray, "3 H W"] | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    synthetic: bool,
) -> StudyFigure:
    """Packed crops of one size in rows and columns; None stays grey.

    Args:
        cells: one list of crops for each row name, in store order, all equally long.
        columns: names above, each over the same number of neighbouring crops.

    Raises StudyError when there is no crop.
    """
    shapes = [crop.shape[1:] for row in cells for crop in row if crop is not None]
    need(shapes, "crop")
    (height, width), per_column = shapes[0], len(cells[0]) // len(columns)
    gap = max(2, width // 16)
    lefts = [k * (width + gap) + (k // per_column) * 3 * gap for k in range(len(cells[0]))]
    tops = [k * (height + gap) for k in range(len(cells))]
    sheet = np.full((tops[-1] + height, lefts[-1] + width, 3), 255, np.uint8)
    for top, row in zip(tops, cells, strict=True):
        for left, crop in zip(lefts, row, strict=True):
            sheet[top : top + height, left : left + width] = 225 if crop is None else crop.transpose(1, 2, 0)
    with style():
        inches = 0.62 / width  # for each pixel
        size = (max(sheet.shape[1] * inches + 1.1, 6.0), sheet.shape[0] * inches + 1.0)  # 6 inches hold the title
        figure = StudyFigure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12))
        axis = figure.subplots()
        axis.imshow(sheet, interpolation="antialiased")
        axis.spines[:].set_visible(False)
        axis.grid(False)
        axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        middles = np.array(lefts).reshape(len(columns), per_column).mean(1) + width / 2
        axis.set_xticks(middles, columns)
        axis.set_yticks([top + height / 2 for top in tops], rows)
        figure.suptitle(titled(title, synthetic))
    return figure


def contact_sheet(
    images: UInt8[np.ndarray, "N 3 H W"],
    manifest: pd.DataFrame,
    pids: Sequence[int],
    *,
    per_camera: int = 2,
    title: str,
    synthetic: bool,
) -> StudyFigure:
    """One row for each identity, `per_camera` crops of each camera, visible cameras left, infrared ones right.

    A cell stays grey where the camera has fewer crops of the identity. `images` and `manifest` are a store's.
    """
    cameras = sorted({(MODALITIES.index(m), int(c)) for m, c in zip(manifest.modality, manifest.camid, strict=True)})
    cells = []
    for pid in pids:
        line: list[Any] = []
        for _, camid in cameras:
            found = manifest.index[(manifest.pid == pid) & (manifest.camid == camid)]
            line += [images[row] for row in spread(found, per_camera)] + [None] * (per_camera - len(found))
        cells.append(line)
    return image_grid(
        cells,
        rows=[f"identity {pid}" for pid in pids],
        columns=[f"{MODALITIES[modality]}\ncamera {camid}" for modality, camid in cameras],
        title=title,
        synthetic=synthetic,
    )


def identity_sheet(
    images: UInt8[np.ndarray, "N 3 H W"],
    manifest: pd.DataFrame,
    pids: Sequence[int],
    *,
    count: int = 8,
    title: str,
    synthetic: bool,
) -> StudyFigure:
    """Two rows for each identity, its visible and its infrared crops, `count` of each spread over its cameras."""
    cells, rows = [], []
    for pid in pids:
        for modality in MODALITIES:
            found = manifest.index[(manifest.pid == pid) & (manifest.modality == modality)]
            cells.append([images[row] for row in spread(found, count)] + [None] * (count - len(found)))
            rows.append(f"identity {pid}\n{modality}")
    return image_grid(cells, rows=rows, columns=[""], title=title, synthetic=synthetic)


def spread(values: Iterable[int], count: int) -> list[int]:
    """At most `count` of the different values, evenly spaced in ascending order, the first among them."""
    ordered = sorted({int(value) for value in values})
    return [ordered[k * len(ordered) // count] for k in range(count)] if len(ordered) > count else ordered


def unnormalise(
    images: Float[np.ndarray, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "B 3 H W"]:
    """What `augment.normalise` was given, to look at: `mean` and `std` of the channels in [0, 1], as there."""
    scale, shift = (np.array(values)[:, None, None] * 255 for values in (std, mean))
    return (images * scale + shift).round().clip(0, 255).astype(np.uint8)
