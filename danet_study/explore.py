"""Finished runs to explore: distances, the modality gap of one identity, ranked galleries (notebook 06).

`Exploration` computes and draws what a `Choice` names; `Explorer` adds ipywidgets. Nothing here trains or scores.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gc
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from PIL import Image

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_study import analysis, figures
from danet_study.analysis import Distributions, IdentityGaps, Metric, Plane
from danet_study.config import Dataset, Study
from danet_study.evaluate import FEATURES as FEATURES_FILE
from danet_study.evaluate import Features
from danet_study.figures import MARKS, StudyFigure, Tile, store_tile
from danet_study.files import StudyError, read_json
from danet_study.protocols import PROTOCOLS, Images, Protocol
from danet_study.store import PackedStore

FEATURES = {"after_bn": "after the BN neck", "before_bn": "before the BN neck"}
METRICS: dict[Metric, str] = {"cosine": "cosine", "euclidean": "Euclidean"}
COLORS = {"modality": "by modality", "identity": "by identity"}
TOPS = (5, 10, 20, 30)
IGNORED_SHOWN = 3  # nearest images that the protocol ignores
SEPARATIONS = {
    "across modalities": (analysis.SAME_CROSS, analysis.DIFFERENT_CROSS),
    "within a modality": (analysis.SAME_WITHIN, analysis.DIFFERENT_WITHIN),
}


@dataclass(frozen=True)
class Choice:
    """What is shown. `query` is a row of the packed store, `pid` its identity."""

    split: str
    seed: int
    variants: tuple[str, ...]
    feature: str
    metric: Metric
    setting: str
    pid: int
    query: int
    top: int = 10
    color: str = "modality"


class Exploration:
    """The finished runs below `root`. Features, images and results are read or computed once, when first needed.

    runs: {(split, seed): variants with test features, in the order of params.yaml}.
    """

    def __init__(self, study: Study, root: str | Path = ".") -> None:
        self.study, self.root = study, Path(root)
        self.runs: dict[tuple[str, int], tuple[str, ...]] = {}
        rows, found = list(study.rows), []
        for path in self.root.glob(f"runs/*-*-*-*/{FEATURES_FILE}"):
            dataset, trial, variant, number = path.parent.name.split("-")  # no name in params.yaml has a hyphen
            if dataset in study.datasets and variant in rows:
                found.append((dataset, int(trial), int(number), rows.index(variant)))
        for name, split, seed, row in sorted(found):
            self.runs[f"{name}-{split}", seed] = (*self.runs.get((f"{name}-{split}", seed), ()), rows[row])
        # One cache per object; a method decorated by `cache` would keep the object alive.
        self.store, self.images = functools.cache(self._store), functools.cache(self._images)
        self.distributions, self.gaps = functools.cache(self._distributions), functools.cache(self._gaps)
        self.plane = functools.cache(self._plane)

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
        return Features.load(run / FEATURES_FILE).images(feature)

    def _distributions(self, split: str, variant: str, seed: int, feature: str, metric: Metric) -> Distributions:
        """Distances of a run in bins that all variants share."""
        images, upper = self.images(split, variant, seed, feature), 2.0
        if metric == "euclidean":  # the largest distance that any variant can have
            feats = [self.images(split, one, seed, feature).feat for one in self.runs[split, seed]]
            upper *= max(float(np.linalg.norm(feat, axis=1).max()) for feat in feats)
        return analysis.distance_distributions(images.feat, images.pids, images.modalities, metric=metric, upper=upper)

    def _gaps(self, split: str, variant: str, seed: int, feature: str) -> IdentityGaps:
        images = self.images(split, variant, seed, feature)
        return analysis.identity_gaps(images.feat, images.pids, images.modalities)

    def _plane(self, split: str, variant: str, seed: int, feature: str, metric: Metric) -> Plane:
        return analysis.principal_plane(self.images(split, variant, seed, feature).feat, metric)

    # -------------------- choices

    def sides(self, split: str, variant: str, seed: int, feature: str, setting: str) -> tuple[Images, Images]:
        """Queries and gallery of a setting; of several random galleries the first."""
        images, galleries = self.images(split, variant, seed, feature), self.store(split).galleries
        query, gallery = (images.of_modality(side) for side in self.protocol(split).sides[setting])
        if setting in galleries:
            gallery = gallery[np.searchsorted(gallery.rows, np.sort(galleries[setting][0]))]
        return query, gallery

    def queries(self, split: str, setting: str, seed: int) -> pd.DataFrame:
        """The manifest's lines of all queries of a setting."""
        query, _ = self.sides(split, self.runs[split, seed][0], seed, "after_bn", setting)
        return self.store(split).manifest.iloc[query.rows].sort_values(["pid", "row"])

    def choose(
        self, split: str, seed: int | None = None, variants: Sequence[str] = (), pid: int | None = None, **options: Any
    ) -> Choice:
        """A complete choice; what is left out is the first there is, of variants all. options: other fields of Choice.

        Raises StudyError for a run that does not exist and for an unknown name or identity.
        """
        settings = self.protocol(split).settings
        if seed is None:
            seed = next((number for name, number in self.runs if name == split), 0)
        if (split, seed) not in self.runs:
            raise StudyError(
                f"{split} has no finished run with seed {seed}; choose another, or make it with `make repro`"
            )
        there = self.runs[split, seed]
        first = {"feature": "after_bn", "metric": "cosine", "color": "modality", "setting": next(iter(settings))}
        given = {**first, **options}
        known: dict[str, Any] = {"feature": FEATURES, "metric": METRICS, "setting": settings, "color": COLORS}
        wishes = [(name, given[name], known[name]) for name in known] + [("variant", name, there) for name in variants]
        for what, value, values in wishes:
            if value not in values:
                raise StudyError(f"{what} {value!r} of {split}: there is only {', '.join(values)}; choose one of these")
        queries = self.queries(split, given["setting"], seed)
        pid = int(queries["pid"].iloc[0]) if pid is None else pid
        rows = queries.loc[queries["pid"] == pid, "row"].tolist()
        if not rows:
            raise StudyError(f"identity {pid} has no query in {given['setting']} of {split}; choose another")
        return Choice(split, seed, tuple(variants) or there, pid=pid, query=rows[0], **given)

    # -------------------- what is shown

    def title(self, what: str, choice: Choice) -> str:
        return figures.dataset_title(what, self.dataset(choice.split))

    def _each(self, method: Callable[..., Any], choice: Choice, *more: str) -> dict[str, Any]:
        """A result for each chosen variant, by its label."""
        return {self.label(v): method(choice.split, v, choice.seed, choice.feature, *more) for v in choice.variants}

    def table(self, choice: Choice) -> pd.DataFrame:
        """One row per variant: mean distances, d′ and overlap, share of identities with a gap above the nearest."""
        gaps = self._each(self.gaps, choice)
        rows: dict[str, dict[tuple[str, str], float]] = {}
        for label, one in self._each(self.distributions, choice, choice.metric).items():
            rows[label] = {("mean distance", words): one.kinds[kind].mean for kind, words in analysis.KINDS.items()}
            for words, pair in SEPARATIONS.items():
                found = one.separation(*pair)
                rows[label] |= {(words, "d′"): found.d_prime, (words, "overlap"): found.overlap}
            share = float(gaps[label].exceeds_nearest.all(axis=0).mean())
            rows[label]["modality gap > nearest identity", "share of identities"] = share
        return pd.DataFrame(rows).T

    def distances_figure(self, choice: Choice) -> StudyFigure:
        found = self._each(self.distributions, choice, choice.metric)
        return figures.distance_distributions(found, self.title("Distances between test features", choice))

    def plane_figure(self, choice: Choice) -> StudyFigure:
        """Test features on their principal plane, one panel per variant, common limits."""
        planes, gaps = self._each(self.plane, choice, choice.metric), self._each(self.gaps, choice)
        images = self.images(choice.split, choice.variants[0], choice.seed, choice.feature)
        limit = 1.05 * max(float(np.abs(plane.points).max()) for plane in planes.values()) or 1.0
        everyone = np.ones(len(images), bool)
        with figures.style():
            figure, axes = figures.panels(len(planes), columns=2, height=3.3)
            for axis, (label, plane) in zip(axes, planes.items(), strict=True):
                layers: list[Any] = [("", everyone, ("#0072B2", "#D55E00"), 2.0)]
                if choice.color == "identity":
                    near = gaps[label].neighbors[:, gaps[label].row(choice.pid)]
                    layers = [
                        ("other identities, ", everyone, ("#D0D0D0",) * 2, 1.5),
                        ("its nearest identities, ", np.isin(images.pids, near), ("#E69F00",) * 2, 4.0),
                        (f"identity {choice.pid}, ", images.pids == choice.pid, ("#0072B2",) * 2, 4.0),
                    ]
                for words, chosen, colors, size in layers:
                    for modality, marker in ((VISIBLE, "o"), (INFRARED, "^")):
                        points = plane.points[chosen & (images.modalities == modality)]
                        look: Any = {"color": colors[modality], "markersize": size, "markeredgewidth": 0, "alpha": 0.7}
                        axis.plot(*points.T, marker, label=words + MODALITIES[modality], **look)
                axis.set_title(f"{label}: {100 * plane.explained.sum():.0f} % of the variance")
                # No ticks: the coordinates have no meaning, and all panels have the same.
                axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
            title = self.title("Test features in two dimensions", choice)
            figures.finish(figure, title, "first principal component", "second principal component")
            for handle in figure.legends[0].legend_handles:
                handle.set(markersize=5, alpha=1)  # type: ignore[union-attr]
        return figure

    def gap_figure(self, choice: Choice) -> StudyFigure:
        """Modality gap of one identity: from its visible to its infrared center, against other identities' centers."""
        found = self._each(self.gaps, choice)
        lines = [f"{label}, {name}" for label in found for name in MODALITIES]
        with figures.style():
            figure, (axis,) = figures.panels(1, columns=1, height=0.62 * len(found) + 0.3, width=7.2)
            for number, gaps in enumerate(found.values()):
                row, y = gaps.row(choice.pid), np.array([2 * number, 2 * number + 1])
                others = np.delete(gaps.between[:, row], row, axis=1)  # (2, P - 1)
                name = "another identity, same modality"
                axis.plot(others.ravel(), np.repeat(y, others.shape[1]), "|", color="#D55E00", alpha=0.5, label=name)
                axis.plot(gaps.nearest[:, row], y, "D", color="#D55E00", markersize=5, label="nearest of these")
                for x, height, pid in zip(gaps.nearest[:, row], y, gaps.neighbors[:, row], strict=True):
                    axis.text(x, height + 0.2, str(pid), fontsize=7, ha="center", va="top")
                ends, name = [y[0] - 0.4, y[1] + 0.4], "same identity, other modality"
                axis.plot([gaps.cross[row]] * 2, ends, "--", color="#0072B2", label=name)
            axis.set_yticks(range(len(lines)), lines)
            axis.set(xlim=(0, None), ylim=(len(lines) - 0.3, -0.6))
            title = self.title(f"Modality gap of identity {choice.pid}", choice)
            return figures.finish(figure, title, "cosine distance between centers")

    def gallery(self, choice: Choice, variant: str) -> tuple[str, Tile, list[Tile]]:
        """Heading, query and the first `top` images of its gallery, then the nearest of those the protocol ignores."""
        query, gallery = self.sides(choice.split, variant, choice.seed, choice.feature, choice.setting)
        query, store = query[query.rows == choice.query], self.store(choice.split)
        protocol = self.protocol(choice.split)
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

    def ranked_figure(self, choice: Choice) -> StudyFigure:
        """The ranked gallery of the query for each variant."""
        rows = [row for variant in choice.variants for row in figures.ranked_rows(*self.gallery(choice, variant))]
        return figures.image_grid(rows, self.title("Ranked galleries", choice))

    def figures(self, choice: Choice) -> dict[str, StudyFigure]:
        """Every figure of the choice by name."""
        return {name: getattr(self, f"{name}_figure")(choice) for name in DEPENDS if name != "table"}


