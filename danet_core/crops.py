"""Figures that show crops. Every function returns a matplotlib figure; nothing here reads or writes a file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from danet_core.style import StudyFigure, need, style


class RankedImage(NamedTuple):
    """A crop in a ranked list, with its distance to the query; the query itself has none."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    distance: float | None = None


def ranked_list(query: RankedImage, ranked: Sequence[RankedImage], *, title: str, columns: int = 10) -> StudyFigure:
    """One query, framed, and the images ranked for it, nearest first, `columns` to a row, each with rank and distance.

    Names stand below, broken at slashes and cut at the front where they are long. Nothing is cropped or stretched.
    Raises StudyError when nothing is ranked.
    """
    need(ranked, "ranked image")
    columns = min(columns, len(ranked))
    rows = math.ceil(len(ranked) / columns)
    shapes = np.array([one.image.shape[:2] for one in (query, *ranked)], dtype=float)  # (images, 2)
    tallest = float(np.clip((shapes[:, 0] / shapes[:, 1]).max(), 0.6, 3.0))
    with style():
        size = (1.05 * max(columns + 1, 6), rows * (0.92 * tallest + 0.5) + 0.5)
        figure = StudyFigure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns + 1, squeeze=False)
        for axis in grid.flat:
            axis.set_visible(False)
        places = [grid[0, 0], *grid[:, 1:].flat]
        for rank, (axis, one) in enumerate(zip(places, (query, *ranked), strict=False)):
            axis.set_visible(True)
            axis.imshow(one.image, interpolation="antialiased")
            axis.set(xticks=[], yticks=[], anchor="N")
            axis.set_title("query" if one.distance is None else f"{rank} · {one.distance:.3f}", fontsize=8)
            axis.set_xlabel(_name_lines(one.name), fontsize=6, parse_math=False)  # a dollar sign is one
            axis.spines[:].set(visible=one is query, color="#D55E00", linewidth=2.5)
        figure.suptitle(title, parse_math=False)
    return figure


def _name_lines(name: str, width: int = 18, most: int = 3) -> str:
    """The end of a path in at most `most` lines of `width` characters, broken after slashes where that fits."""
    lines = [""]
    for piece in re.findall(rf"[^/]{{1,{width - 1}}}/?|/", name):
        if len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines if len(lines) <= most else ["…" + lines[-most], *lines[1 - most :]])
