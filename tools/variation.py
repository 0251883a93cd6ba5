"""The study with other parameters:  python -m tools.variation OVERRIDES.yaml [--into FOLDER] | --sensitivity

Merges OVERRIDES.yaml into params.yaml: in place, or in a copy of the project in FOLDER, with results and DVC state of
its own. --sensitivity makes the copy in build/sensitivity whose runs are the rows of `sensitivity` in params.yaml, and
--collect takes their records from there to results/records.
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

from danet_study.config import load_study
from danet_study.files import StudyError, atomic_path

PARTS = (  # of the project, as far as the pipeline needs them
    *("danet_core", "danet_study", "data_prep", "tools", "notebooks", "results/paper", "data/inventory"),
    *("dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config"),
)
SENSITIVITY, RECORDS = Path("build/sensitivity"), Path("results/records")


def merge(params: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set the values of `overrides` in `params`; mappings are merged key by key."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(params.get(key), Mapping):
            params[key] = copy.deepcopy(params[key])  # a YAML alias is the very object of its anchor
            merge(params[key], value)
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
    for part in map(Path, PARTS):
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
    """Overrides that make the rows of the sensitivity study the study."""
    plan = load_study().sensitivity
    dataset = plan.split.rpartition("-")[0]
    study = {"splits": [plan.split], "datasets": [dataset], "variants": plan.run, "seeds": plan.seeds}
    photographs = [] if load_study().dataset(dataset).synthetic else [dataset]
    return {"study": {**study, "photographs": photographs}}


def collect() -> int:
    """Copy the records of sensitivity runs that the study does not make itself; returns their number."""
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
