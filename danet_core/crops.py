"""Figures that show crops. Every function returns a matplotlib figure; nothing here reads or writes a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.patches import Rectangle

from danet_core.style import StudyFigure, need, style

Mark = Literal["right", "wrong", "ignored"]

# Colour and sign say the same thing twice: the colours are Okabe and Ito's, the sign is for grey print.
MARKS: Mapping[str, tuple[str, str]] = {
    "right": ("#009E73", "✓"),
    "wrong": ("#D55E00", "✗"),
    "ignored": ("#9A9A9A", "ignored"),
}
_QUERY_FRAME = "#0072B2"
_GAP = 0.08  # between crops, in crop widths
_LINE = 0.13  # height of a line of text, inches
_CELL = 1.05  # width of a crop with its gap, inches


class RankedImage(NamedTuple):
    """A crop in a ranked list, with its distance to the query; the query itself has none.

    mark: whether it shows the query's identity, where that is known. "ignored" is an image that the protocol takes out
    of the ranking: it is shown without a rank.
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    distance: float | None = None
    mark: Mark | None = None


def ranked_list(query: RankedImage, ranked: Sequence[RankedImage], *, title: str, columns: int = 10) -> StudyFigure:
    """One query, framed, and the images ranked for it, nearest first, `columns` to a row, each with rank and distance.

    A mark is shown by the frame's colour and by a sign (✓ right, ✗ wrong, the word ignored). Names stand below, broken
    at slashes and cut at the front where they are long. Nothing is cropped or stretched.
    Raises StudyError when nothing is ranked.
    """
    need(ranked, "ranked image")
    columns = min(columns, len(ranked))
    rows = math.ceil(len(ranked) / columns)
    shapes = np.array([one.image.shape[:2] for one in (query, *ranked)], dtype=float)  # (images, 2)
    tallest = float(np.clip((shapes[:, 0] / shapes[:, 1]).max(), 0.6, 3.0))
    names = [_name_lines(one.name) for one in (query, *ranked)]
    below = max(name.count("\n") + 1 for name in names)
    width, row = _CELL * max(columns + 1, 6), _CELL * tallest + (below + 1.9) * _LINE
    head = (title.count("\n") + 1) * 1.3 * _LINE + 0.1
    with style():
        # One set of axes in inches: with one for each image, the layout alone took a second for fifty images.
        figure = StudyFigure(figsize=(width, rows * row + head))
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(rows * row, -head))
        axis.set_axis_off()
        ranks = iter(range(1, len(ranked) + 1))
        cells = [(0, 0), *((position // columns, 1 + position % columns) for position in range(len(ranked)))]
        for (line, column), one, name in zip(cells, (query, *ranked), names, strict=True):
            left, top = (column + _GAP / 2) * _CELL, line * row + 1.5 * _LINE
            high, wide = _fitted(one.image, _CELL * (1 - _GAP), _CELL * tallest)
            left += (_CELL * (1 - _GAP) - wide) / 2
            axis.imshow(one.image, extent=(left, left + wide, top + high, top), interpolation="antialiased", zorder=1)
            colour, sign = MARKS[one.mark] if one.mark else (_QUERY_FRAME, "")
            if one is query or one.mark:
                frame: Any = {"edgecolor": colour, "linestyle": "--" if one.mark == "ignored" else "-"}
                axis.add_patch(Rectangle((left, top), wide, high, fill=False, linewidth=2.5, zorder=2, **frame))
            words = ["query"] if one.distance is None else [f"{one.distance:.3f}"]
            if one.distance is not None and one.mark != "ignored":
                words.insert(0, str(next(ranks)))
            middle, told = left + wide / 2, f"{' · '.join(words)} {sign}".strip()
            axis.text(
                middle, top - 0.3 * _LINE, told, ha="center", va="bottom", fontsize=8, color=colour if sign else None
            )
            axis.text(middle, top + high + 0.4 * _LINE, name, ha="center", va="top", fontsize=6, parse_math=False)
        axis.set(xlim=(0, width), ylim=(rows * row, -head))  # imshow has moved them
        figure.suptitle(title, parse_math=False, y=1 - 0.05 / figure.get_figheight(), va="top")
    return figure


def _fitted(image: UInt8[np.ndarray, "H W 3"], width: float, height: float) -> tuple[float, float]:
    """Height and width of an image scaled into a box, its shape kept."""
    scale = min(width / image.shape[1], height / image.shape[0])
    return image.shape[0] * scale, image.shape[1] * scale


def _name_lines(name: str, width: int = 18, most: int = 3) -> str:
    """The end of a path in at most `most` lines of `width` characters, broken after slashes where that fits."""
    lines = [""]
    for piece in re.findall(rf"[^/]{{1,{width - 1}}}/?|/", name):
        if len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines if len(lines) <= most else ["…" + lines[-most], *lines[1 - most :]])
