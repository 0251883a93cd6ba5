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
KIND_STYLE: Mapping[str, Any] = {  # color: same or different identity; dash: across modalities
    SAME_WITHIN: {"color": "#0072B2", "linestyle": "-"},
    SAME_CROSS: {"color": "#0072B2", "linestyle": "--"},
    DIFFERENT_WITHIN: {"color": "#D55E00", "linestyle": "-"},
    DIFFERENT_CROSS: {"color": "#D55E00", "linestyle": "--"},
}
PALE = "#9A9A9A"
SYNTHETIC = "synthetic: rendered pedestrians, not comparable with the paper"

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # part of matplotlib, hence the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": "#4D4D4D",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titley": 1.0,  # its default place; searching for it takes a quarter of a figure's time
    "figure.labelsize": 9,
    "figure.titlesize": 10,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.handlelength": 3,
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
    with matplotlib.style.context(["seaborn-v0_8-whitegrid", _STYLE], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # file names in other scripts
        yield


class StudyFigure(Figure):
    """A figure outside pyplot that a notebook displays as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        with style():
            self.set_dpi(90)
            FigureCanvasAgg(self).print_png(stream, pil_kwargs={"compress_level": 1})  # `savefig` draws twice
        return stream.getvalue()


def variant_style(study: Study, variant: str) -> dict[str, Any]:
    """Label, color and dash of a variant, the same in every figure: its place among the rows of params.yaml."""
    color, dash = PALETTE[list(study.rows).index(variant) % len(PALETTE)]
    return {"label": study.rows[variant].label, "color": color, "linestyle": dash}


def save(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`, each whole or not at all; equal figures give equal bytes."""
    paths = [Path(f"{path_without_suffix}{suffix}") for suffix in _METADATA]
    for path in paths:
        with style(), atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata=_METADATA[path.suffix])
    return paths


def panels(count: int, *, columns: int, height: float, width: float = 3.6) -> tuple[StudyFigure, list[Axes]]:
    """A figure of `count` panels of these inches in rows of at most `columns`, and their axes."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = StudyFigure(figsize=(max(width * columns, 4.5), height * rows + 0.9), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def finish(figure: StudyFigure, title: str, x: str = "", y: str = "") -> StudyFigure:
    """Add title, axis labels and one legend for all panels, and widen the figure until they fit."""
    heading = figure.suptitle(title)
    found = [axis.get_legend_handles_labels() for axis in figure.axes]
    handles = {label: handle for panel in found for handle, label in zip(*panel, strict=True)}
    columns = 2 if len(handles) == 4 else 3
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    for axis in figure.axes:
        axis.set_xlabel(x)  # of each panel: `supxlabel` overlaps a legend below the panels
    figure.supylabel(y)
    return widen(figure, heading, legend)


def widen(figure: StudyFigure, *parts: Any) -> StudyFigure:
    """Make the figure as wide as its title or legend."""
    needed = max(part.get_window_extent().width for part in parts) / figure.dpi + 0.3
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


def by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each variant, in order of appearance. Raises StudyError if there is none."""
    if not records:
        raise StudyError("no record to draw: none of the listed runs has one; run `dvc repro` first")
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["variant"], []).append(record)
    return found


# -------------------- figures of records


def training_curves(records: Sequence[Record], study: Study) -> StudyFigure:
    """Loss terms and learning rate over the epochs, one panel each, one line per run.

    records: training records of one data set (`runs/<run>/record.json`). A run without a term has no line in its panel.
    Raises StudyError if there is no record.
    """
    runs = [run for group in by_variant(records).values() for run in group]
    names = ["total", *dict.fromkeys(term for run in records for term in run["config"]["losses"]), "lr"]
    with style():
        figure, axes = panels(len(names), columns=3, height=2.2)
        for axis, name in zip(axes, names, strict=True):
            for run in runs:
                points = {epoch["epoch"]: epoch[name] for epoch in run["history"] if name in epoch}
                if points:
                    axis.plot(list(points), list(points.values()), **variant_style(study, run["variant"]))
            axis.set_title({"total": "total loss (Eq. 6)", "lr": "learning rate"}.get(name, name))
            if name == "lr":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        return finish(figure, figure_title("Training", records, study), "epoch")


