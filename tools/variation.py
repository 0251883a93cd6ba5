"""The study with other parameters:  python -m tools.variation studies/X.yaml [--into FOLDER] | --sensitivity

Merges a file of overrides into params.yaml: in place, or in a copy of the project in FOLDER, with results and DVC state
of its own. A mapping with `like: NAME` starts as a copy of its neighbor NAME as the lines above have left it.
--sensitivity makes the copy in build/sensitivity whose runs are the rows of `sensitivity` in params.yaml, and --collect
takes their records from there to results/records.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from danet_study.config import RunConfig, Study, load_study
from danet_study.files import StudyError, atomic_path

PARTS = (  # of the project, as far as the pipeline needs them
    *("danet_core", "danet_study", "data_prep", "tools", "notebooks", "results/paper", "data/inventory"),
    *("dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config"),
)
SENSITIVITY, RECORDS = Path("build/sensitivity"), Path("results/records")
FOLDERS = {"runs": "runs", "packed": "data/packed", "weights": "data/weights", "results": "results"}


def merge(params: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set the values of `overrides` in `params`; mappings are merged key by key.

    A mapping with the key `like` is merged into a copy of the neighbor that it names.
    """
    for key, value in overrides.items():
        start = params.get(value.get("like", key)) if isinstance(value, Mapping) else None
        if isinstance(start, Mapping):
            params[key] = copy.deepcopy(start)  # a YAML alias is the very object of its anchor
            merge(params[key], {name: value[name] for name in value if name != "like"})
        else:
            params[key] = value


def override(path: Path, overrides: Mapping[str, Any]) -> None:
    """Merge `overrides` into the YAML file `path`, keeping its comments. Raises StudyError if the study is refused."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 118, True
    params = yaml.load(path)
    merge(params, overrides)
    with atomic_path(path) as temporary:
        yaml.dump(params, temporary)
        load_study(temporary)


def copy_project(folder: Path, overrides: Mapping[str, Any], *, cache: Path | None = None) -> None:
    """Bring the copy of the project in `folder` up to date, with other parameters; its data, runs and results stay.

    With `cache`, the copy takes runs that are in this DVC cache from there, and adds its own.
    """
    for part in map(Path, (*PARTS, load_study().own_code)):
        target = folder / part
        if part.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(part, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(part, target)
    override(folder / "params.yaml", overrides)
    shared = f"[cache]\n    dir = {cache.resolve()}\n" if cache else ""
    (folder / ".dvc/config.local").write_text(f"[core]\n    no_scm = true\n{shared}", encoding="utf-8")


def sensitivity() -> dict[str, Any]:
    """Overrides that make the rows of the sensitivity study the study, except rows that are only tested otherwise."""
    study, plan = load_study(), load_study().sensitivity
    dataset, scored = plan.split.rpartition("-")[0], {config.variant for config, _ in only_scored(study)}
    variants = [name for name in plan.run if name not in scored]
    photographs = [] if study.dataset(dataset).synthetic else [dataset]
    runs = {"splits": [plan.split], "datasets": [dataset], "variants": variants, "seeds": plan.seeds}
    return {"study": {**runs, "photographs": photographs}}


def only_scored(study: Study) -> list[tuple[RunConfig, RunConfig]]:
    """Runs of the rows that only change the test, each with the run whose weights it scores."""
    from danet_study.sensitivity import same_weights  # here: importing matplotlib takes seconds

    plan = study.sensitivity
    pairs = [
        (study.run(plan.split, name, seed), study.run(plan.split, row.against, seed))
        for name, row in plan.rows.items()
        for seed in plan.seeds
    ]
    return [(config, trained) for config, trained in pairs if same_weights(config, trained)]


def collect() -> int:
    """Score the rows that were not trained and copy the records that the study does not make itself; their number."""
    from danet_study.evaluate import evaluate  # here: importing torch takes seconds

    folders: dict[str, Any] = {name: SENSITIVITY / folder for name, folder in FOLDERS.items()}
    for config, trained in only_scored(load_study()):
        evaluate(config, trained=trained, **folders)
    own = {run.name for run in load_study().runs()}
    paths = [path for path in (SENSITIVITY / RECORDS).glob("*.json") if path.stem not in own]
    RECORDS.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy2(path, RECORDS / path.name)
    return len(paths)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.variation", description="The study with other parameters.")
    parser.add_argument("overrides", nargs="?", type=Path)
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--share-cache", action="store_true", help="take finished runs from the project's DVC cache")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.sensitivity:
            copy_project(SENSITIVITY, sensitivity(), cache=Path(".dvc/cache"))
        elif options.collect:
            print(f"{collect()} records of sensitivity rows added to {RECORDS}")
        elif options.overrides is None:
            parser.error("name a file of overrides, --sensitivity or --collect")
        elif options.into:
            cache = Path(".dvc/cache") if options.share_cache else None
            copy_project(options.into, YAML(typ="safe").load(options.overrides), cache=cache)
        else:
            override(Path("params.yaml"), YAML(typ="safe").load(options.overrides))
    except (StudyError, FileNotFoundError) as error:
        print(f"variation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
