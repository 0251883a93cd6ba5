"""The study's figures: matplotlib figures made from records, features and crops. Only `save` touches files.

Labels and titles are those of params.yaml at the time of drawing; terms and settings are those of the records.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from danet_core import MODALITIES
from danet_study.analysis import DIFFERENT_CROSS, DIFFERENT_WITHIN, KINDS, SAME_CROSS, SAME_WITHIN, Distributions
from danet_study.config import Dataset, Study
from danet_study.files import StudyError, atomic_path
from danet_study.protocols import PROTOCOLS, Images
from danet_study.store import PackedStore

Record = Mapping[str, Any]

# Okabe and Ito's palette, distinct for all common kinds of color blindness; dashes distinguish lines in gray print.
PALETTE: Sequence[tuple[str, Any]] = (
    ("#4D4D4D", (0, ())),
    ("#0072B2", (0, (5, 1.5))),
    ("#E69F00", (0, (1.2, 1.2))),
    ("#009E73", (0, (6, 1.5, 1.2, 1.5))),
    ("#CC79A7", (0, (3, 3))),
    ("#D55E00", (0, (2, 1))),
    ("#56B4E9", (0, (4, 2, 1, 2, 1, 2))),
)
KIND_STYLE: Mapping[str, tuple[str, Any]] = {  # color: same or different identity; dash: across modalities
    SAME_WITHIN: ("#0072B2", (0, ())),
    SAME_CROSS: ("#0072B2", (0, (4, 1.5))),
    DIFFERENT_WITHIN: ("#D55E00", (0, ())),
    DIFFERENT_CROSS: ("#D55E00", (0, (4, 1.5))),
}
PALE = "#9A9A9A"
SYNTHETIC = "synthetic: rendered pedestrians, not comparable with the paper"

_STYLE: Any = {
    **matplotlib.style.library["seaborn-v0_8-whitegrid"],
    "font.family": "DejaVu Sans",  # part of matplotlib, hence the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": "#4D4D4D",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titley": 1.0,  # its default place; searching for it takes a quarter of a figure's time
    "figure.dpi": 100,
    "figure.titlesize": 10,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # editable text
    "savefig.dpi": 160,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
_METADATA: Mapping[str, dict[str, Any]] = {  # no time and no version: equal figures have equal bytes
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None},
}


# -------------------- look


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The study's look inside the block, independent of the user's matplotlib settings, which are restored."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # file names in other scripts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class StudyFigure(Figure):
    """A figure outside pyplot that a notebook displays as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        with style():
            self.savefig(stream, format="png", dpi=110)
        return stream.getvalue()


def variant_style(study: Study, variant: str) -> tuple[str, Any]:
    """Color and dash of a variant: its place among the rows of params.yaml, the same in every figure."""
    return PALETTE[list(study.rows).index(variant) % len(PALETTE)]


