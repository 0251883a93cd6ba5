"""The look of every figure: one palette, one type, a colour per variant that never changes, the same bytes each time.

`save` writes figures; nothing else here or in plots.py and crops.py touches a file.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from danet_core.distances import DIFFERENT_CROSS, DIFFERENT_WITHIN, SAME_CROSS, SAME_WITHIN
from danet_core.files import StudyError, atomic_path

# Okabe and Ito's palette, which stays apart for all common kinds of colour blindness; in grey print the dash tells.
VARIANT_STYLE: Mapping[str, tuple[str, Any]] = {
    "baseline": ("#4D4D4D", (0, ())),
    "b_cc": ("#0072B2", (0, (5, 1.5))),
    "b_ml": ("#E69F00", (0, (1.2, 1.2))),
    "b_ml_cc": ("#009E73", (0, (6, 1.5, 1.2, 1.5))),
    "baseline_2x": ("#CC79A7", (0, (3, 3))),
}
_SPARE_STYLE = (("#D55E00", (0, (2, 1))), ("#56B4E9", (0, (4, 2, 1, 2, 1, 2))), ("#000000", (0, (8, 2))))

# Colour tells the identity, the dash the modality.
KIND_STYLE: Mapping[str, tuple[str, Any]] = {
    SAME_WITHIN: ("#0072B2", (0, ())),
    SAME_CROSS: ("#0072B2", (0, (4, 1.5))),
    DIFFERENT_WITHIN: ("#D55E00", (0, ())),
    DIFFERENT_CROSS: ("#D55E00", (0, (4, 1.5))),
}

# What a writer would stamp in by itself: the time, and the version of the library.
_STAMPS: Mapping[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
}

# seaborn's "whitegrid", written out: importing seaborn takes longer than all else a notebook imports but torch.
_WHITE_GRID: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": ".8",
    "axes.grid": True,
    "axes.labelcolor": ".15",
    "grid.color": ".8",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "text.color": ".15",
    "xtick.bottom": False,
    "xtick.color": ".15",
    "ytick.color": ".15",
    "ytick.left": False,
}

_STYLE: Any = {
    **_WHITE_GRID,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titley": 1.0,  # where it comes to stand anyway; to look for it took a quarter of a figure's time
    "axes.labelsize": 9,
    "axes.edgecolor": "#4D4D4D",
    "axes.linewidth": 0.8,
    "figure.titlesize": 10,
    "figure.dpi": 100,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text when the PDF is edited
    "savefig.dpi": 160,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The study's look, whatever the user's matplotlib settings are; they come back when the block ends."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A file name in a script that the font lacks is drawn as boxes; the tables beside the picture spell it out.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class StudyFigure(Figure):
    """A figure that pyplot does not hold on to, and that a notebook shows when it is the last line of a cell."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        with style():
            self.savefig(stream, format="png", dpi=110)
        return stream.getvalue()


def variant_style(variant: str, variants: Sequence[str]) -> tuple[str, Any]:
    """Colour and dash of a variant. A name that has none of its own gets a spare one by its place among such names."""
    if variant in VARIANT_STYLE:
        return VARIANT_STYLE[variant]
    others = list(dict.fromkeys(name for name in variants if name not in VARIANT_STYLE))
    return _SPARE_STYLE[others.index(variant) % len(_SPARE_STYLE)]


def panels(
    count: int,
    *,
    columns: int,
    height: float,
    sharey: bool,
    width: float = 5.0,
    onto: StudyFigure | None = None,
) -> tuple[StudyFigure, list[Axes]]:
    """A figure of `count` panels, a single one `width` inches wide.

    onto: an earlier one of as many panels, which is emptied instead of made again.
    """
    if onto is not None:
        axes = [axis for axis in onto.axes if axis.get_visible()]
        for axis in axes:
            for drawn in (*axis.lines, *axis.collections, *axis.patches, *axis.texts):
                drawn.remove()
        return onto, axes
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = StudyFigure(figsize=(3.6 * columns if columns > 1 else width, height * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for position, axis in enumerate(axes[:count]):
        # Shared axes hide inner tick labels; a panel with nothing below it needs its own.
        axis.tick_params(labelbottom=position + columns >= count)
    return figure, axes[:count]


def finish(figure: Figure, axes: Sequence[Axes], title: str, synthetic: bool) -> None:
    handles: dict[str, Any] = {}
    bottom = {_column(axis): axis for axis in axes}  # the last panel of each column
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        if axis is not bottom[_column(axis)]:
            axis.set_xlabel("")
        axis.spines[["top", "right"]].set_visible(False)
    if figure.texts:  # drawn onto an earlier figure: its title stays where it was put
        figure.texts[0].set_text(titled(title, synthetic))
    else:
        figure.suptitle(titled(title, synthetic))
    if [[text.get_text() for text in legend.get_texts()] for legend in figure.legends] == [list(handles)]:
        return
    for legend in figure.legends:
        legend.remove()
    columns = 2 if len(handles) == 4 else min(len(handles), 3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=3)


def titled(title: str, synthetic: bool) -> str:
    """A figure's title, with the line that every figure of a rendered data set carries."""
    return f"{title}\nsynthetic: rendered pedestrians, not comparable with the paper" if synthetic else title


def _column(axis: Axes) -> int:
    spec = axis.get_subplotspec()
    return 0 if spec is None else spec.colspan.start


def label_left(axis: Axes, text: str) -> None:
    """Name the shared vertical axis once per row of panels."""
    axis.set_ylabel(text if _column(axis) == 0 else "")


def need(found: Sequence[Any] | Mapping[str, Any], what: str) -> None:
    if not found:
        raise StudyError(f"there is no {what} to draw: none of the listed runs has one; run `dvc repro` first")


def save(figure: Figure, path_without_suffix: Path | str) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`, each whole or not at all; equal figures give equal bytes."""
    stem = Path(path_without_suffix)
    return [save_as(figure, stem.with_name(stem.name + suffix)) for suffix in _STAMPS]


def save_as(figure: Figure, path: Path | str) -> Path:
    """Write one file, whole or not at all; its ending says the format. Raises as `check_picture`."""
    path = Path(path)
    suffix = check_picture(path)
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata=_STAMPS[suffix])
    return path


def check_picture(path: Path) -> str:
    """The ending of a picture's name, in lower case. Raises StudyError for another one than .png and .pdf."""
    suffix = path.suffix.lower()
    if suffix not in _STAMPS:
        raise StudyError(f"picture {path}: expected a name that ends in .png or .pdf; name another file")
    return suffix