def cmc_curves(records: Sequence[Record], study: Study) -> StudyFigure:
    """Cumulative matching characteristic in percent, one panel per setting of the protocol, one line per variant.

    A line is the mean over a variant's runs (trials and seeds) and the band their range. The bar at rank 1 is the range
    over runs and galleries. Raises StudyError if there is no record.
    """
    groups = by_variant(records)
    titles, first = PROTOCOLS[records[0]["protocol"]].settings, records[0]["settings"]
    settings = [name for name in titles if name in first]
    with style():
        figure, axes = panels(len(settings), columns=2, height=2.5)
        for axis, setting in zip(axes, settings, strict=True):
            for offset, (variant, runs) in enumerate(groups.items()):
                look = variant_style(study, variant)
                curves = 100 * np.array([run["settings"][setting]["cmc"] for run in runs])  # (runs, ranks)
                rank1 = 100 * np.concatenate([run["settings"][setting]["per_trial"]["cmc1"] for run in runs])
                ranks = np.arange(1, curves.shape[1] + 1)
                axis.plot(ranks, curves.mean(0), **look)
                axis.fill_between(ranks, curves.min(0), curves.max(0), color=look["color"], alpha=0.15, linewidth=0)
                axis.vlines(1 - 0.12 * offset, rank1.min(), rank1.max(), color=look["color"])
            chance = 100 * np.mean([record["settings"][setting]["chance_rank1"] for record in records])
            axis.axhline(chance, color=PALE, linewidth=0.8, linestyle=":", label="Rank-1 by chance")
            one = first[setting]
            axis.set_title(f"{titles[setting]}\n{one['n_valid']} queries, gallery {one['gallery_size']}")
            axis.set(xlim=(0.5, len(one["cmc"])), xticks=[1, *range(5, len(one["cmc"]) + 1, 5)], ylim=(0, 100))
        axes[0].plot([], [], "|", color=PALE, markersize=9, label="Rank-1: range over runs and galleries")
        level = "identities" if one["cmc_level"] == "identity" else "images"
        return finish(figure, figure_title("CMC", records, study), f"rank k, {level}", "matched within k, %")


