"""params.yaml as checked objects. `load_study` reads the file; `Study.run` resolves one run.

A run is a data set, a trial (RegDB's split; 1 elsewhere), a variant and a seed. A variant is a set of overrides: its
values are merged over those of the rows it extends, which are merged over `defaults` and the data set's overrides.
"""

from __future__ import annotations

import copy
import difflib
import math
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML, YAMLError

from danet_study.files import StudyError, atomic_write_json, read_json, sha256_file
from danet_study.protocols import PROTOCOLS

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]  # part of paths and of stage names
Share = Annotated[float, Field(ge=0, le=1, strict=True)]  # strict: `true` and "1" are no numbers
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Model(BaseModel):
    """Strict: unknown keys, wrong types and values out of range are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Augment(Model):
    """Training augmentation. `mean`, `std`: of RGB in [0, 1]. Ranges of `erase_*` as in torchvision's RandomErasing."""

    flip: Share
    erase: Share
    erase_area: tuple[Positive, Share]
    erase_ratio: tuple[Positive, Positive]
    pad_crop: Natural
    pad_value: Annotated[int, Field(ge=0, le=255, strict=True)]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class Recipe(Model):
    """How a model is trained."""

    backbone: Literal["resnet18", "resnet34", "resnet50"]
    width: Count
    weights: Literal["imagenet", "rendered"]
    ids_per_batch: Annotated[int, Field(ge=2)]
    imgs_per_modality: Count
    epochs: Count
    steps_per_epoch: Count
    lr: Positive
    weight_decay: NonNegative
    milestones: list[Count]
    decay: Positive
    precision: Literal["float32", "tf32", "bfloat16", "float16"]
    channels_last: Flag
    augment: Augment


class Network(Model):
    """What a variant may change in the model; see danet_core.model.DANet. `test_feature` is the retrieval feature."""

    stem: Literal["one", "two", "zero_padding"]
    pooling: Literal["average", "max", "gem"]
    gem_exponent: Positive
    teacher_ema: Annotated[float, Field(ge=0, lt=1)]
    test_feature: Literal["before_bn", "after_bn"]


class Evaluation(Model):
    """How a trained model is scored. `split`: the identities; written to records only if it is not `test`."""

    split: Annotated[Literal["test", "val"], Field(exclude_if=lambda split: split == "test")] = "test"
    trials: Annotated[int, Field(ge=1, le=10)]
    metric: Literal["cosine", "euclidean"]
    galleries: Literal["rand_perm", "random_seed"]
    batch_size: Count


class Image(Model):
    """Size in pixels that images are resized to."""

    height: Annotated[int, Field(ge=32)]
    width: Annotated[int, Field(ge=32)]


class Dataset(Model):
    """A row of `datasets`; `render` holds the arguments of the renderer, null for photographs."""

    name: Name
    title: str
    layout: str  # a reader of data_prep, or the import path of a user's own
    protocol: str  # an entry of danet_study.protocols.PROTOCOLS
    published: Flag = False  # the licensed data set itself: published counts and the paper's rows apply
    root: Path
    image: Image
    train_splits: Annotated[list[str], Field(min_length=1)]
    allow_partial: Flag = False
    split_seed: Natural = 0  # of a reader that draws which identities train
    recipe: dict[str, Any] = {}
    render: dict[str, Any] | None = None

    @property
    def synthetic(self) -> bool:
        return self.render is not None


class Overrides(Model):
    """What a row of `variants` or `sensitivity.rows` may change."""

    label: Annotated[str, Field(min_length=1)]
    extends: list[str] = []
    losses: dict[str, dict[str, Any]] = {}
    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}


class SensitivityRow(Overrides):
    """An open choice of the paper as a row: `label` is the choice made, `against` the row it is compared with."""

    group: str
    against: str


class Sensitivity(Model):
    """Which open choice of the paper moves the scores?"""

    split: str
    seeds: list[Natural]
    rows: dict[Name, SensitivityRow]

    @property
    def run(self) -> list[str]:
        """Names of variants and rows in the order of training: first what others are compared with."""
        return list(dict.fromkeys([*(row.against for row in self.rows.values()), *self.rows]))


