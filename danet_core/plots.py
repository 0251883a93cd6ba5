"""The study's figures in one style: a colour per variant that never changes, common limits, the same bytes each time.

Every function returns a matplotlib figure and writes nothing; `save` writes one. Nothing here reads a file.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from danet_core.distances import DIFFERENT_CROSS, DIFFERENT_WITHIN, KINDS, SAME_CROSS, SAME_WITHIN, Distributions
from danet_core.files import StudyError, atomic_path

Record = Mapping[str, Any]

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

TERM_LABELS: Mapping[str, str] = {
    "total": "total loss (Eq. 6)",
    "L_id": "L_id, identity",
    "L_cc": "L_cc, cross-modality centre (Eq. 3)",
    "L_sid": "L_sid, modality-specific identity (Eq. 4)",
    "L_M": "L_M, mutual learning (Eq. 5)",
    "lr": "learning rate",
}

# What a writer would stamp in by itself: the time, and the version of the library.
_STAMPS: Mapping[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
}

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
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
        matplotlib.rcParams.update(sns.axes_style("whitegrid"))
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


def training_curves(records: Sequence[Record], *, title: str, synthetic: bool) -> StudyFigure:
    """Loss terms and learning rate over the epochs, one panel each, one line per run.

    records: training records (`runs/<dataset>/<run>/record.json`) of the data set with this `title`. A term that no
    run has gets no panel, and a run without a term no line in its panel. Runs of one variant share colour and dash, and
    are named once.
    Raises StudyError when there is no record.
    """
    _need(records, "training record")
    columns = [
        term for term in TERM_LABELS if any(epoch.get(term) is not None for r in records for epoch in r["history"])
    ]
    variants = [record["variant"] for record in records]
    with style():
        figure, axes = _panels(len(columns), columns=3, height=2.3, sharey=False)
        for axis, term in zip(axes, columns, strict=True):
            for record in records:
                points = [(epoch["epoch"], epoch[term]) for epoch in record["history"] if epoch.get(term) is not None]
                if points:
                    colour, dash = variant_style(record["variant"], variants)
                    axis.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=record["label"])
            axis.set_title(TERM_LABELS[term])
            axis.set_xlabel("epoch")
            if term == "lr":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        _finish(figure, axes, f"Training on {title}", synthetic)
    return figure


def cmc_curves(
    records: Sequence[Record],
    settings: Mapping[str, str],
    *,
    ranks: int = 20,
) -> StudyFigure:
    """Cumulative matching characteristic, one panel per setting, one line per variant.

    records: evaluation records (`results/<dataset>/metrics/<run>.json`); settings: keys of the record, with words for
    the panel's title. The line is the mean over a variant's runs (trials and seeds), the band their range where there
    are several. All panels have the same limits. Percent.
    Raises StudyError when there is no record.
    """
    _need(records, "evaluation record")
    labels = {record["variant"]: record["label"] for record in records}
    with style():
        figure, axes = _panels(len(settings), columns=2, height=2.6, sharey=True)
        for axis, (setting, words) in zip(axes, settings.items(), strict=True):
            for variant, label in labels.items():
                runs = [
                    record["settings"][setting]["cmc"][:ranks] for record in records if record["variant"] == variant
                ]
                curves = 100 * np.array(runs)  # (runs, ranks)
                colour, dash = variant_style(variant, list(labels))
                rank = np.arange(1, curves.shape[1] + 1)
                axis.plot(rank, curves.mean(axis=0), color=colour, linestyle=dash, label=label)
                if len(curves) > 1:
                    low, high = curves.min(axis=0), curves.max(axis=0)
                    axis.fill_between(rank, low, high, color=colour, alpha=0.15, linewidth=0)
            found = records[0]["settings"][setting]
            chance = 100 * sum(r["settings"][setting]["chance_rank1"] for r in records) / len(records)
            axis.axhline(chance, color="#9A9A9A", linewidth=0.8, linestyle=(0, (1, 2)), label="Rank-1 by chance")
            axis.set_title(f"{words} ({found['n_valid']} queries, gallery {found['gallery_size']})")
            axis.set_xlabel("rank k, " + ("identities" if found["cmc_level"] == "identity" else "images"))
            _label_left(axis, "matched within k, %")
            axis.set_xlim(1, ranks)
            axis.set_xticks(sorted({1, *range(5, ranks + 1, 5)}))
            axis.set_ylim(0, 100)
        _finish(figure, axes, f"CMC on {records[0]['title']}", records[0]["synthetic"])
    return figure


def distance_distributions(
    distributions: Mapping[str, Distributions],
    *,
    title: str,
    synthetic: bool,
    shares: Mapping[str, float] | None = None,
) -> StudyFigure:
    """Figure 1, reproduced: the four distance distributions of each variant, one panel per variant, common limits.

    distributions: by the panel's name (a variant's label), all over the same bins (`distances.distance_distributions`).
    Ticks at the lower edge are the means. In words: how well same and different identities come apart across modalities
    (d', overlap), and by how much the same identity's other modality is farther than other identities in the same one
    (d'; positive as Figure 1 has it). shares: fraction of identities for which Figure 1's claim holds
    (`distances.centre_claim`), by the same name.
    Raises StudyError when there is nothing to draw, or the bins differ.
    """
    _need(distributions, "set of test features")
    edges = next(iter(distributions.values())).edges
    if any(not np.array_equal(edges, one.edges) for one in distributions.values()):
        raise StudyError("the distance distributions have different bins; make all of them with one `upper` and `bins`")
    middles = (edges[:-1] + edges[1:]) / 2
    used = max(
        int(np.flatnonzero(kind.counts).max(initial=0)) for one in distributions.values() for kind in one.kinds.values()
    )
    top = 1.12 * max(kind.density(edges).max() for one in distributions.values() for kind in one.kinds.values())
    with style():
        figure, axes = _panels(len(distributions), columns=2, height=2.6, sharey=True)
        for axis, (name, one) in zip(axes, distributions.items(), strict=True):
            for kind, words in KINDS.items():
                colour, dash = KIND_STYLE[kind]
                density = one.kinds[kind].density(edges)
                axis.plot(middles, density, color=colour, linestyle=dash, label=words)
                axis.fill_between(middles, density, color=colour, alpha=0.06, linewidth=0)
                mean = one.kinds[kind].mean
                if math.isfinite(mean):
                    axis.plot([mean, mean], [0, 0.06 * top], color=colour, linestyle=dash, linewidth=2.2)
            retrieval = one.separation(SAME_CROSS, DIFFERENT_CROSS)
            claim = one.separation(DIFFERENT_WITHIN, SAME_CROSS)
            lines = [
                f"cross-modality: d′ {_number(retrieval.d_prime)}, overlap {_number(retrieval.overlap)}",
                f"other modality against other identity: d′ {_number(claim.d_prime)}",
            ]
            if shares is not None and name in shares:
                lines.append(f"Figure 1's claim holds for {100 * shares[name]:.1f} % of identities")
            text = axis.text(0.02, 0.97, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=7.5)
            text.set_in_layout(False)  # a long line must not shrink the panels
            axis.set_title(name)
            axis.set_xlabel(f"{one.metric} distance")
            _label_left(axis, "density")
            axis.set_xlim(0, edges[min(used + 2, len(edges) - 1)])
            axis.set_ylim(0, 1.35 * top)  # room for the text
        _finish(figure, axes, f"Distances (the paper's Figure 1) on {title}", synthetic)
    return figure


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
    _need(ranked, "ranked image")
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


def _panels(count: int, *, columns: int, height: float, sharey: bool) -> tuple[StudyFigure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = StudyFigure(figsize=(3.6 * columns if columns > 1 else 5.0, height * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for position, axis in enumerate(axes[:count]):
        # Shared axes hide inner tick labels; a panel with nothing below it needs its own.
        axis.tick_params(labelbottom=position + columns >= count)
    return figure, axes[:count]


def _finish(figure: Figure, axes: Sequence[Axes], title: str, synthetic: bool) -> None:
    handles: dict[str, Any] = {}
    bottom = {_column(axis): axis for axis in axes}  # the last panel of each column
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        if axis is not bottom[_column(axis)]:
            axis.set_xlabel("")
        sns.despine(ax=axis)
    figure.suptitle(f"{title}\nsynthetic: rendered pedestrians, not comparable with the paper" if synthetic else title)
    columns = 2 if len(handles) == 4 else min(len(handles), 3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=3)


def _column(axis: Axes) -> int:
    spec = axis.get_subplotspec()
    return 0 if spec is None else spec.colspan.start


def _label_left(axis: Axes, text: str) -> None:
    """Name the shared vertical axis once per row of panels."""
    axis.set_ylabel(text if _column(axis) == 0 else "")


def _name_lines(name: str, width: int = 18, most: int = 3) -> str:
    """The end of a path in at most `most` lines of `width` characters, broken after slashes where that fits."""
    lines = [""]
    for piece in re.findall(rf"[^/]{{1,{width - 1}}}/?|/", name):
        if len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines if len(lines) <= most else ["…" + lines[-most], *lines[1 - most :]])


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _need(found: Sequence[Any] | Mapping[str, Any], what: str) -> None:
    if not found:
        raise StudyError(f"there is no {what} to draw: none of the listed runs has one; run `dvc repro` first")