# -------------------- controls

_RUNS = ("split", "seed", "feature", "variants")
DEPENDS: Mapping[str, tuple[str, ...]] = {  # what each panel shows of a choice
    "table": (*_RUNS, "metric"),
    "distances": (*_RUNS, "metric"),
    "plane": (*_RUNS, "metric", "color"),
    "gap": (*_RUNS, "pid"),
    "ranked": (*_RUNS, "metric", "setting", "query", "top"),
}


class Explorer:
    """Controls and panels over the finished runs of a study: display `app`.

    Arguments after `root` are those of `Exploration.choose`. `choice` is None if such a run is missing: `app` then says
    what to run. An unknown name raises StudyError.
    """

    def __init__(self, study: Study, root: str | Path = ".", *, split: str, **first: Any) -> None:
        self.exploration = found = Exploration(study, root)
        self.choice: Choice | None = None
        if not any(name == split for name, _ in found.runs):
            found.dataset(split)  # an unknown data set is an error
            self.app: widgets.Widget = widgets.HTML(f"{split} has no finished run: `make repro` makes them")
            return
        wish = found.choose(split, **first)
        words = {
            **{"split": "split", "seed": "seed", "feature": "feature", "metric": "distance", "color": "colors"},
            **{"setting": "search", "pid": "identity", "top": "show first"},
        }
        self.controls: dict[str, Any] = {
            name: widgets.Dropdown(description=description, layout={"width": "auto"})
            for name, description in words.items()
        }
        self.controls["query"] = widgets.SelectionSlider(options=[0], description="query", continuous_update=False)
        known = [variant for variant in study.rows if any(variant in there for there in found.runs.values())]
        self.ticks = {
            v: widgets.Checkbox(v in wish.variants, description=found.label(v), indent=False, layout={"width": "auto"})
            for v in known
        }
        self.status = widgets.HTML()
        half = {"width": "49%", "min_width": "440px", "max_width": "640px"}  # two side by side where there is room
        self.panels: dict[str, Any] = {
            **{name: widgets.HTML() for name in ("table", "ranked")},
            **{name: widgets.Image(layout=half) for name in ("distances", "plane")},
            "gap": widgets.Image(layout={"max_width": "100%"}),
        }
        self._shown: dict[str, Any] = {}
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
            self._settle(wish or {})
            self._draw()
        except StudyError as error:
            self.status.value = f'<span style="color: #B00020">{html.escape(str(error))}</span>'
        finally:
            self._busy = False

    def _settle(self, wish: Mapping[str, Any]) -> None:
        """Give every control the options that those before it leave; its value stays if it still can."""
        found = self.exploration

        def fill(name: str, options: Mapping[Any, str]) -> Any:
            control = self.controls[name]
            value = wish.get(name, control.value)
            if control.options != (pairs := tuple((words, value) for value, words in options.items())):
                control.options = pairs
            control.value = value if value in options else next(iter(options))
            return control.value

        fill("feature", FEATURES)
        fill("metric", METRICS)
        fill("color", COLORS)
        fill("top", {n: str(n) for n in sorted({*TOPS, wish.get("top", TOPS[0])})})
        split = fill("split", {name: name for name, _ in found.runs})
        seed = fill("seed", {number: str(number) for name, number in found.runs if name == split})
        for variant, tick in self.ticks.items():
            tick.disabled = variant not in found.runs[split, seed]
            tick.value = tick.value and not tick.disabled
        setting = fill("setting", found.protocol(split).settings)
        queries = found.queries(split, setting, seed)
        pid = fill("pid", {pid: str(pid) for pid in queries["pid"].unique().tolist()})
        mine = queries[queries["pid"] == pid]
        fill("query", dict(zip(mine["row"].tolist(), mine["path"], strict=True)))

    def _draw(self) -> None:
        """Draw the panels whose part of the choice has changed."""
        variants = tuple(variant for variant, tick in self.ticks.items() if tick.value)
        if not variants:
            raise StudyError("no variant is chosen; tick at least one")
        found = self.exploration
        self.choice = choice = Choice(variants=variants, **{name: one.value for name, one in self.controls.items()})
        self.status.value = "computing …"
        for name, fields in DEPENDS.items():
            if name == "plane" and choice.color == "identity":
                fields = (*fields, "pid")
            key = [getattr(choice, field) for field in fields]
            if self._shown.get(name) == key:
                continue
            if name == "table":
                self.panels[name].value = found.table(choice).to_html(float_format="{:.3f}".format, border=0)
            elif name == "ranked":  # as HTML: drawing the figure takes longer than all other panels
                self.panels[name].value = "".join(_gallery_html(*found.gallery(choice, one)) for one in variants)
            else:
                self.panels[name].value = getattr(found, f"{name}_figure")(choice)._repr_png_()
            self._shown[name] = key
        words = f"features {FEATURES[choice.feature]}, last epoch"
        self.status.value = f"{words}; {figures.SYNTHETIC}" if found.dataset(choice.split).synthetic else words

    def figures(self) -> dict[str, StudyFigure]:
        """The figures of what is chosen now; none if there is no run."""
        return {} if self.choice is None else self.exploration.figures(self.choice)

    def save(self, folder: str | Path) -> list[Path]:
        """Write these figures to `folder` as PNG and PDF; nothing if `folder` is empty."""
        made = self.figures().items() if folder else ()
        return [path for name, figure in made for path in figures.save(figure, Path(folder) / name)]


def _gallery_html(heading: str, query: Tile, ranked: Sequence[Tile]) -> str:
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
