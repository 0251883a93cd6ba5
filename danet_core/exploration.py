"""Finished runs to look into, without controls: distances, claims, planes and rankings for a choice, and their figures.

The figures are those of plots.py and crops.py. Nothing here trains, scores or writes; explore.py puts controls beside.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Int
from PIL import Image

from danet_core import INFRARED, VISIBLE, distances, plots
from danet_core.config import Study
from danet_core.crops import RankedImage, ranked_list, ranked_picture
from danet_core.distances import Distributions, IdentityClaims, Metric, Plane
from danet_core.evaluate import Features
from danet_core.files import StudyError
from danet_core.protocols import SAME_PLACE, same_place
from danet_core.ranking import RankedGallery, rank_gallery
from danet_core.runs import read_training_record
from danet_core.scores import SETTINGS, run_name
from danet_core.store import PackedStore
from danet_core.style import StudyFigure

Feature = Literal["after_bn", "before_bn"]
Colour = Literal["modality", "identity"]
FEATURES: dict[Feature, str] = {"after_bn": "after the BN neck", "before_bn": "before the BN neck"}
METRICS: dict[Metric, str] = {"cosine": "cosine", "euclidean": "Euclidean"}
COLOURS = {"modality": "by modality", "identity": "by identity"}
IGNORED_SHOWN = 3  # of the images that the protocol takes out, the nearest

Value = TypeVar("Value")


class MissingRun(StudyError):
    """A run that is asked for has not been trained and evaluated yet."""


@dataclass(frozen=True)
class Choice:
    """What is looked at. `query` is a row of the packed store, `pid` its identity; the rest names runs and options."""

    dataset: str
    variants: tuple[str, ...]
    trial: int
    seed: int
    feature: Feature
    metric: Metric
    setting: str
    pid: int
    query: int
    top: int = 10
    colour: Colour = "modality"


_SEPARATIONS = {
    "same or different, other modality": (distances.SAME_CROSS, distances.DIFFERENT_CROSS),
    "same or different, same modality": (distances.SAME_WITHIN, distances.DIFFERENT_WITHIN),
}


class Exploration:
    """The finished runs below `root` of the variants in params.yaml, and their figures for a `Choice`.

    runs: {data set: {(trial, seed): variants that have test features}}, in the order of params.yaml. What is computed
    is kept, so that the second look at a run is quick. Features and images are read when they are first needed.
    """

    def __init__(self, study: Study, root: Path | str = ".") -> None:
        self.study, self.root = study, Path(root)
        self.runs = {name: found for name in study.datasets if (found := self._finished(name))}
        self._kept: dict[tuple[Any, ...], Any] = {}

    def _finished(self, dataset: str) -> dict[tuple[int, int], tuple[str, ...]]:
        found: dict[tuple[int, int], list[str]] = {}
        for variant in self.study.variants:
            for path in sorted(self.root.glob(f"runs/{dataset}/{variant}-t*-s*/features.npz")):
                if numbers := re.fullmatch(rf"{re.escape(variant)}-t(\d+)-s(\d+)", path.parent.name):
                    found.setdefault((int(numbers[1]), int(numbers[2])), []).append(variant)
        return {key: tuple(found[key]) for key in sorted(found)}

    def variants(self, dataset: str, trial: int, seed: int) -> tuple[str, ...]:
        """Variants with a finished run. Raises MissingRun when there is none, StudyError for an unknown data set."""
        self.study.dataset(dataset)
        if not (there := self.runs.get(dataset, {}).get((trial, seed), ())):
            known = ", ".join(f"{name} (trial {t}, seed {s})" for name, runs in self.runs.items() for t, s in runs)
            raise MissingRun(
                f"{dataset} has no finished run of trial {trial}, seed {seed}; there is: {known or 'none'}; "
                "`make repro` trains and evaluates the runs that params.yaml lists"
            )
        return there

    def label(self, variant: str) -> str:
        return self.study.variants[variant].label

    def features(self, dataset: str, variant: str, trial: int, seed: int) -> Features:
        """Test features of a run. Raises StudyError when they are damaged or were made of other data."""
        return self._keep(("features", dataset, variant, trial, seed), self._read, dataset, variant, trial, seed)

    def _read(self, dataset: str, variant: str, trial: int, seed: int) -> Features:
        path = self.root / "runs" / dataset / run_name(variant, trial, seed) / "features.npz"
        features = Features.load(path)
        store, trained = self.store(dataset), self.record(dataset, variant, trial, seed)["provenance"]["data_sha256"]
        if store.meta["content_sha256"] != trained:
            raise StudyError(
                f"{path}: expected features of the images in {store.root} ({store.meta['content_sha256'][:12]}), "
                f"found those of other images ({trained[:12]}); run `make repro`"
            )
        return features

    def record(self, dataset: str, variant: str, trial: int, seed: int) -> dict[str, Any]:
        """The training record of a run."""
        path = self.root / "runs" / dataset / run_name(variant, trial, seed) / "record.json"
        return self._keep(("record", path), read_training_record, path)

    def store(self, dataset: str) -> PackedStore:
        """The packed images. Their hash is compared with the runs', and not computed again, which takes seconds."""
        return self._keep(("store", dataset), self._open, dataset)

    def _open(self, dataset: str) -> PackedStore:
        return PackedStore.open(self.root / "data" / "packed" / dataset, verify=False)

    def epoch(self, choice: Choice) -> str:
        """Which epoch the features are of, in words. Only the last one of a run is kept."""
        records = [self.record(choice.dataset, one, choice.trial, choice.seed) for one in choice.variants]
        last = sorted({record["history"][-1]["epoch"] for record in records})
        return " and ".join(f"epoch {epoch} of {epoch}" for epoch in last) + ", the only one kept"

    def sides(self, dataset: str, setting: str, trial: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions among the test features of all queries of a setting, and of its gallery.

        SYSU-MM01's layout: infrared queries, and the first of the ten galleries. RegDB's: one modality each.
        Raises StudyError for a setting that the layout lacks.
        """
        layout = self.study.dataset(dataset).layout
        if setting not in SETTINGS[layout]:
            raise StudyError(f"setting {setting!r} of {dataset}: expected one of {', '.join(SETTINGS[layout])}")
        features = self.features(dataset, self.variants(dataset, trial, seed)[0], trial, seed)
        if layout == "sysu":
            gallery = np.searchsorted(features.rows, self.store(dataset).galleries[setting][0])
            return np.flatnonzero(features.modalities == INFRARED), gallery
        query = INFRARED if setting == "thermal_to_visible" else VISIBLE
        return np.flatnonzero(features.modalities == query), np.flatnonzero(features.modalities != query)

    def pids(self, dataset: str, setting: str, trial: int, seed: int) -> Int[np.ndarray, " P"]:
        """Identities that a query of the setting shows, ascending."""
        features = self.features(dataset, self.variants(dataset, trial, seed)[0], trial, seed)
        return np.unique(features.pids[self.sides(dataset, setting, trial, seed)[0]])

    def queries(self, dataset: str, setting: str, trial: int, seed: int, pid: int) -> dict[int, str]:
        """The queries of an identity: row in the store -> path in the manifest."""
        features = self.features(dataset, self.variants(dataset, trial, seed)[0], trial, seed)
        queries = self.sides(dataset, setting, trial, seed)[0]
        rows = features.rows[queries[features.pids[queries] == pid]]
        return dict(zip(rows.tolist(), self.store(dataset).manifest["path"].iloc[rows], strict=True))

    def distributions(self, choice: Choice) -> dict[str, Distributions]:
        """The four distance distributions by variant label, over common bins whatever is chosen."""
        return {
            self.label(variant): self._keep(
                self._pairs_key(choice, variant), self._pairs, choice, variant, self._upper(choice)
            )
            for variant in choice.variants
        }

    def pending(self, choice: Choice) -> list[str]:
        """Labels of the chosen variants whose distances are not computed yet, which takes a moment."""
        return [self.label(v) for v in choice.variants if self._pairs_key(choice, v) not in self._kept]

    def _pairs_key(self, choice: Choice, variant: str) -> tuple[Any, ...]:
        return ("pairs", choice.dataset, variant, choice.trial, choice.seed, choice.feature, choice.metric)

    def _pairs(self, choice: Choice, variant: str, upper: float) -> Distributions:
        features = self._features(choice, variant)
        feat = features.retrieval(choice.feature)
        return distances.distance_distributions(
            feat, features.pids, features.modalities, metric=choice.metric, upper=upper
        )

    def _upper(self, choice: Choice) -> float:
        """The largest distance possible in any variant of this trial and seed: one set of bins for all of them."""
        if choice.metric == "cosine":
            return 2.0
        key = ("upper", choice.dataset, choice.trial, choice.seed, choice.feature)
        return self._keep(key, self._longest, choice)

    def _longest(self, choice: Choice) -> float:
        variants = self.variants(choice.dataset, choice.trial, choice.seed)
        feats = [self._features(choice, variant).retrieval(choice.feature) for variant in variants]
        return 2.0 * max(float(np.linalg.norm(feat, axis=1).max()) for feat in feats) or 1.0

    def claims(self, choice: Choice) -> dict[str, IdentityClaims]:
        """Figure 1's claim for every identity, by variant label; always cosine distance."""

        def compute(variant: str) -> IdentityClaims:
            features = self._features(choice, variant)
            return distances.identity_claims(features.retrieval(choice.feature), features.pids, features.modalities)

        key = ("claims", choice.dataset, choice.trial, choice.seed, choice.feature)
        return {self.label(variant): self._keep((*key, variant), compute, variant) for variant in choice.variants}

    def planes(self, choice: Choice) -> dict[str, Plane]:
        """Test features in two dimensions, by variant label."""

        def compute(variant: str) -> Plane:
            feat = self._features(choice, variant).retrieval(choice.feature)
            return distances.principal_plane(feat, choice.metric)

        key = ("plane", choice.dataset, choice.trial, choice.seed, choice.feature, choice.metric)
        return {self.label(variant): self._keep((*key, variant), compute, variant) for variant in choice.variants}

    def prepare(self, choice: Choice, go_on: Callable[[], bool] = lambda: True) -> None:
        """Compute what any other feature, metric or variant of the same trial and seed would ask for, and keep it.

        `go_on` is asked before each of them, half a second apart on some thousand images.
        """
        variants = self.variants(choice.dataset, choice.trial, choice.seed)
        for feature, metric, variant in itertools.product(FEATURES, METRICS, variants):
            if not go_on():
                return
            other = dataclasses.replace(choice, variants=(variant,), feature=feature, metric=metric)
            self.distributions(other), self.planes(other), self.claims(other)

    def ranking(self, choice: Choice, variant: str) -> RankedGallery:
        """The chosen query's gallery as a variant ranks it; `order` and `ignored` are rows of the store.

        Raises StudyError when `query` is no query of the setting.
        """
        features = self._features(choice, variant)
        queries, gallery = self.sides(choice.dataset, choice.setting, choice.trial, choice.seed)
        query = queries[features.rows[queries] == choice.query]
        if len(query) == 0:
            raise StudyError(
                f"row {choice.query} of {choice.dataset} is no query of {choice.setting}, trial {choice.trial}; "
                "choose one of Exploration.queries"
            )
        feat = features.retrieval(choice.feature)
        gaps = distances.distance_matrix(feat[query], feat[gallery], choice.metric)[0]
        ignore = same_place(features.camids[query], features.camids[gallery])[0]
        ranked = rank_gallery(gaps, int(features.pids[query[0]]), features.pids[gallery], ignore)
        rows = features.rows[gallery]
        return dataclasses.replace(ranked, order=rows[ranked.order], ignored=rows[ranked.ignored])

    def choose(
        self,
        dataset: str,
        *,
        variants: Sequence[str] = (),
        trial: int | None = None,
        seed: int | None = None,
        feature: Feature = "after_bn",
        metric: Metric = "cosine",
        setting: str = "",
        pid: int | None = None,
        top: int = 10,
        colour: Colour = "modality",
    ) -> Choice:
        """A complete choice from a part of one: what is left out is the first there is, of variants all of them.

        Raises MissingRun for a run that is not there, StudyError for an unknown name, identity or option.
        """
        for what, value, known in (
            ("feature", feature, FEATURES),
            ("metric", metric, METRICS),
            ("colour", colour, COLOURS),
        ):
            if value not in known:
                raise StudyError(f"{what} {value!r}: expected one of {', '.join(known)}")
        if top < 1:
            raise StudyError(f"top: expected at least one image of a ranked list, found {top}")
        layout = self.study.dataset(dataset).layout
        runs = [run for run in self.runs.get(dataset, {}) if run[0] == (trial or run[0])]
        trial = runs[0][0] if trial is None and runs else trial or 1
        seed = runs[0][1] if seed is None and runs else seed or 0
        there = self.variants(dataset, trial, seed)
        for variant in variants:
            self.study.run(dataset, variant, trial, seed)  # an unknown name says which are known
            if variant not in there:
                raise MissingRun(
                    f"{dataset}, trial {trial}, seed {seed}, has no finished run of {variant}; there is: "
                    f"{', '.join(there)}; `make repro` trains and evaluates the runs that params.yaml lists"
                )
        setting = setting or next(iter(SETTINGS[layout]))
        pids = self.pids(dataset, setting, trial, seed).tolist()
        if pid is not None and pid not in pids:
            raise StudyError(f"identity {pid} has no query in {setting} of {dataset}; expected one of {pids}")
        pid = pids[0] if pid is None else pid
        query = next(iter(self.queries(dataset, setting, trial, seed, pid)))
        return Choice(dataset, tuple(variants) or there, trial, seed, feature, metric, setting, pid, query, top, colour)

    # -------------------- what is shown

    def figures(self, choice: Choice) -> dict[str, StudyFigure]:
        """Every figure of the choice by its name, the ranked galleries as `ranked_<variant>`."""
        return {
            "distances": self.distributions_figure(choice),
            "projection": self.projection_figure(choice),
            "claim": self.claim_figure(choice),
            **{f"ranked_{variant}": self.ranked_figure(choice, variant) for variant in choice.variants},
        }

    def table(self, choice: Choice) -> pd.DataFrame:
        """One row per variant: means of the distributions, d' and overlap of the pairs that matter, Figure 1's share.

        The share is a fraction of the identities for which the claim holds from both sides, in cosine distance.
        """
        rows = {}
        claims = self.claims(choice)
        for name, one in self.distributions(choice).items():
            row: dict[tuple[str, str], float] = {
                ("mean distance", words): one.kinds[kind].mean for kind, words in distances.KINDS.items()
            }
            for words, pair in _SEPARATIONS.items():
                separation = one.separation(*pair)
                row[words, "d′"], row[words, "overlap"] = separation.d_prime, separation.overlap
            holds = claims[name].holds_visible & claims[name].holds_infrared
            rows[name] = {**row, ("Figure 1's claim", "share of identities"): float(holds.mean())}
        return pd.DataFrame({label: pd.Series(row) for label, row in rows.items()}).T

    def distributions_figure(self, choice: Choice, onto: StudyFigure | None = None) -> StudyFigure:
        claims = self.claims(choice).items()
        shares = {name: float((one.holds_visible & one.holds_infrared).mean()) for name, one in claims}
        return plots.distance_distributions(self.distributions(choice), shares=shares, onto=onto, **self._named(choice))

    def claim_figure(self, choice: Choice, onto: StudyFigure | None = None) -> StudyFigure:
        return plots.identity_claim(self.claims(choice), choice.pid, onto=onto, **self._named(choice))

    def projection_figure(self, choice: Choice, onto: StudyFigure | None = None) -> StudyFigure:
        features = self._features(choice, choice.variants[0])
        by_identity: dict[str, Any] = {"pid": choice.pid, "claims": self.claims(choice)}
        return plots.projection(
            self.planes(choice),
            features.pids,
            features.modalities,
            **(by_identity if choice.colour == "identity" else {}),
            onto=onto,
            **self._named(choice),
        )

    def ranked_figure(self, choice: Choice, variant: str) -> StudyFigure:
        """The chosen query, the first `top` of its gallery, and the nearest of what the protocol ignores."""
        query, images, title = self._ranked(choice, variant)
        return ranked_list(query, images, title=title)

    def ranked_picture(self, choice: Choice, variant: str) -> Image.Image:
        """`ranked_figure` in pixels, for the screen."""
        query, images, title = self._ranked(choice, variant)
        return ranked_picture(query, images, title=title)

    def _ranked(self, choice: Choice, variant: str) -> tuple[RankedImage, list[RankedImage], str]:
        ranked = self.ranking(choice, variant)
        gaps = ranked.distances.tolist()
        images = [
            self._crop(choice, row, gap, "right" if right else "wrong")
            for row, gap, right in zip(ranked.order[: choice.top].tolist(), gaps, ranked.right, strict=False)
        ]
        features = self._features(choice, variant)
        feat = features.retrieval(choice.feature)
        at = np.searchsorted(features.rows, [choice.query, *ranked.ignored[:IGNORED_SHOWN]])
        apart = distances.distance_matrix(feat[at[:1]], feat[at[1:]], choice.metric)[0]
        images += [
            self._crop(choice, row, gap, "ignored") for row, gap in zip(ranked.ignored.tolist(), apart, strict=False)
        ]
        query = self._crop(choice, choice.query, None, None)
        return query, images, self._ranked_title(choice, variant, ranked)

    def _ranked_title(self, choice: Choice, variant: str, ranked: RankedGallery) -> str:
        layout = self.study.dataset(choice.dataset).layout
        found = "no image of this identity is in the gallery"
        if len(ranked.match_ranks):
            found = f"AP {100 * ranked.average_precision:.1f} %, first right image at rank {ranked.match_ranks[0]}"
        setting = SETTINGS[layout][choice.setting] + (", first gallery" if layout == "sysu" else "")
        lines = [
            f"{self.label(variant)}: identity {choice.pid} among {len(ranked.order)} images ({setting}); {found}",
        ]
        if len(ranked.ignored):
            lines.append(
                f"{len(ranked.ignored)} images of camera {SAME_PLACE[1]} are ignored: it looks at the same room as the "
                f"query's camera {SAME_PLACE[0]}"
            )
        if self._named(choice)["synthetic"]:
            lines.append("synthetic: rendered pedestrians, not comparable with the paper")
        return "\n".join(lines)

    def _crop(self, choice: Choice, row: int, gap: float | None, mark: Any) -> RankedImage:
        store = self.store(choice.dataset)
        return RankedImage(store.manifest["path"].iloc[row], store.images[row].transpose(1, 2, 0), gap, mark)

    def _named(self, choice: Choice) -> dict[str, Any]:
        row = self.study.dataset(choice.dataset)
        return {"title": row.title, "synthetic": row.synthetic}

    def _features(self, choice: Choice, variant: str) -> Features:
        return self.features(choice.dataset, variant, choice.trial, choice.seed)

    def _keep(self, key: tuple[Any, ...], make: Callable[..., Value], *arguments: Any) -> Value:
        if key not in self._kept:
            self._kept[key] = make(*arguments)
        return self._kept[key]
