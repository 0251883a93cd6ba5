"""Some of RegDB's trials as batch runs, one after the other.

    python -m tools.trials 1-10               ten trials; also 3 or 1,4,7 or 1-3,8
    python -m tools.trials 1-2 --dataset synth_regdb

A trial is all listed variants and seeds, trained and scored on that split. What is executed are the pipeline's own
stages with their own commands (dvc.yaml defines them once, `dvc repro` starts them, each a papermill run): trials that
are done already cost nothing, an interrupted one goes on from its checkpoint, and `dvc status` is clean at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from danet_core.config import Study, load_study
from danet_core.files import StudyError
from tools import ROOT
from tools.command import command
from tools.parent import bound, stopped_as_an_exception

STAGE = "evaluate_regdb"  # the last stage of a run; DVC makes what it depends on first
HIGHEST = 10  # RegDB comes with ten splits


def parse_trials(text: str) -> tuple[int, ...]:
    """Trials in ascending order from `1-10`, `3`, `1,4,7` or `1-3,8`. Raises StudyError for anything else."""
    return parse_numbers(text, "trials", 1, HIGHEST)


def parse_numbers(text: str, what: str, lowest: int, highest: int) -> tuple[int, ...]:
    """Numbers in ascending order from `1-10`, `3`, `1,4,7` or `1-3,8`. Raises StudyError for anything else."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not lowest <= first <= last <= highest:
            raise StudyError(
                f"{text!r} names no {what}: expected numbers from {lowest} to {highest} such as 1-10, 3 or 1,4,7, "
                f"found {part!r}"
            )
        numbers |= set(range(first, last + 1))
    return tuple(sorted(numbers))


def describe(trials: Sequence[int]) -> str:
    """`trial 3`, `trials 1 to 10`, `trials 1, 4, 7`."""
    if len(trials) == 1:
        return f"trial {trials[0]}"
    whole = list(trials) == list(range(trials[0], trials[-1] + 1)) and len(trials) > 2
    return f"trials {trials[0]} to {trials[-1]}" if whole else f"trials {', '.join(map(str, trials))}"


def check_listed(study: Study, dataset: str, trials: Sequence[int]) -> None:
    """Refuse a data set that `study` in params.yaml does not run, or trials that it does not list, with the remedy."""
    layout = study.dataset(dataset).layout
    if layout != "regdb":
        raise StudyError(f"{dataset} has layout {layout}, which has one split; trials are those of layout regdb")
    check_switched_on(study, dataset)
    require_listed("trials", study.study.trials, trials)


def check_switched_on(study: Study, dataset: str) -> None:
    """Refuse a data set that `study` in params.yaml does not run, with the remedy."""
    layout = study.dataset(dataset).layout
    listed = getattr(study.study, layout)
    if dataset not in listed:
        raise StudyError(
            f"params.yaml: study.{layout} is {list(listed)}, without {dataset}; add it there"
            + (" (or call `python -m tools.profile paper`)" if dataset == layout else "")
        )


def require_listed(key: str, listed: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Refuse what the list `study.<key>` in params.yaml lacks: the pipeline has no stage for it."""
    missing = [each for each in wanted if each not in listed]
    if missing:
        named = describe(missing) if key == "trials" else ", ".join(map(str, missing))
        both = [*listed, *missing]
        raise StudyError(
            f"params.yaml: study.{key} is {list(listed)}, without {named}; set "
            f"`{key}: [{', '.join(map(str, both if key == 'variants' else sorted(both)))}]` in its block `study`, then "
            "call this again"
        )


def stages(root: Path, study: Study, dataset: str, trial: int) -> list[str]:
    """Names, as DVC resolves them, of the stages that finish the runs of one trial, in the tables' order."""
    runs = [(dataset, variant, trial, seed) for variant in study.study.variants for seed in study.study.seeds]
    return stage_names(root, STAGE, runs)


def stage_names(root: Path, family: str, runs: Iterable[tuple[str, str, int, int]]) -> list[str]:
    """Names, as DVC resolves them, of the stages of this family for runs (data set, variant, trial, seed)."""
    matrix = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][family]["matrix"]
    items = [dict(zip(("dataset", "variant", "trial", "seed"), run, strict=True)) for run in runs]
    return [f"{family}@{'-'.join(str(item[key]) for key in matrix)}" for item in items]


def dvc(root: Path, *arguments: str) -> int:
    """Run a DVC command of this environment in the project's folder and return its exit status."""
    words = bound([sys.executable, "-m", "dvc", *arguments])
    with stopped_as_an_exception(), subprocess.Popen(words, cwd=root) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()  # the notebook's runner notices that its DVC is gone, and takes its kernel with it
            raise


def stale(root: Path, names: Sequence[str] = ()) -> list[str]:
    """Which stages, of these and of what they depend on (of all, without names), DVC calls out of date."""
    words = [sys.executable, "-m", "dvc", "status", "--json", *(["--with-deps"] if names else []), *names]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StudyError(f"`dvc status` ended with {done.returncode}: {done.stderr.strip()}")
    return sorted(json.loads(done.stdout or "{}"))


def run(study: Study, dataset: str, trials: Sequence[int], root: Path = ROOT, *, keep_going: bool = False) -> None:
    """Bring the runs of these trials up to date, trial after trial.

    Stops at the first trial that fails, or with `keep_going` goes on to the others. Raises StudyError before anything
    starts, see `check_listed`, when a trial failed, and when stages are out of date at the end.
    """
    check_listed(study, dataset, trials)
    by_trial = {trial: stages(root, study, dataset, trial) for trial in trials}
    options = ["--keep-going"] * keep_going
    failed = []
    for number, (trial, names) in enumerate(by_trial.items(), 1):
        print(f"{dataset}, trial {trial} ({number} of {len(trials)}), {len(names)} runs", flush=True)
        status = dvc(root, "repro", *options, *names)
        if status:
            failed.append(trial)
            if not keep_going:
                break
    if failed:
        raise StudyError(f"{dataset}, {describe(failed)} failed, see above; a second call goes on there")
    everything = [name for names in by_trial.values() for name in names]
    if found := stale(root, everything):
        raise StudyError(f"after the runs DVC calls these stages out of date: {', '.join(found)}; call this again")
    left = [trial for trial in study.study.trials if trial not in trials]
    rest = f"{describe(left)}, which params.yaml lists too, and then the tables" if left else "the tables"
    print(f"{dataset}, {describe(trials)}: all {len(everything)} runs are up to date; `dvc repro` makes {rest}")


@command("tools.trials")
def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.trials", description="Run some of RegDB's trials.")
    parser.add_argument("trials", help="1-10, 3 or 1,4,7")
    parser.add_argument("--dataset", default="regdb", help="regdb (default) or synth_regdb")
    parser.add_argument("--keep-going", action="store_true", help="go on with the next trial when one fails")
    options = parser.parse_args(arguments)
    study, trials = load_study(root / "params.yaml"), parse_trials(options.trials)
    run(study, options.dataset, trials, root, keep_going=options.keep_going)
    return 0


if __name__ == "__main__":
    sys.exit(main())
