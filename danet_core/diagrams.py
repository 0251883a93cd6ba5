"""Drawings of the method, for the method notebook. Every function returns a matplotlib figure and touches no file.

Colour tells the identity, the marker the modality: a filled circle is visible, an open square infrared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch
from torch import Tensor

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_core.slow import CenterTerm, center_terms, softmax
from danet_core.style import VARIANT_STYLE, StudyFigure, need, style

Point = Float[np.ndarray, " 2"]
IDENTITY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_CLASSIFIERS = (("$C_v$", "#56B4E9", ""), ("$C_r$", "#D55E00", "///"))  # name, colour, hatch for grey print
_BASELINE, _CC, _ML = (VARIANT_STYLE[name][0] for name in ("baseline", "b_cc", "b_ml"))
_INK, _PALE, _PUSH = "#262626", "#8A8A8A", "#AA3377"
_READINGS = {
    "anchor": "as printed: the negative has the anchor's modality",
    "center": "as the prose says: the negative has the centre's modality",
}


def framework() -> StudyFigure:
    """The parts of the paper's Figure 2 as this study reads them: what feeds what, and where each loss acts."""
    with style():
        figure = StudyFigure(figsize=(11.5, 4.9), layout="constrained")
        axis = figure.subplots()
        axis.set(xlim=(0, 115), ylim=(0, 49))
        axis.set_axis_off()
        _box(axis, 8, 34, 14, 8, "visible images")
        _box(axis, 8, 18, 14, 8, "infrared images")
        _box(axis, 28, 26, 16, 14, "backbone $E$\n\none stream,\nshared by both", filled=True)
        _box(axis, 43, 26, 8, 8, "GAP")
        _box(axis, 56, 26, 10, 8, "feature\n$f$  (B, D)")
        _box(axis, 70, 26, 10, 8, "BN neck")
        for height, name, note in ((38, "$C$", "all images"), (26, "$C_v$", "visible"), (14, "$C_r$", "infrared")):
            _box(axis, 86, height, 10, 7, f"{name}\n{note}")
            _arrow(axis, (75, 26), (81, height))
        _box(axis, 56, 42, 20, 7, "$L_{cc}$, Eq. 3\nmodality centres align", _CC)
        _box(axis, 106, 38, 16, 7, "$L_{id}$\nBaseline", _BASELINE)
        _box(axis, 106, 26, 16, 7, "$L_{sid}$, Eq. 4\nown modality only", _ML)
        _box(axis, 106, 14, 16, 7, "$L_M$, Eq. 5\nboth on every image", _ML)
        _box(axis, 70, 5, 24, 7, "retrieval, after training\ncosine distance", _INK, dashed=True)
        for start, end in (((15, 34), (20, 29)), ((15, 18), (20, 23)), ((36, 26), (39, 26)), ((47, 26), (51, 26))):
            _arrow(axis, start, end)
        _arrow(axis, (61, 26), (65, 26))
        _arrow(axis, (56, 30), (56, 38.5), _CC)
        _arrow(axis, (91, 38), (98, 38), _BASELINE)
        for start, end in (((91, 27), (98, 27)), ((91, 16), (98, 24)), ((91, 24), (98, 16)), ((91, 13), (98, 13))):
            _arrow(axis, start, end, _ML)
        _arrow(axis, (70, 22), (70, 8.5), _INK, dashed=True)
        _legend(figure, [(_BASELINE, "Baseline"), (_CC, "+ CC"), (_ML, "+ ML"), (_INK, "test only")])
        figure.suptitle("DANet: where each loss acts (after the paper's Figure 2)")
    return figure


