"""Figures of ranked lists: a query's crop and the gallery's, nearest first. Nothing here reads or writes a file."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

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
_MARGIN = 0.05  # over the title, inches
_INK = "#262626"  # style.py's colour of text


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
    return _drawn(_placed(_broken(query, ranked, columns), title))


def ranked_picture(
    query: RankedImage, ranked: Sequence[RankedImage], *, title: str, columns: int = 10, dpi: int = 84
) -> Image.Image:
    """The same as `ranked_list` in pixels for the screen, a tenth of the time; errors are the same too."""
    return _painted(_placed(_broken(query, ranked, columns), title), dpi)


def _broken(query: RankedImage, ranked: Sequence[RankedImage], columns: int) -> list[_Line]:
    need(ranked, "ranked image")
    columns = min(columns, len(ranked))
    lines = [ranked[start : start + columns] for start in range(0, len(ranked), columns)]
    return [("", query if number == 0 else None, line) for number, line in enumerate(lines)]


RankedRow = tuple[str, RankedImage, Sequence[RankedImage]]  # heading, query, what it ranks nearest


def ranked_lists(rows: Sequence[RankedRow], *, title: str, synthetic: bool) -> StudyFigure:
    """Several queries, one to a row, each under its heading; otherwise as `ranked_list`.

    Raises StudyError when there is no query.
    """
    need(rows, "ranked list")
    return _drawn(_placed(rows, titled(title, synthetic)))


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


_Line = tuple[str, RankedImage | None, Sequence[RankedImage]]  # heading, query or none, what is ranked


class _Crop(NamedTuple):
    """An image in its place, inches from the top left corner; its frame's colour where it has one, dashed or not."""

    image: UInt8[np.ndarray, "H W 3"]
    left: float
    top: float
    wide: float
    high: float
    frame: str | None
    dashed: bool


class _Text(NamedTuple):
    """Words and where they stand: a heading starts at x on the line y, others are centred at x above or below y."""

    x: float
    y: float
    words: str
    size: float
    place: Literal["heading", "above", "below"]
    colour: str | None = None


class _Sheet(NamedTuple):
    """What is drawn, in inches; `head` is the title's height, which lies above y = 0 and counts in `height`."""

    title: str
    width: float
    height: float
    head: float
    crops: list[_Crop]
    texts: list[_Text]


def _placed(lines: Sequence[_Line], title: str) -> _Sheet:
    """Rows of crops in inches from the top left corner; ranks are counted on from row to row until the next query."""
    shown = [one for _, query, ranked in lines for one in ((query, *ranked) if query else ranked)]
    shapes = np.array([one.image.shape[:2] for one in shown], dtype=float)  # (images, 2)
    tallest = float(np.clip((shapes[:, 0] / shapes[:, 1]).max(), 0.6, 3.0))
    below = max(_name_lines(one.name).count("\n") + 1 for one in shown)
    above = 1.5 + 2.2 * any(heading for heading, _, _ in lines)  # lines of text over a crop
    columns = max(len(ranked) for _, _, ranked in lines)
    width, row = _CELL * max(columns + 1, 6), _CELL * tallest + (below + above + 0.4) * _LINE
    head = (title.count("\n") + 1) * 1.3 * _LINE + 0.1
    sheet = _Sheet(title, width, len(lines) * row + head, head, [], [])
    ranks = iter(range(1, len(shown) + 1))
    for line, (heading, query, ranked) in enumerate(lines):
        if query:
            ranks = iter(range(1, len(shown) + 1))
        if heading:
            sheet.texts.append(_Text(_GAP / 2 * _CELL, line * row + 1.4 * _LINE, heading, 8, "heading"))
        for column, one in enumerate((query, *ranked)):
            if one is None:
                continue
            left, top = (column + _GAP / 2) * _CELL, line * row + above * _LINE
            high, wide = _fitted(one.image, _CELL * (1 - _GAP), _CELL * tallest)
            left += (_CELL * (1 - _GAP) - wide) / 2
            colour, sign = MARKS[one.mark] if one.mark else (_QUERY_FRAME, "")
            frame = colour if one is query or one.mark else None
            sheet.crops.append(_Crop(one.image, left, top, wide, high, frame, one.mark == "ignored"))
            words = ["query"] if one.distance is None else [f"{one.distance:.3f}"]
            if one.distance is not None and one.mark != "ignored":
                words.insert(0, str(next(ranks)))
            middle, told = left + wide / 2, f"{' · '.join(words)} {sign}".strip()
            sheet.texts.append(_Text(middle, top - 0.3 * _LINE, told, 8, "above", colour if sign else None))
            sheet.texts.append(_Text(middle, top + high + 0.4 * _LINE, _name_lines(one.name), 6, "below"))
    return sheet


