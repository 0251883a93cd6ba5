"""The rows of params.yaml, each a frozen dataclass that knows what its values may be.

Nothing here has a default value: a number that is not in params.yaml does not exist.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

from danet_core.strict import require

Precision = Literal["float32", "tf32", "bfloat16", "float16"]  # precision.py says what they are
BatchNorm = Literal["global", "per_process"]  # Team.network in parallel.py says what they do
Streams = Literal["one", "two", "zero_padding"]  # how images enter the network; backbone.py says what they are
Pooling = Literal["average", "max", "gem"]  # model.pool says what they are
SidTrains = Literal["all", "classifiers"]  # what the gradient of L_sid reaches; DANet in model.py does it
MutualTrains = Literal["all", "backbone"]  # what the gradient of L_M reaches


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
        require(self.lambda_1 > 0, "lambda_1", self.lambda_1, "a weight above 0 (a variant without CC has `cc: null`)")
        require(self.margin >= 0, "margin", self.margin, "a distance of at least 0")


@dataclasses.dataclass(frozen=True)
class MutualLearning:
    """ML, Eq. 4 and Eq. 5, and their weights in the total loss; a lambda_2 of 0 is Eq. 4 alone."""

    lambda_2: float
    lambda_sid: float
    gradient: Literal["both", "own", "foreign"]
    direction: Literal["foreign_own", "own_foreign"]
    foreign_average: float
    sid_trains: SidTrains
    mutual_trains: MutualTrains

    def __post_init__(self) -> None:
        require(self.lambda_2 >= 0, "lambda_2", self.lambda_2, "a weight of at least 0")
        require(
            self.lambda_sid > 0,
            "lambda_sid",
            self.lambda_sid,
            "a weight above 0: without L_sid C_v and C_r stay untrained",
        )
        average = self.foreign_average
        require(0 <= average < 1, "foreign_average", average, "a momentum from 0 (no average) to below 1")
        taught = average == 0 or self.gradient != "foreign"
        require(taught, "gradient", self.gradient, "both or own: an averaged foreign classifier is fixed")
        require(average == 0 or self.lambda_2 > 0, "foreign_average", average, "0 where lambda_2 is 0, L_M left out")
        told = self.mutual_trains == "all" or self.lambda_2 > 0
        require(told, "mutual_trains", self.mutual_trains, "all where lambda_2 is 0, L_M left out")


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
        require(self.epochs_factor >= 1, "epochs_factor", self.epochs_factor, "a whole number of at least 1")


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
            require(0 <= value <= 1, name, value, "a probability from 0 to 1")
        low, high = self.erase_area
        require(0 < low <= high < 1, "erase_area", self.erase_area, "two shares of the image, 0 < low <= high < 1")
        low, high = self.erase_ratio
        require(0 < low <= high, "erase_ratio", self.erase_ratio, "two ratios, 0 < low <= high")
        require(self.pad_crop >= 0, "pad_crop", self.pad_crop, "a whole number of pixels of at least 0")
        require(min(self.std) > 0, "std", self.std, "three numbers above 0")


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
            require(value >= 1, name, value, "a whole number of at least 1")
        require(
            self.ids_per_batch >= 2,
            "ids_per_batch",
            self.ids_per_batch,
            "at least 2 identities, else no loss has a negative",
        )
        require(self.gem_exponent >= 1, "gem_exponent", self.gem_exponent, "an exponent of at least 1, the average")
        require(self.lr > 0, "lr", self.lr, "a learning rate above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        require(0 < self.decay <= 1, "decay", self.decay, "a factor above 0 and at most 1")
        ascending = list(self.milestones) == sorted(set(self.milestones))
        require(
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
            require(value >= 16, name, value, "at least 16 pixels")


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Rendered images per identity and camera, by split."""

    train: int
    val: int
    test: int

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 image")


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
        require(0 <= self.absent < 0.5, "absent", self.absent, "a share from 0 to below 0.5")
        share = self.near_infrared_follows
        require(0 <= share <= 1, "near_infrared_follows", share, "a share from 0 to 1")
        for name in ("train_ids", "val_ids", "test_ids"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2 identities")
        _require_drawable(self.seed, self.height)


@dataclasses.dataclass(frozen=True)
class RenderRegdb:
    """A rendered data set in RegDB's layout."""

    seed: int
    ids: int
    images: int

    def __post_init__(self) -> None:
        require(self.ids >= 4 and self.ids % 2 == 0, "ids", self.ids, "an even number of at least 4")
        _require_drawable(self.seed)


@dataclasses.dataclass(frozen=True)
class RenderPretraining:
    """Visible crops of identities that are in no other split."""

    seed: int
    ids: int
    images: int
    height: int

    def __post_init__(self) -> None:
        require(self.ids >= 2, "ids", self.ids, "at least 2 identities")
        require(self.images >= 1, "images", self.images, "at least 1 image")
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
        require(len(self.train_splits) > 0, "train_splits", self.train_splits, "at least one of train, val")
        fits = self.render is None or isinstance(self.render, RenderSysu) == (self.layout == "sysu")
        require(fits, "render", type(self.render).__name__, f"the keys of a rendering in the layout {self.layout}")

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
        require(2 <= self.batch_size <= crops, "batch_size", self.batch_size, f"2 to the number of crops, {crops}")
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.lr > 0, "lr", self.lr, "a learning rate above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")


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
        require(self.k1 >= 1, "k1", self.k1, "at least 1 neighbour")
        require(self.k2 >= 1, "k2", self.k2, "at least 1, the image itself")
        require(0 <= self.lambda_value <= 1, "lambda_value", self.lambda_value, "a weight from 0 to 1")


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
        require(1 <= self.trials <= 10, "trials", self.trials, "1 to 10, the random galleries there are")
        require(self.ranks >= 20, "ranks", self.ranks, "at least 20, the last rank in the tables")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        alone = self.rerank is None or self.metric == "cosine"
        require(alone, "metric", self.metric, "cosine, which re-ranking starts from, or `rerank: null`")


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How a difference between two variants is resampled over test identities; statistics.py says how."""

    resamples: int
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        require(self.resamples >= 100, "resamples", self.resamples, "at least 100")
        require(0.5 <= self.confidence < 1, "confidence", self.confidence, "a share from 0.5 to below 1")
        require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The thorough setting beside the quick default: `make reference` runs the embedded study on these seeds."""

    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct = len(set(self.seeds)) == len(self.seeds) >= 3
        require(distinct and min(self.seeds) >= 0, "seeds", self.seeds, "at least three different seeds")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """How often a run saves what it can be resumed from; its weights do not depend on it."""

    every_epochs: int
    share_of_time: float  # that saving takes at most, of training and saving

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, "every_epochs", self.every_epochs, "a whole number of at least 1")
        require(0 < self.share_of_time <= 1, "share_of_time", self.share_of_time, "above 0 and at most 1")

    def due(self, epochs: int, saving: float, since: float) -> bool:
        """Whether to save after so many epochs.

        The last checkpoint took `saving` seconds and was whole `since` seconds ago; of none, both are 0.
        """
        return epochs % self.every_epochs == 0 and saving <= self.share_of_time * (saving + since)


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

    `set` says what differs from `variant`, as values by their dotted paths in a run's configuration. `against` names
    the row it is compared with; a row with null there is shown by itself.
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
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", self.seeds, "different seeds, at least one")
        require(self.table in ((), (self.dataset,)), "table", self.table, f"[] or [{self.dataset}]")
        require(len(set(self.run)) == len(self.run), "run", self.run, "each row once")
        for name, row in self.rows.items():
            require(re.fullmatch(r"[a-z0-9_]+", str(name)) is not None, "rows", name, "names of a-z, 0-9 and _")
            known = [other for other in self.rows if other != name]
            expected = f"null or another row ({', '.join(known)})"
            require(row.against is None or row.against in known, f"rows.{name}.against", row.against, expected)


def _require_drawable(seed: int, height: int = 128) -> None:
    require(seed >= 0, "seed", seed, "a whole number of at least 0")
    require(height >= 32, "height", height, "at least 32 pixels")