def center_geometry(
    feat: Float[Tensor, "B 2"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float,
    *,
    anchor: int,
) -> StudyFigure:
    """What Eq. 3 asks of image number `anchor` of a toy batch in the plane, in both readings of its negatives."""
    with style():
        figure = StudyFigure(figsize=(10.5, 5.2), layout="constrained")
        for axis, (reading, title) in zip(
            figure.subplots(1, 2, sharex=True, sharey=True), _READINGS.items(), strict=True
        ):
            term = center_terms(feat, labels, modalities, margin, reading)[anchor]
            _scatter(axis, feat, labels, modalities)
            _draw_term(axis, feat, term, anchor, margin, IDENTITY_COLOURS[int(labels[anchor])])
            _plane(axis, title)
        _batch_legend(figure, labels)
        figure.suptitle(f"Eq. 3 for one image (toy features, margin {margin})")
    return figure


def center_descent(
    path: Sequence[Float[Tensor, "B 2"]],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float,
    negatives: str = "anchor",
) -> StudyFigure:
    """A toy batch before and after gradient steps on Eq. 3, the way each feature took, and both parts of the loss."""
    need(path, "step")
    with style():
        figure = StudyFigure(figsize=(10.0, 4.2), layout="constrained")
        before, after, curve = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
        after.sharex(before)
        after.sharey(before)
        for axis, now, title in ((before, path[0], "before"), (after, path[-1], f"after {len(path) - 1} steps")):
            _scatter(axis, now, labels, modalities)
            _plane(axis, title)
        for i, label in enumerate(labels.tolist()):
            way = np.array([state[i].tolist() for state in path])
            after.plot(*way.T, color=IDENTITY_COLOURS[label], linewidth=0.9, alpha=0.6, zorder=1)
        terms = [center_terms(state, labels, modalities, margin, negatives) for state in path]
        for name, dash in (("pull", "-"), ("push", "--")):
            values = [np.mean([getattr(term, name).item() for term in step]) for step in terms]
            curve.plot(values, dash, color=_CC, label=name)
        curve.set(xlabel="gradient step", title="the two parts of $L_{cc}$", xlim=(0, len(path) - 1), ylim=(0, None))
        curve.legend()
        _batch_legend(figure, labels)
        figure.suptitle("Gradient descent on $L_{cc}$ alone (toy features)")
    return figure


def agreement(
    stages: Mapping[str, tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    curves: Mapping[str, Sequence[float]],
) -> StudyFigure:
    """What C_v and C_r say of each image of a toy batch at some stages, and L_M over the steps.

    Args:
        stages: by title, the logits of C_v and of C_r.
        curves: by name, L_M at each step.
    """
    need(stages, "stage")
    with style():
        figure = StudyFigure(figsize=(2.7 * len(stages) + 3.2, 2.1 * len(labels) + 1.1), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(len(stages), 1.15))[0]
        grid = left.subplots(len(labels), len(stages), sharex=True, sharey=True, squeeze=False)
        for column, (title, logits) in enumerate(stages.items()):
            grid[0, column].set_title(title)
            for row, axis in enumerate(grid[:, column]):
                _bars(axis, [part[row] for part in logits], int(labels[row]))
        for row, axis in enumerate(grid[:, 0]):
            axis.set_ylabel(f"{MODALITIES[int(modalities[row])]} image\nprobability")
        for axis in grid[-1]:
            axis.set_xlabel("identity")
        handles = [Circle((0, 0), facecolor=colour, hatch=hatch, edgecolor=_INK) for _, colour, hatch in _CLASSIFIERS]
        left.legend(handles, [name for name, *_ in _CLASSIFIERS], loc="outside lower center", ncols=2)
        axis = right.subplots()
        for (name, values), dash in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
            axis.plot(values, dash, color=_ML, label=name)
        axis.set(xlabel="gradient step", title="$L_M$ (nats)", xlim=(0, None), ylim=(0, None))
        axis.legend()
        figure.suptitle("Two classifiers about the same images (toy logits)")
    return figure


def _bars(axis: Axes, logits: Sequence[Float[Tensor, " C"]], truth: int) -> None:
    places = np.arange(len(logits[0]))
    for shift, row, (_, colour, hatch) in zip((-0.2, 0.2), logits, _CLASSIFIERS, strict=True):
        axis.bar(places + shift, softmax(row).tolist(), 0.4, color=colour, hatch=hatch, edgecolor=_INK, linewidth=0.6)
    axis.axvspan(truth - 0.5, truth + 0.5, color="#EBEBEB", zorder=0)
    axis.text(truth, 1.11, "true", ha="center", va="top", color=_INK, fontsize=8)
    axis.set(xticks=places, xlim=(-0.5, len(places) - 0.5), yticks=[0, 0.5, 1], ylim=(0, 1.13))
    axis.grid(False, axis="x")


def _scatter(
    axis: Axes, feat: Float[Tensor, "B 2"], labels: Integer[Tensor, " B"], modalities: Integer[Tensor, " B"]
) -> None:
    for (x, y), label, modality in zip(feat.tolist(), labels.tolist(), modalities.tolist(), strict=True):
        colour = IDENTITY_COLOURS[label]
        face, marker = (colour, "o") if modality == VISIBLE else ("none", "s")
        axis.plot(x, y, marker, markersize=8, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3)


def _draw_term(
    axis: Axes, feat: Float[Tensor, "B 2"], term: CenterTerm, anchor: int, margin: float, colour: str
) -> None:
    image, center, negative = (np.array(one.tolist()) for one in (feat[anchor], term.center, feat[term.negative]))
    away = (negative - center) / term.nearest.item()  # (2,) unit vector of the push
    axis.add_patch(Circle(tuple(center), margin, fill=False, color=_PALE, linestyle=(0, (4, 3)), linewidth=1.2))
    _note(axis, f"margin {margin}", center + np.array([0.0, margin]), (0, 9), _PALE)
    axis.plot(*image, "o", markersize=16, markerfacecolor="none", color=_INK, zorder=4)
    axis.plot(*center, "X", markersize=11, color=colour, markeredgecolor=_INK, zorder=4)
    axis.plot(*zip(center, negative, strict=True), color=_PALE, linewidth=1.2, linestyle=":")
    _step(axis, image, center, _INK, 8)
    _note(axis, "pull", (image + center) / 2, (0, -10), _INK)
    if term.push.item() > 0:
        _step(axis, negative, center + margin * away, _PUSH, 0)
        _note(axis, "push", center + margin * away, (16 * away).tolist(), _PUSH)
    for name, place, offset in (
        ("$f^{(i)}$", image, (0, 16)),
        ("$c$", center, (2, -16)),
        ("$f^{(k)}$", negative, (20, 0)),
    ):
        _note(axis, name, place, offset, _INK, 11)
    pull, push = f"pull $|f^{{(i)}} - c|$ = {term.pull.item():.2f}", f"= {term.push.item():.2f}"
    axis.set_xlabel(f"{pull}        push $[{margin} - {term.nearest.item():.2f}]_+$ {push}", fontsize=10)


def _note(axis: Axes, text: str, place: Point, offset: Sequence[float], colour: str, size: float = 9) -> None:
    """Text about `offset` points off a place."""
    axis.annotate(
        text,
        (place[0], place[1]),
        (offset[0], offset[1]),
        textcoords="offset points",
        ha="center",
        va="center",
        color=colour,
        fontsize=size,
        zorder=5,
    )


def _step(axis: Axes, start: Point, end: Point, colour: str, gap: float) -> None:
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2.2, "shrinkA": 8, "shrinkB": gap}
    axis.annotate("", (end[0], end[1]), (start[0], start[1]), arrowprops=arrow)


def _plane(axis: Axes, title: str) -> None:
    axis.set(title=title, xticks=[], yticks=[], aspect="equal")
    axis.margins(0.12)


def _batch_legend(figure: StudyFigure, labels: Integer[Tensor, " B"]) -> None:
    identities = [(IDENTITY_COLOURS[label], f"identity {label}") for label in sorted(set(labels.tolist()))]
    visible = Line2D([], [], linestyle="", marker="o", color=_INK, label=MODALITIES[VISIBLE])
    infrared = Line2D([], [], linestyle="", marker="s", color=_INK, markerfacecolor="none", label=MODALITIES[INFRARED])
    _legend(figure, identities, visible, infrared)


def _legend(figure: StudyFigure, colours: Sequence[tuple[str, str]], *markers: Line2D) -> None:
    patches = [Line2D([], [], color=colour, linewidth=6, label=name) for colour, name in colours]
    figure.legend(handles=[*patches, *markers], loc="outside lower center", ncols=len(patches) + len(markers))


def _box(
    axis: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colour: str = _INK,
    *,
    filled: bool = False,
    dashed: bool = False,
) -> None:
    """A box about (x, y). A colour other than ink marks a loss: it fills the box lightly."""
    loss = colour != _INK
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=1",
        facecolor=(colour, 0.15) if loss else ("#F2F2F2" if filled else "white"),
        edgecolor=colour,
        linewidth=1.8 if loss else 1.2,
        linestyle=(0, (4, 3)) if dashed else "-",
    )
    axis.add_patch(box)
    axis.text(x, y, text, ha="center", va="center", fontsize=10, color=_INK)


def _arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = _INK, *, dashed: bool = False
) -> None:
    axis.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "lw": 1.5,
            "shrinkA": 0,
            "shrinkB": 0,
            "linestyle": "--" if dashed else "-",
        },
    )
