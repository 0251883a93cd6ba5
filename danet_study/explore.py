"""Finished runs to explore: distances, the modality gap of one identity, ranked galleries (notebook 06).

`Exploration` computes and draws what a `Choice` names; `Explorer` adds controls. Nothing here trains or scores.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gc
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from PIL import Image

from danet_core import MODALITIES
from danet_study import analysis, figures
from danet_study.analysis import Distributions, IdentityGaps, Metric, Plane
from danet_study.config import Dataset, Study
from danet_study.evaluate import FEATURES, Features
from danet_study.figures import MARKS, StudyFigure, Tile, store_tile
from danet_study.files import StudyError, read_json
from danet_study.protocols import PROTOCOLS, Images, Protocol
from danet_study.store import PackedStore

SAMPLE = 1000  # images in distributions and planes, evenly spaced: all of them take seconds
IGNORED_SHOWN = 3  # nearest images that the protocol ignores
OPTIONS: Mapping[str, dict[Any, str]] = {
    "feature": {"after_bn": "after the BN neck", "before_bn": "before the BN neck"},
    "metric": {"cosine": "cosine", "euclidean": "Euclidean"},
    "color": {"modality": "by modality", "identity": "by identity"},
    "top": {10: "10", 5: "5", 20: "20", 30: "30"},
}
SEPARATIONS = {
    "across modalities": (analysis.SAME_CROSS, analysis.DIFFERENT_CROSS),
    "within a modality": (analysis.SAME_WITHIN, analysis.DIFFERENT_WITHIN),
}


@dataclass(frozen=True)
class Choice:
    """What is shown. The options of a field depend on those before it."""

    split: str
    seed: int
    variants: tuple[str, ...]
    feature: str
    metric: Metric
    color: str
    setting: str
    pid: int
    query: int  # row of the packed store
    top: int


class View:
    """Test features of a run. Distributions and plane are of a sample, gaps of all; `upper`: the largest distance."""

    def __init__(self, images: Images, metric: Metric, upper: float) -> None:
        self.images, self.metric, self.upper = images, metric, upper
        self.sample = images[figures.spread(np.arange(len(images)), SAMPLE)]

    @cached_property
    def distributions(self) -> Distributions:
        arrays = self.sample.feat, self.sample.pids, self.sample.modalities
        return analysis.distance_distributions(*arrays, metric=self.metric, upper=self.upper, bins=50)

    @cached_property
    def gaps(self) -> IdentityGaps:
        return analysis.identity_gaps(self.images.feat, self.images.pids, self.images.modalities)

    @cached_property
    def plane(self) -> Plane:
        return analysis.principal_plane(self.sample.feat, self.metric)


class Exploration:
    """The finished runs below `root`; what is read or computed is kept.

    runs: {(split, seed): variants with test features, in the order of params.yaml}.
    """

    def __init__(self, study: Study, root: str | Path = ".") -> None:
        self.study, self.root = study, Path(root)
        self.runs: dict[tuple[str, int], tuple[str, ...]] = {}
        rows, found = list(study.rows), []
        for path in self.root.glob(f"runs/*-*-*-*/{FEATURES}"):
            dataset, trial, variant, number = path.parent.name.split("-")  # no name in params.yaml has a hyphen
            if dataset in study.datasets and variant in rows:
                found.append((dataset, int(trial), int(number), rows.index(variant)))
        for name, split, seed, row in sorted(found):
            self.runs[f"{name}-{split}", seed] = (*self.runs.get((f"{name}-{split}", seed), ()), rows[row])
        # One cache per object; a method decorated by `cache` would keep the object alive.
        self.store, self.images = functools.cache(self._store), functools.cache(self._images)
        self.view = functools.cache(self._view)

    def dataset(self, split: str) -> Dataset:
        return self.study.dataset(split.rpartition("-")[0])

    def protocol(self, split: str) -> Protocol:
        return PROTOCOLS[self.dataset(split).protocol]

    def label(self, variant: str) -> str:
        return self.study.rows[variant].label

    def _store(self, split: str) -> PackedStore:
        """The packed images; their hash is compared with the runs', not recomputed, which takes seconds."""
        return PackedStore.open(self.root / "data/packed" / self.dataset(split).name, verify=False)

    def _images(self, split: str, variant: str, seed: int, feature: str) -> Images:
        """Test images with the features of a run. Raises StudyError if they are damaged or of other images."""
        run = self.root / "runs" / f"{split}-{variant}-{seed}"
        trained = read_json(run / "record.json")["provenance"]["data_sha256"]
        if trained != self.store(split).meta["content_sha256"]:
            raise StudyError(f"{run}: its features are of other images than data/packed holds; run `dvc repro`")
        return Features.load(run / FEATURES).images(feature)

    def _view(self, split: str, variant: str, seed: int, feature: str, metric: Metric) -> View:
        view = View(self.images(split, variant, seed, feature), metric, 2.0)
        if metric == "euclidean":  # the largest distance that any variant can have: all share their bins
            feats = [self.images(split, one, seed, feature).feat for one in self.runs[split, seed]]
            view.upper *= max(float(np.linalg.norm(feat, axis=1).max()) for feat in feats)
            view.gaps = self.view(split, variant, seed, feature, "cosine").gaps  # cosine distances in either case
        return view

    # -------------------- choices

    def options(self, name: str, chosen: Mapping[str, Any]) -> dict[Any, str]:
        """The values that a field of Choice can have, given those before it, and their words."""
        if name in OPTIONS:
            return OPTIONS[name]
        if name == "split":
            return {split: split for split, _ in self.runs}
        split = chosen["split"]
        if name == "seed":
            return {seed: str(seed) for other, seed in self.runs if other == split}
        if name == "variants":
            return {variant: self.label(variant) for variant in self.runs[split, chosen["seed"]]}
        if name == "setting":
            return dict(self.protocol(split).settings)
        first = self.runs[split, chosen["seed"]][0]
        query, _ = self.sides(split, first, chosen["seed"], "after_bn", chosen["setting"])
        if name == "pid":
            return {pid: str(pid) for pid in np.unique(query.pids).tolist()}
        rows = query.rows[query.pids == chosen["pid"]].tolist()
        return dict(zip(rows, self.store(split).manifest["path"].iloc[rows], strict=True))

    def choose(self, *, strict: bool = True, **given: Any) -> Choice:
        """A complete choice. A field that is not given has its first option, `variants` all.

        Raises StudyError for an unknown value; if not `strict`, the first option replaces it.
        """
        chosen: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(Choice)):
            options, many = list(self.options(name, chosen)), name == "variants"
            values = given.get(name, options) if many else [given.get(name, options[0] if options else "")]
            found = [value for value in values if value in options]
            if strict and len(found) < len(values):
                known = ", ".join(map(str, options[:8])) or "none"
                raise StudyError(f"{name} {values}: no finished run has it; choose from: {known}")
            if many and not found:
                raise StudyError("no variant is chosen; tick at least one")
            chosen[name] = tuple(found) if many else (found or options)[0]
        return Choice(**chosen)

    def sides(self, split: str, variant: str, seed: int, feature: str, setting: str) -> tuple[Images, Images]:
        """Queries and gallery of a setting; of several random galleries the first."""
        images, galleries = self.images(split, variant, seed, feature), self.store(split).galleries
        query, gallery = (images.of_modality(side) for side in self.protocol(split).sides[setting])
        if setting in galleries:
            gallery = gallery[np.searchsorted(gallery.rows, np.sort(galleries[setting][0]))]
        return query, gallery

    # -------------------- what is shown

    def views(self, choice: Choice) -> dict[str, View]:
        """The chosen variants by label."""
        return {
            self.label(v): self.view(choice.split, v, choice.seed, choice.feature, choice.metric)
            for v in choice.variants
        }

    def title(self, what: str, choice: Choice) -> str:
        return figures.dataset_title(what, self.dataset(choice.split))

    def table(self, choice: Choice) -> pd.DataFrame:
        """One row per variant: mean distances, d′ and overlap, share of identities with a gap above the nearest."""
        rows: dict[str, dict[tuple[str, str], float]] = {}
        for label, view in self.views(choice).items():
            kinds = view.distributions.kinds
            rows[label] = {("mean distance", words): kinds[kind].mean for kind, words in analysis.KINDS.items()}
            for words, pair in SEPARATIONS.items():
                found = view.distributions.separation(*pair)
                rows[label] |= {(words, "d′"): found.d_prime, (words, "overlap"): found.overlap}
            rows[label]["modality gap > nearest identity", "share of identities"] = view.gaps.shares()["nearest"]
        return pd.DataFrame(rows).T

    def distances_figure(self, choice: Choice) -> StudyFigure:
        found = {label: view.distributions for label, view in self.views(choice).items()}
        return figures.distance_distributions(found, self.title("Distances between test features", choice))

    def plane_figure(self, choice: Choice) -> StudyFigure:
        """Test features on their principal plane, one panel per variant, common limits."""
        views = self.views(choice)
        limit = 1.05 * max(float(np.abs(view.plane.points).max()) for view in views.values()) or 1.0
        with figures.style():
            figure, axes = figures.panels(len(views), columns=2, height=3.3)
            for axis, (label, view) in zip(axes, views.items(), strict=True):
                pids = view.sample.pids
                layers: list[Any] = [("", pids == pids, ("#0072B2", "#D55E00"), 2.5)]
                if choice.color == "identity":
                    near = view.gaps.neighbors[:, view.gaps.pids == choice.pid]
                    layers = [
                        ("other identities, ", pids == pids, ("#D0D0D0",) * 2, 1.5),
                        ("its nearest identities, ", np.isin(pids, near), ("#E69F00",) * 2, 4.0),
                        (f"identity {choice.pid}, ", pids == choice.pid, ("#0072B2",) * 2, 4.0),
                    ]
                for words, chosen, colors, size in layers:
                    for modality, marker in enumerate("o^"):
                        points = view.plane.points[chosen & (view.sample.modalities == modality)]
                        look: Any = {"color": colors[modality], "markersize": size, "markeredgewidth": 0, "alpha": 0.7}
                        axis.plot(*points.T, marker, label=words + MODALITIES[modality], **look)
                axis.set_title(f"{label}: {100 * view.plane.explained.sum():.0f} % of the variance")
                # No ticks: the coordinates have no meaning, and all panels have the same.
                axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
            title = self.title("Test features in two dimensions", choice)
            figures.finish(figure, title, "first principal component", "second principal component")
            for handle in figure.legends[0].legend_handles:
                handle.set(markersize=5, alpha=1)  # type: ignore[union-attr]
        return figure

    def gap_figure(self, choice: Choice) -> StudyFigure:
        """Modality gap of one identity: from its visible to its infrared center, against other identities' centers."""
        found = {label: view.gaps for label, view in self.views(choice).items()}
        if choice.pid not in next(iter(found.values())).pids:
            raise StudyError(f"identity {choice.pid} has images of one modality only; choose another")
        lines = [f"{label}, {name}" for label in found for name in MODALITIES]
        with figures.style():
            figure, (axis,) = figures.panels(1, columns=1, height=0.62 * len(found) + 0.3, width=7.2)
            for number, gaps in enumerate(found.values()):
                row, y = int(np.searchsorted(gaps.pids, choice.pid)), np.array([2 * number, 2 * number + 1])
                others = np.delete(gaps.between[:, row], row, axis=1)  # (2, P - 1)
                name = "another identity, same modality"
                axis.plot(others.ravel(), np.repeat(y, others.shape[1]), "|", color="#D55E00", alpha=0.5, label=name)
                axis.plot(gaps.nearest[:, row], y, "D", color="#D55E00", markersize=5, label="nearest of these")
                for x, height, pid in zip(gaps.nearest[:, row], y, gaps.neighbors[:, row], strict=True):
                    axis.text(x, height + 0.2, str(pid), fontsize=7, ha="center", va="top")
                name = "same identity, other modality"
                axis.plot([gaps.cross[row]] * 2, [y[0] - 0.4, y[1] + 0.4], "--", color="#0072B2", label=name)
            axis.set_yticks(range(len(lines)), lines)
            axis.set(xlim=(0, None), ylim=(len(lines) - 0.3, -0.6))
            title = self.title(f"Modality gap of identity {choice.pid}", choice)
            return figures.finish(figure, title, "cosine distance between centers")

    def gallery(self, choice: Choice, variant: str) -> tuple[str, Tile, list[Tile]]:
        """Heading, query and the first `top` images of its gallery, then the nearest of those the protocol ignores."""
        query, gallery = self.sides(choice.split, variant, choice.seed, choice.feature, choice.setting)
        query, store, protocol = (
            query[query.rows == choice.query],
            self.store(choice.split),
            self.protocol(choice.split),
        )
        distances = analysis.distance_matrix(query.feat, gallery.feat, choice.metric)[0]
        ranked = analysis.rank_gallery(distances, choice.pid, gallery.pids, protocol.ignore(query, gallery)[0])
        rows = gallery.rows.tolist()
        tiles = [
            store_tile(store, rows[i], f"{rank} · {distances[i]:.3f}", "right" if right else "wrong")
            for rank, i, right in zip(range(1, choice.top + 1), ranked.order, ranked.right, strict=False)
        ]
        ignored = ranked.ignored[:IGNORED_SHOWN]
        tiles += [store_tile(store, rows[i], f"{distances[i]:.3f}", "ignored") for i in ignored]
        found = "no image of this identity in the gallery"
        if ranked.right.any():
            found = f"AP {100 * ranked.average_precision:.1f} %, first right image at rank {ranked.right.argmax() + 1}"
        words = protocol.settings[choice.setting] + (", first gallery" if choice.setting in store.galleries else "")
        heading = f"{self.label(variant)}: identity {choice.pid} among {len(ranked.order)} images ({words}); {found}"
        if len(ranked.ignored):
            heading += f"; {len(ranked.ignored)} images ignored by the protocol"
        return heading, store_tile(store, choice.query, "query", "query"), tiles

    def figures(self, choice: Choice) -> dict[str, StudyFigure]:
        """Every figure of the choice by name; `ranked` is the query's gallery for each variant."""
        rows = [row for variant in choice.variants for row in figures.ranked_rows(*self.gallery(choice, variant))]
        return {
            "distances": self.distances_figure(choice),
            "plane": self.plane_figure(choice),
            "gap": self.gap_figure(choice),
            "ranked": figures.image_grid(rows, self.title("Ranked galleries", choice)),
        }


