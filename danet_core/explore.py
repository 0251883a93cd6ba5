"""Controls for what exploration.py computes: what notebook 06 shows. A control draws again only what it touches."""

from __future__ import annotations

import contextlib
import gc
import html
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from danet_core.config import Study
from danet_core.exploration import COLOURS, FEATURES, METRICS, Choice, Exploration, MissingRun
from danet_core.files import StudyError
from danet_core.scores import SETTINGS
from danet_core.style import StudyFigure, save, style

TOPS = (5, 10, 20, 30)  # images of a ranked list
KEPT = 200  # pictures and tables, about a tenth of a megabyte each

# The parts of a choice that panels depend on; one is drawn again when its part changes.
_RUNS = ("dataset", "trial", "seed", "feature")
_PAIRS = (*_RUNS, "variants", "metric")
_WIDE = widgets.Layout(width="auto", max_width="100%")
_HALF = widgets.Layout(width="49%", min_width="440px", max_width="640px")  # two side by side where there is room


class Explorer:
    """Controls and panels over the finished runs of a study: `app` is the widget to show.

    Arguments after `root` are those of `Exploration.choose` and say what is chosen first. `choice` is what is chosen
    now, None where such a run is missing: `app` then says what to run. `preparing` holds, by data set, trial and seed,
    the thread that computes ahead. An unknown name raises StudyError.
    """

    def __init__(self, study: Study, root: Path | str = ".", *, dataset: str, **first: Any) -> None:
        self.exploration = Exploration(study, root)
        self.choice: Choice | None = None
        try:
            choice = self.exploration.choose(dataset, **first)
        except MissingRun as error:
            self.app: widgets.Widget = widgets.HTML(html.escape(str(error)))
            return
        self.preparing: dict[tuple[str, int, int], threading.Thread] = {}
        self._answers = False
        self._shown: dict[str, tuple[Any, ...]] = {}
        self._drawn: dict[tuple[Any, ...], bytes | str] = {}
        self._figures: dict[tuple[Any, ...], StudyFigure] = {}
        gc.freeze()  # torch's objects outlive every figure; searching them for garbage took half a second at a time
        self._make_controls(choice)
        self.status = widgets.HTML()
        self.table = widgets.HTML()
        self.distances, self.projection = (widgets.Image(format="png", layout=_HALF) for _ in range(2))
        self.claim = widgets.Image(format="png", layout=_WIDE)
        self.ranked: dict[str, widgets.Image] = {}
        narrow = widgets.Layout(align_items="flex-start")  # pictures are shrunk to fit and never blown up
        self._galleries = widgets.VBox(layout=narrow)
        wrapped = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        self.app = widgets.VBox(
            [
                widgets.Box([self.dataset, self.trial, self.seed, self.feature, self.metric], layout=wrapped),
                widgets.Box([widgets.Label("variants"), *self.variants.values()], layout=wrapped),
                self.status,
                widgets.Box([self.distances, self.projection], layout=wrapped),
                widgets.Box([self.colour], layout=wrapped),
                self.table,
                widgets.Box([self.setting, self.identity], layout=wrapped),
                self.claim,
                widgets.Box([self.query_number, self.query, self.top], layout=wrapped),
                self._galleries,
            ],
            layout=narrow,
        )
        with self._answering():
            self._settle(choice)
            for control in self.controls:
                control.observe(self._changed, "value")
            self._refresh()
            self._prepare()

    def _make_controls(self, choice: Choice) -> None:
        runs = self.exploration.runs
        known = {one for there in runs.values() for names in there.values() for one in names}
        self.dataset = _dropdown("data set", {name: name for name in runs}, choice.dataset)
        self.trial, self.seed = _dropdown("trial"), _dropdown("seed")
        self.feature = _dropdown("feature", FEATURES, choice.feature)
        self.metric = _dropdown("distance", METRICS, choice.metric)
        self.variants = {
            name: widgets.Checkbox(
                value=name in choice.variants,
                description=self.exploration.label(name),
                indent=False,
                layout=widgets.Layout(width="auto", margin="2px 12px"),
            )
            for name in self.exploration.study.variants
            if name in known
        }
        self.setting, self.identity = _dropdown("search"), _dropdown("identity")
        self.query_number = widgets.IntSlider(value=1, min=1, max=1, description="query", continuous_update=False)
        self.query = _dropdown("image")
        tops = sorted({*TOPS, choice.top})
        self.top = _dropdown("show first", {number: str(number) for number in tops}, choice.top)
        self.colour = _dropdown("colours", COLOURS, choice.colour)
        self.controls = (
            *(self.dataset, self.trial, self.seed, self.feature, self.metric, self.setting, self.identity),
            *(self.query_number, self.query, self.top, self.colour, *self.variants.values()),
        )

    def _settle(self, wish: Choice | None = None) -> None:
        """Give every control the options that those before it leave; its value stays where it still can be."""
        runs = self.exploration.runs[self.dataset.value]
        layout = self.exploration.study.dataset(self.dataset.value).layout
        _fill(self.trial, {t: str(t) for t, _ in runs}, wish and wish.trial)
        _fill(self.seed, {s: str(s) for t, s in runs if t == self.trial.value}, wish and wish.seed)
        there = runs[self.trial.value, self.seed.value]
        for name, box in self.variants.items():
            box.disabled = name not in there
            box.value = box.value and name in there
        _fill(self.setting, SETTINGS[layout], wish and wish.setting)
        where = self.dataset.value, self.setting.value, self.trial.value, self.seed.value
        _fill(self.identity, {int(pid): str(pid) for pid in self.exploration.pids(*where)}, wish and wish.pid)
        _fill(self.query, self.exploration.queries(*where, self.identity.value), wish and wish.query)
        self.query_number.max = len(self.query.options)
        self.query_number.value = self.query.index + 1

    def _changed(self, change: Any) -> None:
        if self._answers:  # a control that `_settle` moved
            return
        with self._answering():
            if change["owner"] is self.query_number:
                self.query.index = self.query_number.value - 1
            self._settle()
            self._refresh()
            self._prepare()

    def _prepare(self) -> None:
        """Begin to compute, beside the controls, what the next look at this trial and seed may ask for."""
        assert self.choice is not None
        run = self.choice.dataset, self.choice.trial, self.choice.seed
        if run not in self.preparing:
            self.preparing[run] = threading.Thread(target=self._compute, args=(self.choice,))
            self.preparing[run].start()

    def _compute(self, choice: Choice) -> None:
        with contextlib.suppress(StudyError):  # which is said when the damaged run itself is looked at
            self.exploration.prepare(choice, go_on=threading.main_thread().is_alive)  # no kernel waits for it to end

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """While controls move each other none asks for pictures; what goes wrong is said above the pictures."""
        self._answers = True
        try:
            yield
        except StudyError as error:
            self.status.value = f'<span style="color: #B00020">{html.escape(str(error))}</span>'
        finally:
            self._answers = False

    def _refresh(self) -> None:
        """Draw the panels whose part of the choice has changed."""
        chosen = tuple(name for name, box in self.variants.items() if box.value)
        if not chosen:
            raise StudyError("no variant is chosen; tick at least one")
        self.choice = choice = Choice(
            dataset=self.dataset.value,
            variants=chosen,
            trial=self.trial.value,
            seed=self.seed.value,
            feature=self.feature.value,
            metric=self.metric.value,
            setting=self.setting.value,
            pid=self.identity.value,
            query=self.query.value,
            top=self.top.value,
            colour=self.colour.value,
        )
        exploration = self.exploration
        if pending := exploration.pending(choice):
            self.status.value = f"Computing the distances of {html.escape(', '.join(pending))} …"
        self._draw(self.table, "table", _PAIRS, lambda: _as_html(exploration.table(choice)))
        colour = ("colour", "pid") if choice.colour == "identity" else ("colour",)
        for picture, panel, fields, figure in (
            (self.distances, "distances", _PAIRS, exploration.distributions_figure),
            (self.projection, "projection", (*_PAIRS, *colour), exploration.projection_figure),
            (self.claim, "claim", (*_RUNS, "variants", "pid"), exploration.claim_figure),
        ):
            self._draw(picture, panel, fields, partial(self._png, figure, panel))
        for variant in chosen:
            picture = self.ranked.setdefault(variant, widgets.Image(format="png", layout=_WIDE))
            fields = (*_RUNS, "metric", "setting", "query", "top")
            self._draw(picture, variant, fields, partial(self._gallery, variant))
        self._galleries.children = [self.ranked[variant] for variant in chosen]
        self.status.value = html.escape(f"{FEATURES[choice.feature]}: {exploration.epoch(choice)}")

    def _draw(self, widget: Any, panel: str, fields: Sequence[str], make: Callable[[], bytes | str]) -> None:
        """Show a panel for the choice as far as these fields of it go, unless it is shown; what was drawn is kept."""
        key = (panel, *(getattr(self.choice, field) for field in fields))
        if self._shown.get(panel) == key:
            return
        if key not in self._drawn:
            self._drawn[key] = make()
            if len(self._drawn) > KEPT:
                self._drawn.pop(next(iter(self._drawn)))  # the oldest
        widget.value, self._shown[panel] = self._drawn[key], key

    def _gallery(self, variant: str) -> bytes:
        assert self.choice is not None
        return encoded(self.exploration.ranked_picture(self.choice, variant))

    def _png(self, make: Callable[..., StudyFigure], panel: str) -> bytes:
        """A panel's picture, drawn onto its earlier figure where that was laid out alike."""
        assert self.choice is not None
        key = panel, len(self.choice.variants), self.choice.metric, self.choice.colour
        self._figures[key] = figure = make(self.choice, onto=self._figures.get(key))
        return png(figure)

    def forget(self) -> None:
        """Forget the pictures that were drawn, though not what they were drawn from."""
        self._drawn.clear()

    def figures(self) -> dict[str, StudyFigure]:
        """`Exploration.figures` of what is chosen now; none where there is no run."""
        return {} if self.choice is None else self.exploration.figures(self.choice)

    def save(self, folder: Path | str) -> list[Path]:
        """Write these figures below `folder` as PNG and PDF and return the paths; nothing where no folder is named."""
        return (
            [path for name, figure in self.figures().items() for path in save(figure, Path(folder) / name)]
            if folder
            else []
        )


