"""params.yaml as frozen dataclasses: every number of the study has a name and a type, and unknown keys are errors.

`load_study` reads the file; `Study.run` picks one run (data set, variant, trial, seed) out of it. Nothing here has a
default value: a number that is not in params.yaml does not exist.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from danet_core.files import StudyError

Precision = Literal["float32", "tf32", "bfloat16", "float16"]  # precision.py says what they are
BatchNorm = Literal["global", "per_process"]  # Team.network in parallel.py says what they do
Streams = Literal["one", "two", "zero_padding"]  # how images enter the network; backbone.py says what they are
Pooling = Literal["average", "max", "gem"]  # model.pool says what they are


class ConfigError(StudyError):
    """params.yaml, or a name looked up in it, is not what the study expects."""


@dataclasses.dataclass(frozen=True)
class CrossModalityCenter:
    """CC, Eq. 3, or Eq. 1 or Eq. 2 in its place, and its weight in Eq. 6.

    `negatives` and `center_gradient` are readings of Eq. 3; Eq. 1 and Eq. 2 have no centre.
    """

    lambda_1: float
    margin: float
    equation: Literal[1, 2, 3]
    negatives: Literal["anchor", "center"]
    features: Literal["before_bn", "after_bn", "normalised"]
    center_gradient: bool

    def __post_init__(self) -> None:
        _require(self.lambda_1 > 0, "lambda_1", self.lambda_1, "a weight above 0 (a variant without CC has `cc: null`)")
        _require(self.margin >= 0, "margin", self.margin, "a distance of at least 0")


@dataclasses.dataclass(frozen=True)
class MutualLearning:
    """ML, Eq. 4 and Eq. 5, and their weights in the total loss; a lambda_2 of 0 is Eq. 4 alone."""

    lambda_2: float
    lambda_sid: float
    gradient: Literal["both", "own", "foreign"]
    direction: Literal["foreign_own", "own_foreign"]
    foreign_average: float

    def __post_init__(self) -> None:
        _require(self.lambda_2 >= 0, "lambda_2", self.lambda_2, "a weight of at least 0")
        _require(
            self.lambda_sid > 0,
            "lambda_sid",
            self.lambda_sid,
            "a weight above 0: without L_sid C_v and C_r stay untrained",
        )
        average = self.foreign_average
        _require(0 <= average < 1, "foreign_average", average, "a momentum from 0 (no average) to below 1")
        taught = average == 0 or self.gradient != "foreign"
        _require(taught, "gradient", self.gradient, "both or own: an averaged foreign classifier is fixed")
        _require(average == 0 or self.lambda_2 > 0, "foreign_average", average, "0 where lambda_2 is 0, L_M left out")


@dataclasses.dataclass(frozen=True)
class Modules:
    """The paper's two contributions; the variants refer to them."""

    cc: CrossModalityCenter
    ml: MutualLearning


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of Table 3, or one of the base methods of Table 1."""

    label: str
    cc: CrossModalityCenter | None
    ml: MutualLearning | None
    epochs_factor: int
    streams: Streams

    def __post_init__(self) -> None:
        _require(self.epochs_factor >= 1, "epochs_factor", self.epochs_factor, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class Augment:
    """Flip, padding with a random crop, random erasing and normalisation of a batch."""

    flip: float
    erase: float
    erase_area: tuple[float, float]
    erase_ratio: tuple[float, float]
    pad_crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, value, "a probability from 0 to 1")
        low, high = self.erase_area
        _require(0 < low <= high < 1, "erase_area", self.erase_area, "two shares of the image, 0 < low <= high < 1")
        low, high = self.erase_ratio
        _require(0 < low <= high, "erase_ratio", self.erase_ratio, "two ratios, 0 < low <= high")
        _require(self.pad_crop >= 0, "pad_crop", self.pad_crop, "a whole number of pixels of at least 0")
        _require(min(self.std) > 0, "std", self.std, "three numbers above 0")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: the same code for the paper's numbers and for the embedded ones."""

    backbone: str
    width: int
    weights: Literal["imagenet", "rendered"]
    ids_per_batch: int
    imgs_per_modality: int
    epochs: int
    steps_per_epoch: int
    lr: float
    weight_decay: float
    milestones: tuple[int, ...]
    decay: float
    augment: Augment
    test_feature: Literal["before_bn", "after_bn"]
    pooling: Pooling
    gem_exponent: float
    precision: Precision
    channels_last: bool
    compile: bool
    batch_norm: BatchNorm

    def __post_init__(self) -> None:
        for name in ("width", "imgs_per_modality", "epochs", "steps_per_epoch"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "a whole number of at least 1")
        _require(
            self.ids_per_batch >= 2,
            "ids_per_batch",
            self.ids_per_batch,
            "at least 2 identities, else no loss has a negative",
        )
        _require(self.gem_exponent >= 1, "gem_exponent", self.gem_exponent, "an exponent of at least 1, the average")
        _require(self.lr > 0, "lr", self.lr, "a learning rate above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        _require(0 < self.decay <= 1, "decay", self.decay, "a factor above 0 and at most 1")
        ascending = list(self.milestones) == sorted(set(self.milestones))
        _require(
            ascending and all(0 < epoch < self.epochs for epoch in self.milestones),
            "milestones",
            self.milestones,
            f"ascending epochs below epochs = {self.epochs}",
        )


@dataclasses.dataclass(frozen=True)
class Image:
    """Size of a packed image in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            _require(value >= 16, name, value, "at least 16 pixels")


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Rendered images per identity and camera, by split."""

    train: int
    val: int
    test: int

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 image")


@dataclasses.dataclass(frozen=True)
class RenderSysu:
    """A rendered data set in SYSU-MM01's layout."""

    seed: int
    train_ids: int
    val_ids: int
    test_ids: int
    images: SplitCounts
    absent: float
    near_infrared_follows: float
    height: int

    def __post_init__(self) -> None:
        _require(0 <= self.absent < 0.5, "absent", self.absent, "a share from 0 to below 0.5")
        share = self.near_infrared_follows
        _require(0 <= share <= 1, "near_infrared_follows", share, "a share from 0 to 1")
        for name in ("train_ids", "val_ids", "test_ids"):
            _require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2 identities")
        _require_drawable(self.seed, self.height)


@dataclasses.dataclass(frozen=True)
class RenderRegdb:
    """A rendered data set in RegDB's layout."""

    seed: int
    ids: int
    images: int

    def __post_init__(self) -> None:
        _require(self.ids >= 4 and self.ids % 2 == 0, "ids", self.ids, "an even number of at least 4")
        _require_drawable(self.seed)


@dataclasses.dataclass(frozen=True)
class RenderPretraining:
    """Visible crops of identities that are in no other split."""

    seed: int
    ids: int
    images: int
    height: int

    def __post_init__(self) -> None:
        _require(self.ids >= 2, "ids", self.ids, "at least 2 identities")
        _require(self.images >= 1, "images", self.images, "at least 1 image")
        _require_drawable(self.seed, self.height)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set: where its images are, how they are packed and how it is trained on."""

    name: str
    title: str
    layout: Literal["sysu", "regdb"]
    root: str
    image: Image
    train_splits: tuple[Literal["train", "val"], ...]
    allow_partial: bool
    recipe: Recipe
    render: RenderSysu | RenderRegdb | None

    def __post_init__(self) -> None:
        _require(len(self.train_splits) > 0, "train_splits", self.train_splits, "at least one of train, val")
        fits = self.render is None or isinstance(self.render, RenderSysu) == (self.layout == "sysu")
        _require(fits, "render", type(self.render).__name__, f"the keys of a rendering in the layout {self.layout}")

    @property
    def synthetic(self) -> bool:
        """Whether the images are rendered, so that no figure may be compared with the paper's."""
        return self.render is not None

    def raw_root(self) -> Path:
        """Folder of the raw images: SYSU_MM01_ROOT or REGDB_ROOT for the real sets where set, else `root`."""
        variable = {"sysu": "SYSU_MM01_ROOT", "regdb": "REGDB_ROOT"}[self.layout]
        return Path(os.environ.get(variable, self.root)) if not self.synthetic else Path(self.root)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Classification on rendered visible crops, the embedded stand-in for ImageNet."""

    render: RenderPretraining
    batch_size: int
    steps: int
    lr: float
    weight_decay: float
    augment: Augment
    seed: int

    def __post_init__(self) -> None:
        crops = self.render.ids * self.render.images
        _require(2 <= self.batch_size <= crops, "batch_size", self.batch_size, f"2 to the number of crops, {crops}")
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.lr > 0, "lr", self.lr, "a learning rate above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        _require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values of the recipe that the tuning tries, each with each."""

    lr: tuple[float, ...]
    steps_per_epoch: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the embedded recipe was chosen: the Baseline on the validation identities of one data set."""

    dataset: str
    seeds: tuple[int, ...]
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Rerank:
    """k-reciprocal re-ranking; rerank.py says what the numbers do."""

    k1: int
    k2: int
    lambda_value: float

    def __post_init__(self) -> None:
        _require(self.k1 >= 1, "k1", self.k1, "at least 1 neighbour")
        _require(self.k2 >= 1, "k2", self.k2, "at least 1, the image itself")
        _require(0 <= self.lambda_value <= 1, "lambda_value", self.lambda_value, "a weight from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is fixed in the evaluation protocols.

    `metric` is the distance images are ranked by: cosine, or euclidean between the features as they are. Figure 1's
    share and the modality probe look at unit vectors always. `galleries` is how SYSU-MM01's galleries are drawn: from
    the authors' rand_perm_cam.mat, or as the AGW code base does (protocols.random_seed_galleries). Scores that differ
    in one of them cannot be compared, so records name what is not the default.
    """

    trials: int
    ranks: int
    batch_size: int
    metric: Literal["cosine", "euclidean"]
    galleries: Literal["rand_perm", "random_seed"]
    rerank: Rerank | None

    def __post_init__(self) -> None:
        _require(1 <= self.trials <= 10, "trials", self.trials, "1 to 10, the random galleries there are")
        _require(self.ranks >= 20, "ranks", self.ranks, "at least 20, the last rank in the tables")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        alone = self.rerank is None or self.metric == "cosine"
        _require(alone, "metric", self.metric, "cosine, which re-ranking starts from, or `rerank: null`")


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How a difference between two variants is resampled over queries; statistics.py says how."""

    resamples: int
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        _require(self.resamples >= 100, "resamples", self.resamples, "at least 100")
        _require(0.5 <= self.confidence < 1, "confidence", self.confidence, "a share from 0.5 to below 1")
        _require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The thorough setting beside the quick default: `make reference` runs the embedded study on these seeds."""

    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct = len(set(self.seeds)) == len(self.seeds) >= 3
        _require(distinct and min(self.seeds) >= 0, "seeds", self.seeds, "at least three different seeds")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """How often a run saves what it can be resumed from; its weights do not depend on it."""

    every_epochs: int

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "every_epochs", self.every_epochs, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class Switches:
    """What `dvc repro` runs; an empty list is zero stages."""

    sysu: tuple[str, ...]
    regdb: tuple[str, ...]
    trials: tuple[int, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def datasets(self) -> tuple[str, ...]:
        return self.sysu + self.regdb


@dataclasses.dataclass(frozen=True)
class Reading:
    """A row of the readings study: one choice that the paper leaves open, made in another way than the default.

    `set` gives values by their dotted paths in a run's configuration. A row with `against: null` is a reference, which
    other rows name in `against`: the run they differ from.
    """

    group: str
    variant: str
    against: str | None
    choice: str
    reading: str
    set: dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Readings:
    """The readings study: its rows, and which of them `dvc repro` runs; empty lists are zero stages."""

    dataset: str
    seeds: tuple[int, ...]
    run: tuple[str, ...]
    table: tuple[str, ...]
    rows: dict[str, Reading]

    def __post_init__(self) -> None:
        _require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", self.seeds, "different seeds, at least one")
        _require(self.table in ((), (self.dataset,)), "table", self.table, f"[] or [{self.dataset}]")
        _require(len(set(self.run)) == len(self.run), "run", self.run, "each row once")
        for name, row in self.rows.items():
            _require(re.fullmatch(r"[a-z0-9_]+", str(name)) is not None, "rows", name, "names of a-z, 0-9 and _")
            known = [other for other, found in self.rows.items() if found.against is None]
            expected = f"null or a row that has null there ({', '.join(known)})"
            _require(row.against is None or row.against in known, f"rows.{name}.against", row.against, expected)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, resolved: everything its weights depend on besides the data, the backbone weights and the libraries."""

    dataset: Dataset
    variant_name: str
    variant: Variant
    trial: int
    seed: int
    evaluation: Evaluation
    checkpoints: Checkpoints
    reading: str | None = None  # the row of the readings study that it is of
    trained: RunConfig | None = None  # the run whose weights it is scored with, where it has none of its own

    @property
    def name(self) -> str:
        """`<variant>-t<trial>-s<seed>`, or `<row>-s<seed>` for a reading: the name of the run's folder and files."""
        return f"{self.reading or f'{self.variant_name}-t{self.trial}'}-s{self.seed}"

    @property
    def place(self) -> str:
        """Where the weights lie below `runs/`; no run of the study has a place below `readings/`."""
        if self.trained is not None:
            return self.trained.place
        return f"{'readings/' if self.reading else ''}{self.dataset.name}/{self.name}"

    @property
    def metrics(self) -> str:
        """Where the metrics record lies below `results/`: a reading's beside those that are scored with its weights."""
        if self.reading is None:
            return f"{self.dataset.name}/metrics/{self.name}.json"
        return f"{self.dataset.name}/readings/metrics/{self.place.rpartition('/')[2]}/{self.reading}.json"

    @property
    def command(self) -> str:
        """What makes the weights."""
        if self.reading is not None:
            return f"python -m tools.readings --rows {self.reading}"
        return f"dvc repro train_{self.dataset.layout}@{self.dataset.name}-{self.trial}-{self.variant_name}-{self.seed}"

    @property
    def epochs(self) -> int:
        return self.dataset.recipe.epochs * self.variant.epochs_factor

    @property
    def milestones(self) -> tuple[int, ...]:
        return tuple(epoch * self.variant.epochs_factor for epoch in self.dataset.recipe.milestones)

    def resolved(self) -> dict[str, Any]:
        """What the run's weights depend on, as plain JSON values: stored with every result, hashed in its fingerprint.

        Captions and folders are left out: changing them leaves the weights what they are.
        """
        dataset = dataclasses.asdict(self.dataset)
        variant = dataclasses.asdict(self.variant)
        return _plain(
            {
                "dataset": {key: dataset[key] for key in ("name", "layout", "image", "train_splits", "recipe")},
                "variant": {"name": self.variant_name, **{key: variant[key] for key in variant if key != "label"}},
                "trial": self.trial,
                "seed": self.seed,
            }
        )


@dataclasses.dataclass(frozen=True)
class Study:
    """The whole of params.yaml."""

    study: Switches
    modules: Modules
    variants: dict[str, Variant]
    augment: Augment
    recipes: dict[str, Recipe]
    datasets: dict[str, Dataset]
    pretraining: Pretraining
    tuning: Tuning
    evaluation: Evaluation
    checkpoints: Checkpoints
    bootstrap: Bootstrap
    reference: Reference
    readings: Readings

    def dataset(self, name: str) -> Dataset:
        """The data set called `name`; an unknown name is a ConfigError that lists the known ones."""
        return _lookup(self.datasets, name, "data set", "datasets")

    def run(self, dataset: str, variant: str, trial: int, seed: int, reading: str | None = None) -> RunConfig:
        """One run by its four names, or with `reading` that row of the readings study on them.

        ConfigError for an unknown name, a trial the layout lacks, a negative seed, and a reading of another variant.
        """
        row = self.dataset(dataset)
        trials = range(1, 2) if row.layout == "sysu" else range(1, 11)
        if trial not in trials:
            expected = "1 (one training split)" if row.layout == "sysu" else "1 to 10"
            raise ConfigError(
                f"trial of data set {dataset}: expected {expected}, found {trial}; correct `study.trials`"
            )
        if seed < 0:
            raise ConfigError(f"seed: expected a whole number of at least 0, found {seed}; correct `study.seeds`")
        chosen = _lookup(self.variants, variant, "variant", "variants")
        config = RunConfig(row, variant, chosen, trial, seed, self.evaluation, self.checkpoints)
        return config if reading is None else self._read(config, reading)

    def reading(self, name: str, seed: int) -> RunConfig:
        """The run of a row of the readings study; its data set and variant are those that params.yaml gives it."""
        row = _lookup(self.readings.rows, name, "reading", "readings.rows")
        return self.run(self.readings.dataset, row.variant, 1, seed, name)

    def trained_row(self, name: str) -> str:
        """The row of the readings study whose runs the row `name` is scored with: its own, or the first alike."""
        return _lookup(self.trained_as, name, "reading", "readings.rows")

    @functools.cached_property
    def trained_as(self) -> dict[str, str]:
        """For each row of the readings study the row whose runs it is scored with: the first that trains as it does."""
        first: dict[str, str] = {}
        return {name: first.setdefault(_training_of(self, name), name) for name in self.readings.rows}

    def _read(self, config: RunConfig, name: str) -> RunConfig:
        row = _lookup(self.readings.rows, name, "reading", "readings.rows")
        if config.variant_name != row.variant:
            raise ConfigError(
                f"reading {name}: expected variant {row.variant}, found {config.variant_name}; correct "
                f"`readings.rows.{name}.variant`"
            )
        changed = _with(config, row.set, f"readings.rows.{name}.set")
        first = self.trained_as[name]
        trained = (
            None
            if first == name
            else self.run(config.dataset.name, self.readings.rows[first].variant, config.trial, config.seed, first)
        )
        return dataclasses.replace(changed, reading=name, trained=trained)


def _training_of(study: Study, name: str) -> str:
    """All that the weights of a reading depend on but the seed; variants of other names may train alike."""
    row = study.readings.rows[name]
    plain = study.run(study.readings.dataset, row.variant, 1, 0)
    resolved = _with(plain, row.set, f"readings.rows.{name}.set").resolved()
    del resolved["variant"]["name"], resolved["dataset"]["recipe"]["test_feature"]
    return json.dumps(resolved, sort_keys=True)


_READABLE = {"variant": Variant, "dataset.recipe": Recipe, "evaluation": Evaluation}  # what a reading may change


def _with(config: RunConfig, values: dict[Any, Any], where: str) -> RunConfig:
    """`config` with values by dotted path, checked as those of params.yaml are."""
    raw = {
        "variant": _plain(dataclasses.asdict(config.variant)),
        "dataset.recipe": _plain(dataclasses.asdict(config.dataset.recipe)),
        "evaluation": _plain(dataclasses.asdict(config.evaluation)),
    }
    known = [f"{name}.{key}" for name, part in raw.items() for key in _paths(part)]
    for path, value in values.items():
        name = next((name for name in raw if str(path).startswith(f"{name}.")), None)
        if name is None or path not in known:
            nearest = difflib.get_close_matches(str(path), known, 1, cutoff=0)[0]
            raise ConfigError(
                f"params.yaml: {where}: {path!r} is no path in the configuration of a run of variant "
                f"{config.variant_name}; the nearest is {nearest!r}"
            )
        *folders, last = path.removeprefix(f"{name}.").split(".")
        functools.reduce(dict.__getitem__, folders, raw[name])[last] = copy.deepcopy(value)
    built = {name: build(_READABLE[name], part, f"params.yaml: {where}: {name}") for name, part in raw.items()}
    dataset = dataclasses.replace(config.dataset, recipe=built["dataset.recipe"])
    return dataclasses.replace(config, variant=built["variant"], dataset=dataset, evaluation=built["evaluation"])


def _paths(value: dict[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        yield key
        if isinstance(item, dict):
            yield from (f"{key}.{below}" for below in _paths(item))


def load_study(path: str | Path = "params.yaml") -> Study:
    """Read and check params.yaml.

    Raises ConfigError, naming the file and the key, for a missing file, broken YAML, a duplicated, unknown or missing
    key, a value of the wrong type or out of range, and a list in `study` that names what does not exist.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing; run from the project's root, or restore it from version control"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(raw, dict) and isinstance(raw.get("datasets"), dict):
        for name, row in raw["datasets"].items():
            if isinstance(row, dict) and "name" in row:
                raise ConfigError(f"{path}: datasets.{name}: unknown key 'name'; the row's own key is the name")
        rows = raw["datasets"].items()
        raw["datasets"] = {name: {"name": name, **row} if isinstance(row, dict) else row for name, row in rows}
    study = build(Study, raw, str(path))
    _check_names(study, path)
    _check_roots(study, path)
    _check_modules(study, path)
    _check_switches(study, path)
    _check_readings(study, path)
    _check_tuning(study, path)
    return study


def _check_names(study: Study, path: Path) -> None:
    """Names become folders, stages and words of a command line; labels tell variants apart in tables and figures."""
    for key, names in (("datasets", study.datasets), ("variants", study.variants)):
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"{path}: {key} has a row named {name!r}, expected a letter, then letters, digits, "
                    "underscores and hyphens; rename it"
                )
    rows: dict[str, str] = {}
    for name, variant in study.variants.items():
        if not variant.label.strip() or (other := rows.setdefault(variant.label, name)) != name:
            found = f"that of {other} too" if variant.label.strip() else "empty"
            raise ConfigError(
                f"{path}: variants.{name}.label: expected a label of its own, found {variant.label!r}, {found}; "
                "change it"
            )


def _check_roots(study: Study, path: Path) -> None:
    """Two renderings in one folder would draw each other's images over, back and forth."""
    drawn: dict[Path, Dataset] = {}
    for row in study.datasets.values():
        if row.render is not None and (other := drawn.setdefault(Path(row.root), row)).render != row.render:
            raise ConfigError(
                f"{path}: datasets.{row.name}.root: expected a folder of its own, found {row.root!r}, where "
                f"{other.name} is rendered otherwise; name another"
            )


def _check_modules(study: Study, path: Path) -> None:
    """A module's numbers stand once: a row that repeats them, because an alias was lost, must not go its own way."""
    for name, variant in study.variants.items():
        for module in ("cc", "ml"):
            found, expected = getattr(variant, module), getattr(study.modules, module)
            if found not in (None, expected):
                raise ConfigError(
                    f"{path}: variants.{name}.{module}: expected the numbers of modules.{module}, found others; "
                    f"write `{module}: *{module}` there, so that they stand once"
                )


def _check_switches(study: Study, path: Path) -> None:
    for layout in ("sysu", "regdb"):
        for name in getattr(study.study, layout):
            found = study.dataset(name).layout
            if found != layout:
                raise ConfigError(
                    f"{path}: study.{layout} lists {name}, whose layout is {found}; move it to study.{found}"
                )
    for key in ("sysu", "regdb", "trials", "variants", "seeds"):
        values = getattr(study.study, key)
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: study.{key} names a value twice ({list(values)}); each may stand once")
    models: dict[Variant, str] = {}
    for name in study.study.variants:
        model = dataclasses.replace(_lookup(study.variants, name, "variant", "variants"), label="")
        twin = models.setdefault(model, name)
        if twin != name:
            raise ConfigError(
                f"{path}: study.variants lists {twin} and {name}, which train the same model; remove one of the two"
            )
    used = {"variants": study.study.datasets, "seeds": study.study.datasets, "trials": study.study.regdb}
    for key, datasets in used.items():
        if datasets and not getattr(study.study, key):
            raise ConfigError(
                f"{path}: study.{key}: expected at least one for {', '.join(datasets)}, found none; add one, or take "
                "the data sets out"
            )
    for dataset in study.study.datasets:
        trials = (1,) if study.dataset(dataset).layout == "sysu" else study.study.trials
        for variant in study.study.variants:
            for trial in trials:
                for seed in study.study.seeds:
                    study.run(dataset, variant, trial, seed)


def _check_readings(study: Study, path: Path) -> None:
    """Check the rows where `dvc repro` uses them; `Study.reading` does where anything else does.

    Rows that nothing runs are left alone: another number of the study may make one senseless, and be right.
    """
    if not study.readings.run and not study.readings.table:
        return
    for seed in study.readings.seeds:
        for name in study.readings.rows:
            study.reading(name, seed)
    for name in study.readings.run:
        first = study.trained_row(name)
        if first != name:
            raise ConfigError(
                f"{path}: readings.run lists {name}, which trains as {first} does and is scored with its runs; "
                f"list {first} instead"
            )


def _check_tuning(study: Study, path: Path) -> None:
    """Hyper-parameters are chosen on identities that no candidate is trained on, or the choice is worth nothing."""
    row = study.dataset(study.tuning.dataset)
    if row.layout != "sysu" or "val" in row.train_splits:
        found = f"layout {row.layout}" if row.layout != "sysu" else f"train_splits {list(row.train_splits)}"
        raise ConfigError(
            f"{path}: tuning.dataset: expected a data set of layout sysu whose split val is not trained on, found "
            f"{row.name} with {found}; name another"
        )


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once, and a number is what it is in YAML 1.2, as which DVC reads the file.

    `5e-4` is one. `010`, `1_000` and `1:30` are 8, 1000 and 90 in YAML 1.1 only: here they are text, and so refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key.value}` stands twice; remove one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_bool = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_int = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_float = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _bool, list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", _int, list("-+0123456789"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed YAML into `kind`, strictly: no unknown, missing or mistyped value passes."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):  # True and 1.0 are equal to 1
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is tuple:
        return _build_tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), where, "a mapping", value)
        return {key: build(arguments[1], item, f"{where}{_join(where)}{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if kind is float:
        _expect(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
            where,
            "a number",
            value,
        )
        return float(value)
    if kind is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), where, "a whole number", value)
        return value
    _expect(isinstance(value, kind), where, f"a {kind.__name__}", value)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "a mapping", value)
    hints = typing.get_type_hints(kind)
    unknown = sorted(str(key) for key in value if key not in hints)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(hints))}")
    missing = sorted(key for key in hints if key not in value)
    if missing:
        raise ConfigError(f"{where}: key {missing[0]!r} is missing; add it")
    fields = {key: build(hint, value[key], f"{where}{_join(where)}{key}") for key, hint in hints.items()}
    try:
        return kind(**fields)
    except _OutOfRange as error:
        raise ConfigError(
            f"{where}{_join(where)}{error.key}: expected {error.expected}, found {_show(error.found)}"
        ) from None


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    choices = [kind for kind in arguments if kind is not types.NoneType]
    if len(choices) > 1 and isinstance(
        value, dict
    ):  # the member that shares most keys with the value gives the best message
        choices.sort(key=lambda kind: -len(set(typing.get_type_hints(kind)) & set(value)))
    return build(choices[0], value, where)


def _build_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), where, "a list", value)
    if arguments[-1] is Ellipsis:
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    _expect(len(value) == len(arguments), where, f"a list of {len(arguments)} values", value)
    return tuple(
        build(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


class _OutOfRange(Exception):
    def __init__(self, key: str, found: Any, expected: str) -> None:
        self.key, self.found, self.expected = key, found, expected


def _require_drawable(seed: int, height: int = 128) -> None:
    _require(seed >= 0, "seed", seed, "a whole number of at least 0")
    _require(height >= 32, "height", height, "at least 32 pixels")


def _require(condition: bool, key: str, found: Any, expected: str) -> None:
    if not condition:
        raise _OutOfRange(key, found, expected)


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, found {_show(found)}")


def _join(where: str) -> str:
    return "." if ":" in where else ": "  # params.yaml: datasets.sysu.image


def _show(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _lookup(table: dict[str, Any], name: str, what: str, key: str) -> Any:
    if name not in table:
        raise ConfigError(
            f"unknown {what} {name!r}; params.yaml has {', '.join(table)} under `{key}`: correct the name or add a row"
        )
    return table[name]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
