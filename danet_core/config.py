"""params.yaml as one object: `load_study` reads and checks it, `Study.run` picks one run out of it.

A run is a data set, a variant, a trial and a seed. What a row of the file may hold stands in parameters.py.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from danet_core.parameters import (
    Augment,
    Bootstrap,
    Checkpoints,
    Dataset,
    Evaluation,
    Modules,
    Pretraining,
    Readings,
    Recipe,
    Reference,
    Switches,
    Tuning,
    Variant,
)
from danet_core.strict import ConfigError, StrictLoader, build


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
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
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