# -------------------- controls

WORDS = {  # of the controls
    **{"split": "split", "seed": "seed", "feature": "feature", "metric": "distance", "color": "colors"},
    **{"setting": "search", "pid": "identity", "query": "query", "top": "show first"},
}
_RUNS = ("split", "seed", "feature", "variants")
DEPENDS: Mapping[str, tuple[str, ...]] = {  # what each panel shows of a choice
    "table": (*_RUNS, "metric"),
    "distances": (*_RUNS, "metric"),
    "plane": (*_RUNS, "metric", "color"),
    "gap": (*_RUNS, "pid"),
    "ranked": (*_RUNS, "metric", "setting", "query", "top"),
}


class Explorer:
    """Controls and panels over the finished runs of a study: display `app`. `first`: fields of Choice to begin with.

    `choice` is None if no such run is finished: `app` then says what to run. An unknown value raises StudyError.
    """

    def __init__(self, study: Study, root: str | Path = ".", *, split: str, **first: Any) -> None:
        self.exploration = found = Exploration(study, root)
        self.choice: Choice | None = None
        if split not in found.options("split", {}):
            found.dataset(split)  # an unknown data set is an error
            self.app: widgets.Widget = widgets.HTML(f"{split} has no finished run: `make repro` makes them")
            return
        wish = found.choose(split=split, **first)
        self.controls: dict[str, Any] = {
            name: widgets.Dropdown(description=words, layout={"width": "auto"}) for name, words in WORDS.items()
        }
        self.controls["query"] = widgets.SelectionSlider(options=[0], description="query", continuous_update=False)
        done = {variant for variants in found.runs.values() for variant in variants}
        self.ticks = {
            v: widgets.Checkbox(v in wish.variants, description=found.label(v), indent=False, layout={"width": "auto"})
            for v in study.rows
            if v in done
        }
        self.status = widgets.HTML()
        half = {"width": "49%", "min_width": "440px", "max_width": "640px"}  # two side by side where there is room
        self.panels: dict[str, Any] = {
            **{name: widgets.HTML() for name in ("table", "ranked")},
            **{name: widgets.Image(layout=half) for name in ("distances", "plane")},
            "gap": widgets.Image(layout={"max_width": "100%"}),
        }
        self._made: dict[tuple[Any, ...], Any] = {}  # panels by what they show
        rows = [
            [self.controls[name] for name in ("split", "seed", "feature", "metric", "color")],
            [widgets.Label("variants"), *self.ticks.values()],
            [self.status],
            [self.panels["distances"], self.panels["plane"]],
            [self.panels["table"]],
            [self.controls[name] for name in ("setting", "pid", "query", "top")],
            [self.panels["gap"]],
            [self.panels["ranked"]],
        ]
        wrap = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        self.app = widgets.VBox([widgets.Box(row, layout=wrap) for row in rows])
        gc.freeze()  # searching torch's objects for garbage takes half a second at a time
        self._busy = False
        for control in (*self.controls.values(), *self.ticks.values()):
            control.observe(self._update, "value")
        self._update(wish=dataclasses.asdict(wish))

    def _update(self, change: Any = None, wish: Mapping[str, Any] | None = None) -> None:
        """Redraw after a change of a control; an error is shown above the figures."""
        if self._busy:  # a control that `_settle` moved
            return
        self._busy = True
        try:
            self.choice = self._settle(wish or {})
            self._draw(self.choice)
        except StudyError as error:
            self.status.value = f'<span style="color: #B00020">{html.escape(str(error))}</span>'
        finally:
            self._busy = False

    def _settle(self, wish: Mapping[str, Any]) -> Choice:
        """Give every control the options that those before it leave; its value stays if it still can."""
        wanted = {name: control.value for name, control in self.controls.items()}
        wanted["variants"] = [variant for variant, tick in self.ticks.items() if tick.value]
        choice = self.exploration.choose(strict=False, **{**wanted, **wish})
        for name, control in self.controls.items():
            options = self.exploration.options(name, vars(choice))
            if control.options != (pairs := tuple((words, value) for value, words in options.items())):
                control.options = pairs
            control.value = getattr(choice, name)
        for variant, tick in self.ticks.items():
            tick.disabled = variant not in self.exploration.runs[choice.split, choice.seed]
            tick.value = variant in choice.variants
        return choice

    def _draw(self, choice: Choice) -> None:
        """Show every panel; one that has been drawn before is not drawn again."""
        found = self.exploration
        self.status.value = "computing …"
        for name, fields in DEPENDS.items():
            if name == "plane" and choice.color == "identity":
                fields = (*fields, "pid")
            key = (name, *(getattr(choice, field) for field in fields))
            if key not in self._made:
                if name == "table":
                    self._made[key] = found.table(choice).to_html(float_format="{:.3f}".format, border=0)
                elif name == "ranked":  # as HTML: drawing the figure takes longer than all other panels
                    self._made[key] = "".join(_gallery_html(*found.gallery(choice, one)) for one in choice.variants)
                else:
                    self._made[key] = getattr(found, f"{name}_figure")(choice)._repr_png_()
            self.panels[name].value = self._made[key]
        view = next(iter(found.views(choice).values()))
        words = f"last epoch; distances and plane of {len(view.sample)} of {len(view.images)} test images"
        self.status.value = f"{words}; {figures.SYNTHETIC}" if found.dataset(choice.split).synthetic else words

    def figures(self) -> dict[str, StudyFigure]:
        """The figures of what is chosen now; none if there is no run."""
        return {} if self.choice is None else self.exploration.figures(self.choice)

    def save(self, folder: str | Path) -> list[Path]:
        """Write these figures to `folder` as PNG and PDF; nothing if `folder` is empty."""
        made = self.figures().items() if folder else ()
        return [path for name, figure in made for path in figures.save(figure, Path(folder) / name)]


def _gallery_html(heading: str, query: Tile, ranked: list[Tile]) -> str:
    parts = [f"<p>{html.escape(heading)}</p>"]
    for tile in (query, *ranked):
        stream, color = io.BytesIO(), MARKS[tile.mark][0]
        Image.fromarray(np.ascontiguousarray(tile.image)).save(stream, "JPEG", quality=92)
        source = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
        border = f"3px {'dashed' if tile.mark == 'ignored' else 'solid'} {color}"
        caption = html.escape(tile.caption).replace("\n", "<br>")
        parts.append(
            f'<figure style="display: inline-block; margin: 2px; text-align: center; font-size: 11px; color: {color}">'
            f'<img src="{source}" style="height: 130px; border: {border}"><br>{caption}</figure>'
        )
    return "".join(parts)