def save(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`, each whole or not at all; equal figures give equal bytes."""
    paths = [Path(f"{path_without_suffix}{suffix}") for suffix in _METADATA]
    for path in paths:
        with style(), atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata=_METADATA[path.suffix])
    return paths


def panels(
    count: int, *, columns: int, height: float, width: float = 3.6, sharey: bool = True
) -> tuple[Any, list[Axes]]:
    """A figure of `count` panels of these inches in rows of at most `columns`, and their axes."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = StudyFigure(figsize=(max(width * columns, 4.5), height * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for position, axis in enumerate(axes[:count]):
        axis.tick_params(labelbottom=position + columns >= count)  # also above an empty place of the grid
    return figure, axes[:count]


def label_axes(axes: Sequence[Axes], x: str, y: str) -> None:
    """Axis labels at the outer panels only."""
    lowest = {axis.get_subplotspec().colspan.start: axis for axis in axes}  # type: ignore[union-attr]
    for axis in axes:
        column = axis.get_subplotspec().colspan.start  # type: ignore[union-attr]
        axis.set_xlabel(x if axis is lowest[column] else "")
        axis.set_ylabel(y if column == 0 else "")


def finish(figure: Any, axes: Sequence[Axes], title: str) -> Any:
    """Add title and one legend for all panels, and widen the figure until both fit."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    parts: list[Any] = [figure.suptitle(title)]
    if handles:
        columns = 2 if len(handles) == 4 else min(len(handles), 3)
        parts.append(
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=3)
        )
    renderer = FigureCanvasAgg(figure).get_renderer()
    needed = max(part.get_window_extent(renderer).width for part in parts) / figure.dpi + 0.3
    figure.set_figwidth(max(figure.get_figwidth(), needed))
    return figure


def dataset_title(what: str, dataset: Dataset) -> str:
    """What is shown of which data set, and whether it is synthetic."""
    return f"{what}: {dataset.title}" + (f"\n{SYNTHETIC}" if dataset.synthetic else "")


def figure_title(what: str, records: Sequence[Record], study: Study) -> str:
    """`dataset_title` for records of one data set, with a line on deviations from the published protocol."""
    settings = [setting for record in records for setting in record.get("settings", {}).values()]
    marks = ["a part of the data set"] if any(record.get("partial") for record in records) else []
    for key in ("galleries", "metric"):  # stored in a setting only where it differs from the published protocol
        marks += sorted({f"{key} {setting[key]}" for setting in settings if key in setting})
    title = dataset_title(what, study.dataset(records[0]["dataset"]))
    return f"{title}\nnot the published protocol: {', '.join(marks)}" if marks else title


def by_variant(records: Sequence[Record], study: Study) -> dict[str, list[Record]]:
    """Records of each variant, in order of appearance. Raises StudyError if there is none."""
    if not records:
        raise StudyError("no record to draw: none of the listed runs has one; run `dvc repro` first")
    found: dict[str, list[Record]] = {}
    for record in records:
        study.run(f"{record['dataset']}-{record['trial']}", record["variant"], record["seed"])  # refuses unknown names
        found.setdefault(record["variant"], []).append(record)
    return found


# -------------------- figures of records


def training_curves(records: Sequence[Record], study: Study) -> StudyFigure:
    """Loss terms and learning rate over the epochs, one panel each, one line per run.

    records: training records of one data set (`runs/<run>/record.json`). A run without a term has no line in its panel.
    Raises StudyError if there is no record.
    """
    groups = by_variant(records, study)
    terms = dict.fromkeys(term for record in records for term in record["config"]["losses"])
    with style():
        shown = ["total", *terms, "lr"]
        figure, axes = panels(len(shown), columns=3, height=2.2, sharey=False)
        for axis, name in zip(axes, shown, strict=True):
            for variant, runs in groups.items():
                color, dash = variant_style(study, variant)
                for record in runs:
                    points = [(epoch["epoch"], epoch[name]) for epoch in record["history"] if name in epoch]
                    if points:
                        label = study.rows[variant].label
                        axis.plot(*zip(*points, strict=True), color=color, linestyle=dash, label=label)
            axis.set_title({"total": "total loss (Eq. 6)", "lr": "learning rate"}.get(name, name))
            if name == "lr":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        label_axes(axes, "epoch", "")
        return finish(figure, axes, figure_title("Training", records, study))


def cmc_curves(records: Sequence[Record], study: Study) -> StudyFigure:
    """Cumulative matching characteristic in percent, one panel per setting of the protocol, one line per variant.

    A line is the mean over a variant's runs (trials and seeds) and the band their range. The bar at rank 1 is the range
    over runs and galleries. Raises StudyError if there is no record.
    """
    groups = by_variant(records, study)
    titles = PROTOCOLS[records[0]["protocol"]].settings
    settings = [name for name in titles if name in records[0]["settings"]]
    with style():
        figure, axes = panels(len(settings), columns=2, height=2.5)
        ranges = False
        for axis, setting in zip(axes, settings, strict=True):
            for offset, (variant, runs) in enumerate(groups.items()):
                color, dash = variant_style(study, variant)
                found = [run["settings"][setting] for run in runs]
                curves = 100 * np.array([one["cmc"] for one in found])  # (runs, ranks)
                first = 100 * np.concatenate([one["per_trial"]["cmc1"] for one in found])
                ranks = np.arange(1, curves.shape[1] + 1)
                axis.plot(ranks, curves.mean(0), color=color, linestyle=dash, label=study.rows[variant].label)
                if len(curves) > 1:
                    axis.fill_between(ranks, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
                if first.min() < first.max():
                    axis.vlines(1 - 0.12 * offset, first.min(), first.max(), color=color)
                    ranges = True
            one = records[0]["settings"][setting]
            chance = 100 * np.mean([record["settings"][setting]["chance_rank1"] for record in records])
            axis.axhline(chance, color=PALE, linewidth=0.8, linestyle=(0, (1, 2)), label="Rank-1 by chance")
            axis.set_title(f"{titles[setting]}\n{one['n_valid']} queries, gallery {one['gallery_size']}")
            axis.set(xlim=(0.5, len(one["cmc"])), xticks=[1, *range(5, len(one["cmc"]) + 1, 5)], ylim=(0, 100))
        if ranges:
            axes[0].plot([], [], "|", color=PALE, markersize=9, label="Rank-1: range over runs and galleries")
        level = "identities" if one["cmc_level"] == "identity" else "images"
        label_axes(axes, f"rank k, {level}", "matched within k, %")
        return finish(figure, axes, figure_title("CMC", records, study))


def camera_pairs(records: Sequence[Record], study: Study) -> StudyFigure:
    """mAP in percent between each infrared camera (queries) and each visible one (gallery), one panel per variant.

    Means over a variant's runs, one color scale. The protocol ignores the framed pair.
    Raises StudyError if no record has camera pairs: RegDB has one pair only.
    """
    import seaborn as sns  # here: importing it takes seconds, and only this figure needs it

    found = [record for record in records if record.get("camera_pairs")]
    groups = by_variant(found, study)
    tables = {
        variant: pd.DataFrame([pair for run in runs for pair in run["camera_pairs"]])
        .pivot_table(index="query_camera", columns="gallery_camera", values="mAP", dropna=False)
        .mul(100)
        for variant, runs in groups.items()
    }
    highest = max(float(np.nanmax(table)) for table in tables.values())
    with style():
        figure, axes = panels(len(tables), columns=2, height=1.5)
        for axis, (variant, table) in zip(axes, tables.items(), strict=True):
            sns.heatmap(table, ax=axis, vmin=0, vmax=highest, cmap="Blues", annot=True, fmt=".1f", cbar=False)
            axis.set_title(study.rows[variant].label)
            axis.tick_params(rotation=0)
            axis.grid(False)
            query, gallery = (Images.of(np.zeros((len(one), 1)), one, one) for one in (table.index, table.columns))
            for row, column in np.argwhere(PROTOCOLS[found[0]["protocol"]].ignore(query, gallery)):
                frame: Any = {"fill": False, "linestyle": "--", "linewidth": 1.6, "edgecolor": "#D55E00"}
                place = column + 0.04, row + 0.04
                axis.add_patch(Rectangle(place, 0.92, 0.92, label="ignored by the protocol", **frame))
        label_axes(axes, "camera of the visible gallery", "infrared queries")
        figure.colorbar(axes[0].collections[0], ax=axes, label="mAP, %", fraction=0.05)
        return finish(figure, axes, figure_title("Camera pairs", found, study))


PROBED: Mapping[str, tuple[str, str]] = {
    "pretrained": ("before training: pretrained backbone", "D"),
    "before_bn": ("trained, before the BN neck", "s"),
    "after_bn": ("trained, after the BN neck", "o"),
}


def modality_probe(records: Sequence[Record], study: Study) -> StudyFigure:
    """Balanced accuracy in percent of a linear probe for the modality, before and after training, one row per variant.

    Means over a variant's runs. At 50 the feature does not reveal the modality. The filled mark is the feature used for
    retrieval. Raises StudyError if there is no record.
    """
    groups = by_variant(records, study)
    with style():
        figure, (axis,) = panels(1, columns=1, height=0.42 * len(groups) + 1.0, width=5.5)
        for row, (variant, runs) in enumerate(groups.items()):
            color, _ = variant_style(study, variant)
            used = runs[0]["config"]["model"].get("test_feature", "after_bn")
            means = {name: 100 * float(np.mean([run["probe"][name] for run in runs])) for name in PROBED}
            axis.plot([means["pretrained"], means[used]], [row, row], color="#C8C8C8", linewidth=1, zorder=1)
            for name, (words, marker) in PROBED.items():
                fill, label = color if name == used else "white", words if row == 0 else None
                axis.plot(means[name], row, marker, markerfacecolor=fill, markeredgecolor=color, label=label)
            place: Any = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axis.annotate(f"{means[used]:.1f}", (means[used], row), **place)
        axis.axvline(50, color=PALE, linewidth=0.8, linestyle=(0, (1, 2)), label="modality not recognizable")
        axis.set(xlim=(48, 102), ylim=(len(groups) - 0.5, -0.6), xlabel="balanced accuracy of a linear probe, %")
        axis.set_yticks(range(len(groups)), [study.rows[variant].label for variant in groups])
        axis.grid(False, axis="y")
        return finish(figure, [axis], figure_title("Modality probe accuracy", records, study))


def distance_distributions(
    distributions: Mapping[str, Distributions], title: str, gaps: Mapping[str, Mapping[str, float]] | None = None
) -> StudyFigure:
    """The paper's Figure 1, measured: four distance distributions per variant, one panel each, common limits.

    distributions: by variant label, all with the same bins. Ticks at the lower edge are means. gaps: by label, shares
    from `analysis.modality_gap`. Raises StudyError if there is none; ValueError if bins differ.
    """
    if not distributions:
        raise StudyError("no features to draw: none of the chosen runs has any; run `dvc repro` first")
    edges = next(iter(distributions.values())).edges
    if any(not np.array_equal(edges, one.edges) for one in distributions.values()):
        raise ValueError("the distributions have different bins")
    kinds = [kind for one in distributions.values() for kind in one.kinds.values()]
    last = max(int(np.flatnonzero(kind.counts).max(initial=0)) for kind in kinds)
    top = 1.05 * max(kind.density(edges).max() for kind in kinds)
    with style():
        figure, axes = panels(len(distributions), columns=2, height=2.6, width=4.0)
        for axis, (label, one) in zip(axes, distributions.items(), strict=True):
            for kind, words in KINDS.items():
                color, dash = KIND_STYLE[kind]
                density, mean = one.kinds[kind].density(edges), one.kinds[kind].mean
                axis.plot((edges[:-1] + edges[1:]) / 2, density, color=color, linestyle=dash, label=words)
                axis.plot([mean, mean], [0, 0.05 * top], color=color, linestyle=dash, linewidth=2.4)
            separation = one.separation(SAME_CROSS, DIFFERENT_CROSS)
            lines = [textwrap.fill(label, 48), f"across modalities: d′ {_number(separation.d_prime)}"]
            lines[-1] += f", overlap {_number(separation.overlap)}"
            if gaps:
                shares = " / ".join(f"{100 * gaps[label][name]:.0f}" for name in ("nearest", "median", "mean"))
                lines.append(f"modality gap > nearest / median / mean identity: {shares} %")
            axis.set_title("\n".join(lines), fontsize=8)
            axis.set(xlim=(0, edges[min(last + 2, len(edges) - 1)]), ylim=(0, top))
        label_axes(axes, f"{one.metric} distance", "density")
        return finish(figure, axes, title)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


# -------------------- figures of crops


Mark = Literal["query", "right", "wrong", "ignored", ""]
MARKS: Mapping[str, tuple[str, str]] = {  # color of the frame, sign for gray print
    "query": ("#0072B2", ""),
    "right": ("#009E73", "✓"),
    "wrong": ("#D55E00", "✗"),
    "ignored": (PALE, "ignored"),
}
_COLUMN, _LINE = 0.95, 0.125  # inches: width of a crop, height of a line of text


class Tile(NamedTuple):
    """A crop with its caption; `mark` says what it is in a ranked list."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str = ""
    mark: Mark = ""

    def text(self) -> str:
        first, *rest = self.caption.split("\n")
        return "\n".join([f"{first} {MARKS[self.mark][1] if self.mark else ''}".strip(), *rest])


TileRow = tuple[str, Sequence[Tile | None]]


def image_grid(rows: Sequence[TileRow], title: str) -> StudyFigure:
    """Crops of one size in rows, each row under its heading, captions above the crops; None leaves a place empty.

    Raises StudyError if there is no crop.
    """
    tiles = [tile for _, row in rows for tile in row if tile]
    if not tiles:
        raise StudyError("no image to draw: the list is empty; choose others")
    height, width, _ = tiles[0].image.shape
    gap = max(2, width // 12)
    line = _LINE / _COLUMN * width  # pixels
    columns = max(len(row) for _, row in rows)
    lines = [(heading != "") + max(len(tile.text().splitlines()) for tile in row if tile) for heading, row in rows]
    tops = np.cumsum([0] + [round(line * count) + 2 * gap + height for count in lines])
    sheet = np.full((tops[-1], columns * (width + gap), 3), 255, np.uint8)
    with style():
        scale = _COLUMN / width
        title_lines = title.count("\n") + 1
        size = (max(scale * sheet.shape[1], 3.0), scale * sheet.shape[0] + 0.17 * title_lines + 0.1)
        figure = StudyFigure(figsize=size)
        axis = figure.add_axes((0, 0, 1, scale * sheet.shape[0] / size[1]))
        for (heading, row), count, top in zip(rows, lines, tops[:-1], strict=True):
            first = top + round(line * count) + gap
            axis.text(gap / 2, top + line, heading, fontsize=8, va="baseline", parse_math=False)
            for column, tile in enumerate(row):
                if tile is None:
                    continue
                left, image, color = gap // 2 + column * (width + gap), tile.image.copy(), "#262626"
                if tile.mark:
                    color, edge = MARKS[tile.mark][0], max(2, width // 20)
                    frame = np.ones(image.shape[:2], bool)
                    frame[edge:-edge, edge:-edge] = False
                    image[frame] = np.multiply(matplotlib.colors.to_rgb(color), 255).astype(np.uint8)
                sheet[first : first + height, left : left + width] = image
                place: Any = {"fontsize": 6.5, "ha": "center", "va": "bottom", "parse_math": False}
                axis.text(left + width / 2, first - gap / 2, tile.text(), color=color, **place)
        axis.imshow(sheet, interpolation="nearest", aspect="equal")
        axis.set_axis_off()
        axis.set_anchor("W")
        figure.suptitle(title, parse_math=False, y=1 - 0.05 / size[1], va="top")
        renderer = FigureCanvasAgg(figure).get_renderer()
        needed = figure.texts[0].get_window_extent(renderer).width / figure.dpi + 0.3
        figure.set_figwidth(max(size[0], needed))
    return figure


def ranked_rows(heading: str, query: Tile, ranked: Sequence[Tile], columns: int = 10) -> list[TileRow]:
    """A query and the images ranked for it, nearest first, `columns` to a row."""
    parts = [ranked[start : start + columns] for start in range(0, len(ranked), columns)] or [[]]
    return [(heading if i == 0 else "", [query if i == 0 else None, *part]) for i, part in enumerate(parts)]


def best_and_worst(rankings: Mapping[str, Any], store: PackedStore) -> list[TileRow]:
    """Rows of crops for the best and the worst queries of `runs/<run>/rankings.json`.

    store: the packed images that the rankings' rows refer to.
    """

    def tile(row: int, caption: str, mark: Mark) -> Tile:
        image = np.asarray(store.images[row]).transpose(1, 2, 0)
        return Tile(image, f"{caption}\nid {store.pids[row]}, cam {store.camids[row]}", mark)

    rows: list[TileRow] = []
    for end in ("best", "worst"):
        for number, one in enumerate(rankings[end], 1):
            found = zip(*(one["ranked"][key] for key in ("rows", "distances", "right")), strict=True)
            heading = f"{end} {number}: AP {100 * one['ap']:.1f} %, right images in the gallery: {one['n_right']}"
            tiles = [
                tile(row, f"{rank} · {distance:.3f}", "right" if right else "wrong")
                for rank, (row, distance, right) in enumerate(found, 1)
            ]
            rows += ranked_rows(heading, tile(one["row"], "query", "query"), tiles)
    return rows


def contact_sheet(store: PackedStore, pids: Sequence[int], per_camera: int, dataset: Dataset) -> StudyFigure:
    """One row per identity, `per_camera` crops of each camera, visible cameras first; a gray place has no image."""
    manifest = store.manifest
    cameras = sorted(zip(store.modalities.tolist(), store.camids.tolist(), strict=True))
    blank = np.full((*store.images.shape[2:], 3), 225, np.uint8)
    rows: list[TileRow] = []
    for pid in pids:
        tiles: list[Tile | None] = []
        for modality, camera in dict.fromkeys(cameras):
            found = spread(manifest.index[(manifest.pid == pid) & (manifest.camid == camera)], per_camera)
            images = [store.images[row].transpose(1, 2, 0) for row in found] + [blank] * (per_camera - len(found))
            tiles += [Tile(image, f"{MODALITIES[modality]}\ncamera {camera}" if not rows else "") for image in images]
        rows.append((f"identity {pid}", tiles))
    return image_grid(rows, dataset_title("Identities and cameras", dataset))


def spread(values: Any, count: int) -> list[int]:
    """At most `count` of the distinct values, evenly spaced in ascending order, the first included."""
    ordered = sorted({int(value) for value in values})
    return [ordered[k * len(ordered) // count] for k in range(count)] if len(ordered) > count else ordered


def unnormalize(
    images: Float[np.ndarray, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Normalized images as pictures. mean, std: of RGB in [0, 1]."""
    pixels = 255 * (images.transpose(0, 2, 3, 1) * np.array(std) + np.array(mean))
    return pixels.round().clip(0, 255).astype(np.uint8)
