"""Figures of ranked lists: a query's crop and the gallery's, nearest first. Nothing here reads or writes a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.patches import Rectangle

from danet_core.store import PackedStore
from danet_core.style import StudyFigure, need, style, titled

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
    lines = [ranked[start : start + columns] for start in range(0, len(ranked), columns)]
    return _sheet([("", query if number == 0 else None, line) for number, line in enumerate(lines)], title)


RankedRow = tuple[str, RankedImage, Sequence[RankedImage]]  # heading, query, what it ranks nearest


def ranked_lists(rows: Sequence[RankedRow], *, title: str, synthetic: bool) -> StudyFigure:
    """Several queries, one to a row, each under its heading; otherwise as `ranked_list`.

    Raises StudyError when there is no query.
    """
    need(rows, "ranked list")
    return _sheet(rows, titled(title, synthetic))


def extreme_rows(queries: Mapping[str, Any], store: PackedStore) -> list[RankedRow]:
    """The best and the worst answered queries of an evaluation record (its key `queries`), with their crops.

    store: the packed images that the record's rows refer to.
    """

    def shown(row: int, distance: float | None = None, mark: Mark | None = None) -> RankedImage:
        name = f"id {store.pids[row]}, cam {store.camids[row]}"
        return RankedImage(name, np.asarray(store.images[row]).transpose(1, 2, 0), distance, mark)

    rows: list[RankedRow] = []
    for end in ("best", "worst"):
        for place, one in enumerate(queries[end], start=1):
            ranked = zip(*(one["ranked"][key] for key in ("rows", "distances", "right")), strict=True)
            images = [shown(row, distance, "right" if right else "wrong") for row, distance, right in ranked]
            heading = f"{end} {place}: average precision {100 * one['ap']:.1f} %, {one['n_right']} right in the gallery"
            rows.append((heading, shown(one["row"]), images))
    return rows


def _sheet(lines: Sequence[tuple[str, RankedImage | None, Sequence[RankedImage]]], title: str) -> StudyFigure:
    """Rows of crops in inches from the top left corner; ranks are counted on from row to row until the next query."""
    shown = [one for _, query, ranked in lines for one in ((query, *ranked) if query else ranked)]
    shapes = np.array([one.image.shape[:2] for one in shown], dtype=float)  # (images, 2)
    tallest = float(np.clip((shapes[:, 0] / shapes[:, 1]).max(), 0.6, 3.0))
    below = max(_name_lines(one.name).count("\n") + 1 for one in shown)
    above = 1.5 + 2.2 * any(heading for heading, _, _ in lines)  # lines of text over a crop
    columns = max(len(ranked) for _, _, ranked in lines)
    width, row = _CELL * max(columns + 1, 6), _CELL * tallest + (below + above + 0.4) * _LINE
    head = (title.count("\n") + 1) * 1.3 * _LINE + 0.1
    with style():
        # One set of axes in inches: with one for each image, the layout alone took a second for fifty images.
        figure = StudyFigure(figsize=(width, len(lines) * row + head))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        ranks = iter(range(1, len(shown) + 1))
        for line, (heading, query, ranked) in enumerate(lines):
            if query:
                ranks = iter(range(1, len(shown) + 1))
            if heading:
                axis.text(_GAP / 2 * _CELL, line * row + 1.4 * _LINE, heading, fontsize=8, parse_math=False)
            for column, one in enumerate((query, *ranked)):
                if one is None:
                    continue
                left, top = (column + _GAP / 2) * _CELL, line * row + above * _LINE
                high, wide = _fitted(one.image, _CELL * (1 - _GAP), _CELL * tallest)
                left += (_CELL * (1 - _GAP) - wide) / 2
                where = (left, left + wide, top + high, top)
                axis.imshow(one.image, extent=where, interpolation="none", zorder=1)
                colour, sign = MARKS[one.mark] if one.mark else (_QUERY_FRAME, "")
                if one is query or one.mark:
                    frame: Any = {"edgecolor": colour, "linestyle": "--" if one.mark == "ignored" else "-"}
                    axis.add_patch(Rectangle((left, top), wide, high, fill=False, linewidth=2.5, zorder=2, **frame))
                words = ["query"] if one.distance is None else [f"{one.distance:.3f}"]
                if one.distance is not None and one.mark != "ignored":
                    words.insert(0, str(next(ranks)))
                middle, told = left + wide / 2, f"{' · '.join(words)} {sign}".strip()
                centred: Any = {"ha": "center", "parse_math": False}
                above_it, below_it = top - 0.3 * _LINE, top + high + 0.4 * _LINE
                axis.text(middle, above_it, told, va="bottom", fontsize=8, color=colour if sign else None, **centred)
                axis.text(middle, below_it, _name_lines(one.name), va="top", fontsize=6, **centred)
        axis.set(xlim=(0, width), ylim=(len(lines) * row, -head))
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