def _drawn(sheet: _Sheet) -> StudyFigure:
    places: Mapping[str, Any] = {
        "heading": {},
        "above": {"ha": "center", "va": "bottom"},
        "below": {"ha": "center", "va": "top"},
    }
    with style():
        # One set of axes in inches: with one for each image, the layout alone took a second for fifty images.
        figure = StudyFigure(figsize=(sheet.width, sheet.height))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        for image, left, top, wide, high, frame, dashed in sheet.crops:
            axis.imshow(image, extent=(left, left + wide, top + high, top), interpolation="none", zorder=1)
            if frame:
                look: Any = {"edgecolor": frame, "linestyle": "--" if dashed else "-"}
                axis.add_patch(Rectangle((left, top), wide, high, fill=False, linewidth=2.5, zorder=2, **look))
        for x, y, words, size, place, colour in sheet.texts:
            axis.text(x, y, words, fontsize=size, color=colour, parse_math=False, **places[place])
        axis.set(xlim=(0, sheet.width), ylim=(sheet.height - sheet.head, -sheet.head))
        figure.suptitle(sheet.title, parse_math=False, y=1 - _MARGIN / figure.get_figheight(), va="top")
    return figure


def _painted(sheet: _Sheet, dpi: int) -> Image.Image:
    """The sheet without matplotlib, which spends a millisecond on every text."""
    picture = Image.new("RGB", (round(sheet.width * dpi), round(sheet.height * dpi)), "white")
    draw = ImageDraw.Draw(picture)
    anchors = {"heading": "ls", "above": "md", "below": "ma"}
    line = round(2.5 / 72 * dpi)
    for image, left, top, wide, high, frame, dashed in sheet.crops:
        x, y, right, bottom = (round(edge * dpi) for edge in (left, top, left + wide, top + high))
        y, bottom = (edge + round(sheet.head * dpi) for edge in (y, bottom))
        crop = Image.fromarray(np.ascontiguousarray(image)).resize((right - x, bottom - y), Image.Resampling.NEAREST)
        if frame:
            around = Image.new("RGB", crop.size, frame)
            inside = Image.new("1", crop.size)  # where the crop shows through the frame
            pen = ImageDraw.Draw(inside)
            pen.rectangle((line, line, crop.width - line - 1, crop.height - line - 1), fill=1)
            for start in range(2 * line, max(crop.size), 6 * line) if dashed else ():
                pen.rectangle((start, 0, start + 2 * line, crop.height), fill=1)
                pen.rectangle((0, start, crop.width, start + 2 * line), fill=1)
            around.paste(crop, mask=inside)
            crop = around
        picture.paste(crop, (x, y))
    for across, down, words, size, place, colour in sheet.texts:
        where = across * dpi, (down + sheet.head) * dpi
        draw.text(where, words, colour or _INK, _font(size * dpi / 72), anchors[place], spacing=1, align="center")
    middle = sheet.width / 2 * dpi, _MARGIN * dpi
    draw.text(middle, sheet.title, _INK, _font(10 * dpi / 72), "ma", spacing=3, align="center")
    return picture


@functools.cache
def _font(pixels: float) -> ImageFont.FreeTypeFont:
    """The figures' font, which comes with matplotlib."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", pixels)


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