def camera_pairs(records: Sequence[Record], study: Study) -> StudyFigure:
    """mAP in percent between each infrared camera (queries) and each visible one (gallery), one panel per variant.

    Means over a variant's runs, one color scale. The protocol ignores the framed pair.
    Raises StudyError if no record has camera pairs: RegDB has one pair only.
    """
    import seaborn as sns  # here: importing it takes seconds, and only this figure needs it

    found = [record for record in records if record.get("camera_pairs")]
    tables = {
        variant: pd.DataFrame([pair for run in runs for pair in run["camera_pairs"]])
        .pivot_table(index="query_camera", columns="gallery_camera", values="mAP", dropna=False)
        .mul(100)
        for variant, runs in by_variant(found).items()
    }
    scale: Any = {"vmin": 0, "vmax": max(float(np.nanmax(table)) for table in tables.values()), "cmap": "Blues"}
    frame: Any = {"fill": False, "linestyle": "--", "linewidth": 1.6, "edgecolor": "#D55E00"}
    with style():
        figure, axes = panels(len(tables), columns=2, height=1.5)
        for axis, (variant, table) in zip(axes, tables.items(), strict=True):
            sns.heatmap(table, ax=axis, annot=True, fmt=".1f", cbar=False, **scale)
            axis.set(title=study.rows[variant].label, xlabel="", ylabel="")
            axis.tick_params(rotation=0)
            query, gallery = (Images.of(np.zeros((len(one), 1)), one, one) for one in (table.index, table.columns))
            for row, column in np.argwhere(PROTOCOLS[found[0]["protocol"]].ignore(query, gallery)):
                place = column + 0.04, row + 0.04
                axis.add_patch(Rectangle(place, 0.92, 0.92, label="ignored by the protocol", **frame))
        title = figure_title("Camera pairs", found, study)
        finish(figure, title, "camera of the visible gallery", "infrared queries")
        figure.colorbar(axes[0].collections[0], ax=axes, label="mAP, %", fraction=0.05)
    return figure


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
    groups = by_variant(records)
    with style():
        figure, (axis,) = panels(1, columns=1, height=0.42 * len(groups) + 1.0, width=5.5)
        for row, (variant, runs) in enumerate(groups.items()):
            color = variant_style(study, variant)["color"]
            used = runs[0]["config"]["model"].get("test_feature", "after_bn")
            means = {name: 100 * float(np.mean([run["probe"][name] for run in runs])) for name in PROBED}
            axis.plot([means["pretrained"], means[used]], [row, row], color="#C8C8C8", linewidth=1, zorder=1)
            for name, (words, marker) in PROBED.items():
                fill, label = color if name == used else "white", words if row == 0 else None
                axis.plot(means[name], row, marker, markerfacecolor=fill, markeredgecolor=color, label=label)
            axis.text(means[used], row - 0.15, f"{means[used]:.1f}", ha="center", va="bottom")
        axis.axvline(50, color=PALE, linewidth=0.8, linestyle=":", label="modality not recognizable")
        axis.set(xlim=(48, 102), ylim=(len(groups) - 0.5, -0.6))
        axis.set_yticks(range(len(groups)), [study.rows[variant].label for variant in groups])
        axis.grid(False, axis="y")
        title = figure_title("Modality probe accuracy", records, study)
        return finish(figure, title, "balanced accuracy of a linear probe, %")


def classifiers(records: Sequence[Record], study: Study) -> StudyFigure | None:
    """Do C_v and C_r agree, and how hard does L_M pull? A panel per question, a mark per run (docs/why_ml.md).

    Of the records with `classifiers.classifier_agreement`; None if there is none.
    """
    shown = [(record["variant"], _answers(record["classifiers"])) for record in records if "classifiers" in record]
    if not shown:
        return None
    variants = list(dict.fromkeys(variant for variant, _ in shown))
    with style():
        figure, axes = panels(len(shown[0][1]), columns=3, height=2.4)
        for axis, question in zip(axes, shown[0][1], strict=True):
            names = list(dict.fromkeys(name for _, answers in shown for name in answers[question]))
            for variant, answers in shown:
                look: Any = {key: variant_style(study, variant)[key] for key in ("label", "color")}
                shift = 0.3 * (variants.index(variant) + 0.5 - len(variants) / 2)
                y = [names.index(name) + shift for name in answers[question]]
                axis.plot(list(answers[question].values()), y, "o", markersize=4, alpha=0.6, **look)
            axis.set_yticks(range(len(names)), names)
            axis.set(title=question, ylim=(len(names) - 0.5, -0.5))
            if not question.startswith("accuracy"):
                axis.set_xlim(min(0, axis.get_xlim()[0]), max(1.02, axis.get_xlim()[1]))
        return finish(figure, figure_title("Classifiers of mutual learning", records, study))


