"""The study's figures of curves and distributions, drawn in style.py's look.

Every function returns a matplotlib figure; nothing here reads or writes a file. `onto` is an earlier figure of the same
function, of as many panels, to draw on instead: it is emptied and returned, in half the time a new one takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.patches import Rectangle

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_core.distances import (
    DIFFERENT_CROSS,
    DIFFERENT_WITHIN,
    KINDS,
    SAME_CROSS,
    Distributions,
    IdentityClaims,
    Plane,
)
from danet_core.files import StudyError
from danet_core.style import KIND_STYLE, StudyFigure, finish, label_left, need, panels, style, variant_style

Record = Mapping[str, Any]

TERM_LABELS: Mapping[str, str] = {
    "total": "total loss (Eq. 6)",
    "L_id": "L_id, identity",
    "L_cc": "L_cc, cross-modality centre (Eq. 3)",
    "L_sid": "L_sid, modality-specific identity (Eq. 4)",
    "L_M": "L_M, mutual learning (Eq. 5)",
    "lr": "learning rate",
}


def training_curves(records: Sequence[Record], *, title: str, synthetic: bool) -> StudyFigure:
    """Loss terms and learning rate over the epochs, one panel each, one line per run.

    records: training records (`runs/<dataset>/<run>/record.json`) of the data set with this `title`. A term that no
    run has gets no panel, and a run without a term no line in its panel. Runs of one variant share colour and dash, and
    are named once.
    Raises StudyError when there is no record.
    """
    need(records, "training record")
    columns = [
        term for term in TERM_LABELS if any(epoch.get(term) is not None for r in records for epoch in r["history"])
    ]
    variants = [record["variant"] for record in records]
    with style():
        figure, axes = panels(len(columns), columns=3, height=2.3, sharey=False)
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
        finish(figure, axes, f"Training on {title}", synthetic)
    return figure


def cmc_curves(
    records: Sequence[Record],
    settings: Mapping[str, str],
    *,
    ranks: int = 20,
) -> StudyFigure:
    """Cumulative matching characteristic, one panel per setting, one line per variant.

    records: evaluation records (`results/<dataset>/metrics/<run>.json`); settings: keys of the record, with words for
    the panel's title. The line is the mean over a variant's runs (trials and seeds), the band reaches from the lowest
    to the highest curve of any run and gallery, where there are several. All panels have the same limits. Percent.
    A setting that was not scored has no panel (`random_seed` galleries know no multi-shot search), and the title says
    what is not the published protocol.
    Raises StudyError when there is no record.
    """
    need(records, "evaluation record")
    settings = {name: words for name, words in settings.items() if name in records[0]["settings"]}
    labels = {record["variant"]: record["label"] for record in records}
    with style():
        figure, axes = panels(len(settings), columns=2, height=2.6, sharey=True)
        banded = False
        for axis, (setting, words) in zip(axes, settings.items(), strict=True):
            for variant, label in labels.items():
                runs = [record["settings"][setting] for record in records if record["variant"] == variant]
                curves = 100 * np.array([run["cmc"][:ranks] for run in runs])  # (runs, ranks)
                colour, dash = variant_style(variant, list(labels))
                rank = np.arange(1, curves.shape[1] + 1)
                axis.plot(rank, curves.mean(axis=0), color=colour, linestyle=dash, label=label)
                ends = [[curve[:ranks] for curve in run.get("cmc_range", [run["cmc"]] * 2)] for run in runs]
                low, high = 100 * np.array(ends).min(axis=(0, 1)), 100 * np.array(ends).max(axis=(0, 1))
                if (low < high).any():
                    axis.fill_between(rank, low, high, color=colour, alpha=0.15, linewidth=0)
                    banded = True
            found = records[0]["settings"][setting]
            chance = 100 * sum(r["settings"][setting]["chance_rank1"] for r in records) / len(records)
            axis.axhline(chance, color="#9A9A9A", linewidth=0.8, linestyle=(0, (1, 2)), label="Rank-1 by chance")
            axis.set_title(f"{words}\n{found['n_valid']} queries, gallery {found['gallery_size']}")
            axis.set_xlabel("rank k, " + ("identities" if found["cmc_level"] == "identity" else "images"))
            label_left(axis, "matched within k, %")
            axis.set_xlim(1, ranks)
            axis.set_xticks(sorted({1, *range(5, ranks + 1, 5)}))
            axis.set_ylim(0, 100)
        if banded:
            axes[0].fill_between(
                [], [], [], color="#9A9A9A", alpha=0.3, linewidth=0, label="range over galleries and runs"
            )
        finish(figure, axes, "\n".join([f"CMC on {records[0]['title']}", *_marks(records[0])]), records[0]["synthetic"])
    return figure


def _marks(record: Record) -> list[str]:
    """A line on partial data, other galleries and re-ranking, of which `Results.markers` tells the tables; or none."""
    setting = next(iter(record["settings"].values()))
    marks = ["a part of the data set"] * bool(record["partial"])
    marks += ["galleries by random.seed(trial)"] * (setting.get("galleries") == "random_seed")
    marks += ["re-ranked"] * bool(setting.get("rerank"))
    return [f"not comparable with the published protocol: {', '.join(marks)}"] if marks else []


def camera_pairs(records: Sequence[Record]) -> StudyFigure:
    """mAP between each infrared camera (rows, queries) and each visible one (columns), one panel per variant, percent.

    records: evaluation records of SYSU-MM01's layout; a panel is the mean over a variant's runs, one scale for all. The
    pair of cameras 3 and 2 is framed with a dash: both look at the same place, and the protocol leaves it out.
    Raises StudyError when no record has camera pairs (RegDB's layout has one pair only).
    """
    import seaborn as sns  # here, for only this figure needs it: importing it takes over a second

    found = [record for record in records if record.get("camera_pairs")]
    need(found, "score of camera pairs")
    labels = {record["variant"]: record["label"] for record in found}
    pairs = [pair for record in found for pair in record["camera_pairs"]]
    queries, galleries = (sorted({pair[key] for pair in pairs}) for key in ("query_camera", "gallery_camera"))
    maps = []
    for variant in labels:
        cells: dict[tuple[int, int], list[float]] = {}
        for record in (one for one in found if one["variant"] == variant):
            for pair in record["camera_pairs"]:
                cells.setdefault((pair["query_camera"], pair["gallery_camera"]), []).append(100 * pair["mAP"])
        maps.append([[np.mean(cells.get((query, camera), [np.nan])) for camera in galleries] for query in queries])
    look: Any = {"vmin": 0, "vmax": float(np.nanmax(maps)), "cmap": "Blues", "annot": True, "fmt": ".1f", "cbar": False}
    look["xticklabels"], look["yticklabels"] = [[f"cam {camera}" for camera in part] for part in (galleries, queries)]
    with style():
        figure, axes = panels(len(labels), columns=2, height=1.5, sharey=True)
        for axis, label, values in zip(axes, labels.values(), maps, strict=True):
            sns.heatmap(values, ax=axis, **look)
            for row, column in np.argwhere(np.isnan(values)):
                axis.text(column + 0.5, row + 0.5, _percent(np.nan), ha="center", va="center")
            if 3 in queries and 2 in galleries:
                corner = galleries.index(2) + 0.04, queries.index(3) + 0.04
                frame: Any = {"fill": False, "linestyle": "--", "linewidth": 1.6, "edgecolor": "#D55E00"}
                axis.add_patch(Rectangle(corner, 0.92, 0.92, label="same place: not in the protocol", **frame))
            axis.set_title(label)
            axis.tick_params(rotation=0)
            axis.set_xlabel("visible gallery")
            label_left(axis, "infrared query")
        figure.colorbar(axes[0].collections[0], ax=axes, label="mAP, %", fraction=0.05)
        finish(figure, axes, f"Camera pairs on {found[0]['title']}", found[0]["synthetic"])
    return figure


PROBED: Mapping[str, tuple[str, str]] = {
    "pretrained": ("before training: pretrained backbone", "D"),
    "before_bn": ("trained, before the BN neck", "s"),
    "after_bn": ("trained, after the BN neck", "o"),
}


def modality_probe(records: Sequence[Record]) -> StudyFigure:
    """How well a linear probe tells the modality from the feature, before and after training, one line per variant.

    records: evaluation records, `probe` of probe.modality_probe; a mark is the mean over a variant's runs. Balanced
    accuracy in percent on identities that the probe was not fitted to; at 50 the modality cannot be told. The number
    beside a variant is that of the feature that retrieval uses. Raises StudyError when there is no record.
    """
    need(records, "modality probe")
    labels = {record["variant"]: record["label"] for record in records}
    used = records[0]["config"]["dataset"]["recipe"]["test_feature"]
    with style():
        figure, (axis,) = panels(1, columns=1, height=0.42 * len(labels) + 1.0, sharey=True)
        for place, variant in enumerate(labels):
            colour, _ = variant_style(variant, list(labels))
            runs = [record["probe"] for record in records if record["variant"] == variant]
            means = {name: 100 * float(np.mean([run[name] for run in runs])) for name in PROBED}
            axis.plot([means["pretrained"], means[used]], [place, place], color="#C8C8C8", linewidth=1, zorder=1)
            for name, (words, marker) in PROBED.items():
                face = colour if name == used else "white"
                axis.plot(
                    means[name],
                    place,
                    marker=marker,
                    markersize=7 if name == used else 5.5,
                    markerfacecolor=face,
                    markeredgecolor="#4D4D4D" if name == "pretrained" else colour,
                    linestyle="none",
                    label=words if place == 0 else None,
                )
            axis.annotate(_percent(means[used]), (means[used], place), (0, 7), textcoords="offset points", ha="center")
        axis.axvline(50, color="#9A9A9A", linewidth=0.8, linestyle=(0, (1, 2)), label="modality cannot be told")
        axis.set_xlim(48, 102)
        axis.set_ylim(len(labels) - 0.5, -0.6)
        axis.set_yticks(range(len(labels)), list(labels.values()))
        axis.grid(False, axis="y")
        axis.set_xlabel("balanced accuracy of a linear probe for the modality, %")
        finish(figure, [axis], f"Modality told from the feature\n{records[0]['title']}", records[0]["synthetic"])
    return figure


def distance_distributions(
    distributions: Mapping[str, Distributions],
    *,
    title: str,
    synthetic: bool,
    shares: Mapping[str, float] | None = None,
    onto: StudyFigure | None = None,
) -> StudyFigure:
    """Figure 1, reproduced: the four distance distributions of each variant, one panel per variant, common limits.

    distributions: by the panel's name (a variant's label), all over the same bins (`distances.distance_distributions`).
    Ticks at the lower edge are the means. In words: how well same and different identities come apart across modalities
    (d', overlap), and by how much the same identity's other modality is farther than other identities in the same one
    (d'; positive as Figure 1 has it). shares: fraction of identities for which Figure 1's claim holds
    (`distances.centre_claim`), by the same name.
    Raises StudyError when there is nothing to draw, or the bins differ.
    """
    need(distributions, "set of test features")
    edges = next(iter(distributions.values())).edges
    if any(not np.array_equal(edges, one.edges) for one in distributions.values()):
        raise StudyError("the distance distributions have different bins; make all of them with one `upper` and `bins`")
    middles = (edges[:-1] + edges[1:]) / 2
    used = max(
        int(np.flatnonzero(kind.counts).max(initial=0)) for one in distributions.values() for kind in one.kinds.values()
    )
    top = 1.12 * max(kind.density(edges).max() for one in distributions.values() for kind in one.kinds.values())
    with style():
        figure, axes = panels(len(distributions), columns=2, height=2.6, sharey=True, onto=onto)
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
            label_left(axis, "density")
            axis.set_xlim(0, edges[min(used + 2, len(edges) - 1)])
            axis.set_ylim(0, 1.35 * top)  # room for the text
        finish(figure, axes, f"Distances (the paper's Figure 1) on {title}", synthetic)
    return figure


def identity_claim(
    claims: Mapping[str, IdentityClaims], pid: int, *, title: str, synthetic: bool, onto: StudyFigure | None = None
) -> StudyFigure:
    """Figure 1's claim for one identity: how far its other modality lies, against how far other identities lie.

    claims: by a variant's label, each with this `pid`. Two lines per variant, its visible and its infrared side: a tick
    for each other identity's centre of that modality, a diamond at the nearest with its pid, and a dashed line at the
    identity's own centre of the other modality. The claim holds from a side where that line lies right of the diamond.
    In words: for which sides it holds, and for which share of all identities it does from both.
    Raises StudyError when there is nothing to draw, or the identity is unknown.
    """
    need(claims, "set of test features")
    other, (own, dash) = KIND_STYLE[DIFFERENT_WITHIN][0], KIND_STYLE[SAME_CROSS]
    rows = {name: one.row(pid) for name, one in claims.items()}
    shown = [(one.cross[rows[name]], *one.between[:, rows[name]].ravel()) for name, one in claims.items()]
    farthest = float(np.max(shown, where=np.isfinite(shown), initial=0.0))
    with style():
        figure, (axis,) = panels(1, columns=1, height=0.7 * len(claims) + 0.3, width=7.2, sharey=True, onto=onto)
        for number, (name, one) in enumerate(claims.items()):
            row, first = rows[name], 3 * number + 1  # of three lines, the first is for the words
            gaps = np.delete(one.between[:, row], row, axis=1)  # (side, other identities)
            sides = np.repeat([first, first + 1], gaps.shape[1])
            axis.plot(gaps.ravel(), sides, "|", color=other, alpha=0.5, label="another identity")
            nearest = one.nearest_visible[row], one.nearest_infrared[row]
            words = "the nearest of them, with its number"
            axis.plot(nearest, [first, first + 1], "D", color=other, markersize=5, label=words)
            for side, neighbour in enumerate((one.neighbour_visible[row], one.neighbour_infrared[row])):
                place: Any = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 7.5}
                axis.annotate(str(neighbour), (nearest[side], first + side), (0, -5), **place)
            ends = [first - 0.35, first + 1.35]
            axis.plot([one.cross[row]] * 2, ends, color=own, linestyle=dash, label="the same identity, other modality")
            words = _CLAIM_WORDS[bool(one.holds_visible[row]), bool(one.holds_infrared[row])]
            share = 100 * float((one.holds_visible & one.holds_infrared).mean())
            told = f"{name}: {words} (from both sides for {share:.1f} % of {len(one.pids)} identities)"
            axis.text(0.01, first - 0.8, told, transform=axis.get_yaxis_transform(), va="center")
        lines = [3 * number + 1 + side for number in range(len(claims)) for side in (VISIBLE, INFRARED)]
        axis.set_yticks(lines, ["visible side", "infrared side"] * len(claims))
        axis.set_ylim(3 * len(claims) - 0.3, -0.3)
        axis.set_xlim(0, 1.05 * farthest)
        axis.set_xlabel("cosine distance between centres")
        finish(figure, [axis], f"Figure 1's claim for identity {pid} on {title}", synthetic)
    return figure


_CLAIM_WORDS = {
    (True, True): "holds from both sides",
    (True, False): "holds from the visible side only",
    (False, True): "holds from the infrared side only",
    (False, False): "does not hold",
}


def projection(
    planes: Mapping[str, Plane],
    pids: Int[np.ndarray, " N"],
    modalities: Int[np.ndarray, " N"],
    *,
    title: str,
    synthetic: bool,
    pid: int | None = None,
    claims: Mapping[str, IdentityClaims] | None = None,
    onto: StudyFigure | None = None,
) -> StudyFigure:
    """Test features on the plane in which they spread most, one panel per variant, common limits.

    planes: by the panel's name (a variant's label), each of the same N images with these pids and modalities. Circles
    are visible images and triangles infrared ones. Coloured by modality; or, with `pid` and `claims` (by the same
    names), by identity: this one, its nearest others of Figure 1's claim, and everybody else in grey.
    Raises StudyError when there is nothing to draw, or `claims` does not know the identity.
    """
    need(planes, "set of test features")
    limit = 1.05 * max(float(np.abs(one.points).max()) for one in planes.values()) or 1.0
    everyone = np.ones(len(pids), dtype=bool)
    with style():
        figure, axes = panels(len(planes), columns=2, height=3.3, sharey=True, onto=onto)
        for axis, (name, plane) in zip(axes, planes.items(), strict=True):
            layers: list[tuple[str, np.ndarray, tuple[str, str], float]] = [("", everyone, _MODALITY_COLOURS, 2.0)]
            if pid is not None and claims is not None:
                one = claims[name]
                near = [one.neighbour_visible[one.row(pid)], one.neighbour_infrared[one.row(pid)]]
                layers = [
                    ("other identities", everyone, ("#D0D0D0", "#D0D0D0"), 1.5),
                    ("its nearest others", np.isin(pids, near), ("#E69F00", "#E69F00"), 4.0),
                    (f"identity {pid}", pids == pid, ("#0072B2", "#0072B2"), 4.0),
                ]
            for words, chosen, colours, size in layers:
                for modality, marker in ((VISIBLE, "o"), (INFRARED, "^")):
                    points = plane.points[chosen & (modalities == modality)]
                    label = ", ".join(filter(None, (words, MODALITIES[modality])))
                    edge: Any = {"markeredgewidth": 0.0, "alpha": 0.7}
                    axis.plot(*points.T, marker, color=colours[modality], markersize=size, label=label, **edge)
            axis.set_title(f"{name}: {100 * plane.explained.sum():.0f} % of the variance")
            axis.set_xlabel("first principal component")
            label_left(axis, "second principal component")
            # No ticks: the coordinates mean nothing by themselves, and all panels have the same.
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        finish(figure, axes, f"Test features in two dimensions on {title}", synthetic)
        for handle in figure.legends[0].legend_handles:
            handle.set(markersize=5, alpha=1)  # type: ignore[union-attr]
    return figure


_MODALITY_COLOURS = ("#0072B2", "#D55E00")  # visible, infrared


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _percent(value: float | np.floating) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