def png(figure: StudyFigure, dpi: int = 84) -> bytes:
    """A figure as PNG for the screen. It is laid out once and stays so, which takes as long as drawing does."""
    with style(), matplotlib.rc_context({"text.hinting": "none"}):  # which a third of the time would go into
        figure.set_dpi(dpi)
        if layout := figure.get_layout_engine():
            layout.execute(figure)
            figure.set_layout_engine("none")  # or drawing would lay it out again, after a draw that shows nothing
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return encoded(Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3]))


def encoded(picture: Image.Image) -> bytes:
    """A picture as PNG, quickly made rather than small."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _dropdown(description: str, options: Mapping[Any, str] | None = None, value: Any = None) -> widgets.Dropdown:
    control = widgets.Dropdown(description=description, layout=widgets.Layout(width="auto"))
    _fill(control, options or {}, value)
    return control


def _fill(control: widgets.Dropdown, options: Mapping[Any, str], wish: Any) -> None:
    """Offer `options` (value -> words), choosing `wish`, or else what was chosen, or else the first of them."""
    kept = control.value if wish is None else wish
    pairs = tuple((words, value) for value, words in options.items())
    if control.options != pairs:
        control.options = pairs
    if kept in options:
        control.value = kept


def _as_html(table: pd.DataFrame) -> str:
    whole = table.rename(index=lambda label: label.replace(" ", "\u00a0"))  # labels are not broken, headings are
    return whole.to_html(float_format="{:.3f}".format, border=0)