def _answers(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    accuracy = {
        f"{head}, {side}": 100 * share for head, sides in measured["accuracy"].items() for side, share in sides.items()
    }
    return {
        "cosine of an identity's weights": {"C_v, C_r": measured["cosine"]["mean"]},
        "accuracy on training images, %": accuracy,
        "gradient norm at the feature / L_id's": {term: one["mean"] for term, one in measured["gradient"].items()},
    }


def distance_distributions(
    distributions: Mapping[str, Distributions], title: str, gaps: Mapping[str, Mapping[str, float]] | None = None
) -> StudyFigure:
    """The paper's Figure 1, measured: four distance distributions per variant, one panel each, common limits.

    distributions: by variant label, at least one, all with the same bins. Ticks at the lower edge are means.
    gaps: by label, shares from `analysis.modality_gap`.
    """
    edges = next(iter(distributions.values())).edges
    assert all(np.array_equal(edges, one.edges) for one in distributions.values()), "the bins differ"
    kinds = [kind for one in distributions.values() for kind in one.kinds.values()]
    last = max(int(np.flatnonzero(np.nan_to_num(kind.density)).max(initial=0)) for kind in kinds)
    top = 1.05 * max(float(np.nan_to_num(kind.density).max()) for kind in kinds)
    with style():
        figure, axes = panels(len(distributions), columns=2, height=2.6, width=4.4)
        for axis, (label, one) in zip(axes, distributions.items(), strict=True):
            for kind, words in KINDS.items():
                mean = one.kinds[kind].mean
                axis.plot((edges[:-1] + edges[1:]) / 2, one.kinds[kind].density, label=words, **KIND_STYLE[kind])
                axis.plot([mean, mean], [0, 0.05 * top], linewidth=2.4, **KIND_STYLE[kind])
            found = one.separation(SAME_CROSS, DIFFERENT_CROSS)
            words = (
                f"{textwrap.fill(label, 48)}\nacross modalities: d′ {found.d_prime:.2f}, overlap {found.overlap:.2f}"
            )
            if gaps:
                shares = " / ".join(f"{100 * gaps[label][name]:.0f}" for name in ("nearest", "median", "mean"))
                words += f"\nmodality gap > nearest / median / mean identity: {shares} %"
            axis.set_title(words, fontsize=8)
            axis.set(xlim=(0, edges[min(last + 2, len(edges) - 1)]), ylim=(0, top))
            axis.locator_params(nbins=5)  # most of the drawing time goes into ticks
        return finish(figure, title, f"{one.metric} distance", "density")


# -------------------- figures of crops


Mark = Literal["query", "right", "wrong", "ignored", ""]
MARKS: Mapping[str, tuple[str, str]] = {  # color of frame and caption; sign for gray print
    "query": ("#0072B2", ""),
    "right": ("#009E73", "✓"),
    "wrong": ("#D55E00", "✗"),
    "ignored": (PALE, "ignored"),
    "": ("#262626", ""),
}
_WIDTH, _GAP, _LINE = 0.88, 0.08, 0.125  # inches: a crop, the space between crops, a line of text


class Tile(NamedTuple):
    """A crop with its caption; `mark` says what it is in a ranked list."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str = ""
    mark: Mark = ""


TileRow = tuple[str, Sequence[Tile | None]]


def store_tile(store: PackedStore, row: int, caption: str, mark: Mark) -> Tile:
    """The packed image `row` with its identity and camera; the caption's first line ends with the sign of `mark`."""
    first = f"{caption} {MARKS[mark][1]}".strip()
    return Tile(store.images[row].transpose(1, 2, 0), f"{first}\nid {store.pids[row]}, cam {store.camids[row]}", mark)


def image_grid(rows: Sequence[TileRow], title: str) -> StudyFigure:
    """Crops of one size in rows, each row under its heading, captions above the crops; None leaves a place empty.

    Raises StudyError if there is no crop.
    """
    tiles = [tile for _, row in rows for tile in row if tile]
    if not tiles:
        raise StudyError("no image to draw: the list is empty; choose others")
    height = _WIDTH * tiles[0].image.shape[0] / tiles[0].image.shape[1]
    with style():
        figure = StudyFigure()
        axis, y = figure.add_axes((0, 0, 1, 1)), 0.0  # inches, downward
        for heading, row in rows:
            if heading:
                y += _LINE + _GAP
                axis.text(_GAP / 2, y, heading, fontsize=8, parse_math=False)
            y += _LINE * max(tile.caption.count("\n") + 1 for tile in row if tile) + _GAP
            for column, tile in enumerate(row):
                if tile:
                    x, color = _GAP / 2 + column * (_WIDTH + _GAP), MARKS[tile.mark][0]
                    axis.imshow(tile.image, extent=(x, x + _WIDTH, y + height, y), interpolation="nearest")
                    if tile.mark:
                        look: Any = {"linestyle": "--" if tile.mark == "ignored" else "-", "linewidth": 3}
                        axis.add_patch(Rectangle((x, y), _WIDTH, height, fill=False, edgecolor=color, **look))
                    look = {"fontsize": 6.5, "ha": "center", "va": "bottom", "color": color, "parse_math": False}
                    axis.text(x + _WIDTH / 2, y - _GAP / 2, tile.caption, **look)
            y += height + _GAP
        width, top = max(len(row) for _, row in rows) * (_WIDTH + _GAP), 0.17 * (title.count("\n") + 1) + 0.1
        axis.set(xlim=(0, width), ylim=(y, 0), anchor="W", position=(0, 0, 1, y / (y + top)))
        axis.set_axis_off()
        figure.set_size_inches(width, y + top)
        return widen(figure, figure.suptitle(title, parse_math=False, y=1 - 0.05 / (y + top), va="top"))


def ranked_rows(heading: str, query: Tile, ranked: Sequence[Tile], columns: int = 10) -> list[TileRow]:
    """A query and the images ranked for it, nearest first, `columns` to a row."""
    rows: list[TileRow] = [(heading, [query, *ranked[:columns]])]
    return rows + [("", [None, *ranked[k : k + columns]]) for k in range(columns, len(ranked), columns)]


def best_and_worst(rankings: Mapping[str, Any], store: PackedStore) -> list[TileRow]:
    """Rows of crops for the best and the worst queries of `runs/<run>/rankings.json`.

    store: the packed images that the rankings' rows refer to.
    """
    rows: list[TileRow] = []
    for end in ("best", "worst"):
        for number, one in enumerate(rankings[end], 1):
            found = zip(*(one["ranked"][key] for key in ("rows", "distances", "right")), strict=True)
            tiles = [
                store_tile(store, row, f"{rank} · {distance:.3f}", "right" if right else "wrong")
                for rank, (row, distance, right) in enumerate(found, 1)
            ]
            heading = f"{end} {number}: AP {100 * one['ap']:.1f} %, right images in the gallery: {one['n_right']}"
            rows += ranked_rows(heading, store_tile(store, one["row"], "query", "query"), tiles)
    return rows


def contact_sheet(store: PackedStore, pids: Sequence[int], per_camera: int, dataset: Dataset) -> StudyFigure:
    """One row per identity, `per_camera` crops of each camera, visible cameras first; a gray place has no image."""
    blank = np.full((*store.images.shape[2:], 3), 225, np.uint8)
    rows: list[TileRow] = []
    for pid in pids:
        tiles: list[Tile | None] = []
        for modality, camera in sorted(set(zip(store.modalities.tolist(), store.camids.tolist(), strict=True))):
            found = spread(np.flatnonzero((store.pids == pid) & (store.camids == camera)), per_camera)
            images = [store.images[row].transpose(1, 2, 0) for row in found] + [blank] * (per_camera - len(found))
            tiles += [Tile(image, f"{MODALITIES[modality]}\ncamera {camera}" if not rows else "") for image in images]
        rows.append((f"identity {pid}", tiles))
    return image_grid(rows, dataset_title("Identities and cameras", dataset))


def spread(values: Any, count: int) -> list[int]:
    """At most `count` of the distinct values, evenly spaced in ascending order, the first included."""
    ordered = np.unique(values)
    count = min(count, len(ordered))
    return ordered[np.arange(count) * len(ordered) // max(count, 1)].tolist()


def unnormalize(
    images: Float[np.ndarray, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Normalized images as pictures. mean, std: of RGB in [0, 1]."""
    pixels = 255 * (images.transpose(0, 2, 3, 1) * np.array(std) + np.array(mean))
    return pixels.round().clip(0, 255).astype(np.uint8)