class Plan(Model):
    """What the pipeline runs: all combinations of `splits`, `variants` and `seeds`.

    datasets: those of `splits`. photographs: those of `datasets` that are not rendered. DVC cannot derive the two.
    """

    datasets: list[str]
    photographs: list[str] = []
    splits: list[str]
    variants: list[str]
    seeds: list[Natural]

    @model_validator(mode="after")
    def _agree(self) -> Plan:
        for key in ("splits", "variants", "seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"study.{key} is empty or names a value twice")
        named = list(dict.fromkeys(split.rpartition("-")[0] for split in self.splits))
        if named != self.datasets:
            raise ValueError(f"study.datasets is {self.datasets}, but study.splits names {named}; make them agree")
        return self


class Pretraining(Model):
    """`weights: rendered`, the stand-in for ImageNet: a classifier of rendered visible crops of other identities."""

    render: dict[str, Any]
    batch_size: Count
    steps: Count
    lr: Positive
    weight_decay: NonNegative
    seed: int


class Bootstrap(Model):
    """Resampling of the test identities."""

    resamples: Annotated[int, Field(ge=100)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: int


class RunConfig(Model):
    """One run, resolved."""

    dataset: Dataset
    trial: Count
    variant: str
    label: str
    seed: Natural
    losses: dict[str, dict[str, Any]]
    model: Network
    recipe: Recipe
    evaluation: Evaluation

    @field_validator("losses")
    @classmethod
    def _weighted(cls, losses: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for term, values in losses.items():
            weight = values.get("weight", -1)
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise ValueError(f"{term}.weight: expected a number >= 0")
        return {term: values for term, values in losses.items() if values["weight"] > 0}

    @property
    def split(self) -> str:
        return f"{self.dataset.name}-{self.trial}"

    @property
    def name(self) -> str:
        """`<data set>-<trial>-<variant>-<seed>`: the run's folder below runs/ and the suffix of its stages."""
        return f"{self.split}-{self.variant}-{self.seed}"

    def resolved(self) -> dict[str, Any]:
        """All that the run's weights depend on except data, backbone weights and code. No titles, labels, folders."""
        kept: dict[str, Any] = dict.fromkeys(("trial", "seed", "losses", "model", "recipe"), True)
        kept["dataset"] = {"name", "layout", "image", "train_splits"}
        return self.model_dump(mode="json", include=kept)


class Study(Model):
    """The whole of params.yaml."""

    study: Plan
    own_code: Annotated[str, Field(pattern=r"^\w+(/\w+)*$")]  # a user's own losses, a folder below the root
    defaults: dict[str, Any]
    variants: dict[Name, Overrides]
    datasets: dict[Name, Dataset]
    pretraining: Pretraining
    bootstrap: Bootstrap
    sensitivity: Sensitivity

    @property
    def plan(self) -> Plan:
        return self.study

    @cached_property
    def rows(self) -> dict[str, Overrides]:
        """All rows that can be trained: variants and sensitivity rows."""
        return {**self.variants, **self.sensitivity.rows}

    def dataset(self, name: str) -> Dataset:
        return self.datasets[_known(self.datasets, name, "datasets")]

    def run(self, split: str, variant: str, seed: int) -> RunConfig:
        """The run of `split` ("<data set>-<trial>"), a variant or sensitivity row, and a seed.

        Raises StudyError for an empty or unknown name, and for values that the row may not set.
        """
        name, _, trial = split.rpartition("-")
        if not trial.isdigit() or not 1 <= int(trial) <= 10:
            raise StudyError(f"split {split!r}: expected '<data set>-<trial>', e.g. synth_sysu-1")
        dataset, row = self.dataset(name), self.rows[_known(self.rows, variant, "variants")]
        merged = _merge(self.defaults, {"recipe": dataset.recipe})
        for part in self._lineage(variant):
            keys = {"losses", "model", "recipe", "evaluation"}
            merged = _merge(merged, self.rows[part].model_dump(include=keys, exclude_unset=True))
        merged |= {"dataset": dataset, "trial": int(trial), "variant": variant, "label": row.label, "seed": seed}
        try:
            return RunConfig(**merged)
        except ValidationError as error:
            raise StudyError(f"params.yaml: run of {variant} on {split}: {_first(error)}") from None

    def runs(self) -> list[RunConfig]:
        """All runs of the plan."""
        plan = self.plan
        return [self.run(s, v, seed) for s in plan.splits for v in plan.variants for seed in plan.seeds]

    def _lineage(self, name: str, below: tuple[str, ...] = ()) -> list[str]:
        """The rows that `name` extends, in the order of merging, and itself last."""
        if name in below:
            raise StudyError(f"params.yaml: row {name} extends itself through {', '.join(below)}; remove the cycle")
        parents = [_known(self.rows, parent, f"{name}.extends") for parent in self.rows[name].extends]
        return [*(row for parent in parents for row in self._lineage(parent, (*below, name))), name]


def load_study(path: str | Path = "params.yaml") -> Study:
    """Read and check params.yaml.

    Raises StudyError with file, key, value and remedy for a missing or broken file, an unknown, missing or duplicate
    key, and a value of the wrong type or out of range.
    """
    path = Path(path)
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        named = {name: {"name": name, **(row or {})} for name, row in raw["datasets"].items()}
        study = Study(**{**raw, "datasets": named})
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; run the command in the project's root") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {error.problem}" if mark else str(error)  # type: ignore[union-attr]
        raise StudyError(f"{path} is not valid YAML, {' '.join(where.split())}") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {_first(error)}") from None
    except (TypeError, KeyError, AttributeError):
        raise StudyError(f"{path}: expected a mapping with `datasets`; restore the file") from None
    real = [name for name in study.plan.datasets if not study.dataset(name).synthetic]
    if real != study.plan.photographs:
        raise StudyError(f"{path}: study.photographs: expected {real}, the photographs in study.datasets; correct it")
    for name in study.plan.datasets:
        _known(PROTOCOLS, study.dataset(name).protocol, f"datasets.{name}.protocol")
    for name in (*study.plan.variants, *study.sensitivity.run):
        _known(study.rows, name, "study.variants")
    for split in (*study.plan.splits, study.sensitivity.split, *(f"{name}-1" for name in study.datasets)):
        for name in study.rows:
            study.run(split, name, 0)
    return study


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged key by key."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _known(rows: Mapping[str, Any], name: str, where: str) -> str:
    if name not in rows:
        near = difflib.get_close_matches(str(name), rows, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(rows)}"
        raise StudyError(f"params.yaml, {where}: {name!r} is unknown; {hint}")
    return name


def _first(error: ValidationError) -> str:
    """The first problem that pydantic found, as key, problem and value."""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"])) or "values"
    found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}{found}; correct the key"


def write_configs(study: Study, packed: Path = Path("data/packed"), weights: Path = Path("data/weights")) -> None:
    """Write the inputs of each run's stages, so that a change makes exactly the runs stale that use it.

    build/configs/<run>.json: configuration, hashes of data and backbone weights, for training.
    build/configs/<run>.evaluation.json: for evaluation.
    """
    from danet_core.losses import check_terms, own_files  # here: importing torch takes seconds

    hashes = {
        name: {
            "data_sha256": read_json(packed / name / "meta.json")["content_sha256"],
            "weights_sha256": sha256_file(weights / f"{name}.safetensors"),
        }
        for name in study.plan.datasets
    }
    for run in study.runs():
        try:
            check_terms(run.losses)
        except ValueError as error:
            raise StudyError(f"params.yaml: variant {run.variant}: {error}") from None
        sources = own_files(run.losses)
        for path in sources.values():
            if "site-packages" not in path.parts and not path.resolve().is_relative_to(Path(study.own_code).resolve()):
                raise StudyError(f"{path.parent} has a loss of {run.variant}, but DVC does not watch it; set own_code")
        own = {name: sha256_file(path) for name, path in sources.items()}
        inputs = {"config": run.resolved(), "own_losses": own, **hashes[run.dataset.name]}
        path = Path("build/configs") / f"{run.name}.json"
        atomic_write_json(path, inputs)
        atomic_write_json(path.with_suffix(".evaluation.json"), run.evaluation.model_dump(mode="json"))


if __name__ == "__main__":
    try:
        write_configs(load_study(*sys.argv[1:]))
    except StudyError as error:
        sys.exit(f"config: {error}")
    except FileNotFoundError as error:
        sys.exit(f"config: {error.filename} is missing; `dvc repro` makes it")
