"""The reference study: the embedded benchmark on the seeds of `reference` in params.yaml, beside the quick default.

    python -m tools.reference

It runs the pipeline's own stages, one after the other, in a copy of the project below `build/reference`, which starts
with this project's data, weights and finished runs: what is up to date there is not made again. The project's own
params.yaml, dvc.lock and results stay as they are. Interrupted, a second call goes on where the first one was. When
all is there, metrics, tables and figures go to `results/reference/<data set>`, all or none, and README.md shows them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from danet_core.config import Study, load_study
from danet_core.files import StudyError, exclusive, read_entry, replace_folder
from danet_core.scores import run_name
from tools import ROOT, checkout, profile, readme
from tools.command import command
from tools.parent import bound
from tools.verify import CODE, copy_code, environment

STUDY = (*CODE, "dvc.yaml", ".dvc/config", ".dvcignore")
SHOWN = ("metrics", "tables", "figures")
Runs = dict[str, list[str]]


def listed(study: Study) -> Runs:
    """The names of the reference's runs by data set.

    Raises StudyError when `study` in params.yaml lists a data set that is not rendered, or none.
    """
    datasets = study.study.datasets
    if not datasets or not all(study.dataset(name).synthetic for name in datasets):
        raise StudyError(
            f"params.yaml: the reference is of rendered data sets, found {', '.join(datasets) or 'none'} in `study`; "
            "run `make embedded` first"
        )
    trials = {name: (1,) if study.dataset(name).layout == "sysu" else study.study.trials for name in datasets}
    return {
        name: [
            run_name(variant, trial, seed)
            for variant in study.study.variants
            for trial in trials[name]
            for seed in study.reference.seeds
        ]
        for name in datasets
    }


def prepare(copy: Path, study: Study, root: Path = ROOT) -> None:
    """Bring the code in `copy` up to date; where there is no copy, make it, whole or not at all, with what is finished.

    Packed images are linked where the file system can, since whatever makes them anew writes new files.
    """
    if not copy.exists():
        new = copy.with_name(f".{copy.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for name in study.study.datasets:
            for place in (f"data/prepared/{name}", f"data/packed/{name}", f"data/weights/{name}.safetensors"):
                _take(root / place, new / place, link=True)
            for place in (f"runs/{name}", *(f"results/{name}/{shown}" for shown in SHOWN)):
                _take(root / place, new / place)
        _take(root / "dvc.lock", new / "dvc.lock")
        new.mkdir(parents=True, exist_ok=True)
        new.rename(copy)
    copy_code(copy, root, STUDY)
    profile.switch(copy / "params.yaml", {"seeds": study.reference.seeds})
    # The copy lies in a folder that git ignores, where DVC refuses to work with git.
    (copy / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    checkout.unlock(copy)


def _take(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file or folder, where it is there."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link if link else shutil.copy2)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        (_link if link else shutil.copy2)(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def outlook(copy: Path, runs: Runs) -> str:
    """How many runs are there and how long the others will take, judged by those."""
    records = {(name, run): copy / "runs" / name / run / "record.json" for name in runs for run in runs[name]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for (name, _), path in records.items():
        if path.exists():
            seconds[name].append(read_entry(path, "seconds"))
    missing = {name: len(runs[name]) - len(seconds[name]) for name in runs}
    said = f"{len(records) - sum(missing.values())} of {len(records)} runs are there, {sum(missing.values())} to train"
    if any(missing[name] and not seconds[name] for name in runs):
        return f"{said}; how long that takes is not known yet: there is no finished run to judge by"
    minutes = sum(missing[name] * sum(seconds[name]) / max(1, len(seconds[name])) for name in runs) / 60
    return f"{said}: about {minutes:.0f} minutes of training, judged by those, then scores, tables and figures"


def run(copy: Path, study: Study) -> None:
    """`dvc repro` of tables and figures in the copy, as `make repro` runs it: same order, same number of threads.

    Raises StudyError when a stage fails.
    """
    made = [(what, study.dataset(name).layout, name) for what in ("tables", "figures") for name in study.study.datasets]
    stages = [f"{what}_{layout}@{name}" for what, layout, name in made]
    words = bound([sys.executable, "-m", "dvc", "repro", *stages])
    done = subprocess.run(words, cwd=copy, env=environment(copy), check=False)
    if done.returncode:
        raise StudyError(
            f"`dvc repro` ended with {done.returncode} in {copy}, see above; put that right and call again: it goes on "
            "where it was"
        )


def publish(copy: Path, runs: Runs, root: Path = ROOT) -> Path:
    """Put the copy's results into the project's `results/reference`, all or none; that folder.

    Raises StudyError when the scores of a run are missing.
    """
    new = root / "build" / ".reference.results"
    shutil.rmtree(new, ignore_errors=True)
    for name, names in runs.items():
        results = copy / "results" / name
        for one in names:
            if not (results / "metrics" / f"{one}.json").exists():
                raise StudyError(f"{results / 'metrics'} has no scores of {one}; remove {copy} and call again")
        for shown in SHOWN:
            (new / name / shown).mkdir(parents=True)
        for one in names:  # and no run that is not of the reference
            shutil.copyfile(results / "metrics" / f"{one}.json", new / name / "metrics" / f"{one}.json")
        for shown in ("tables", "figures"):
            shutil.copytree(results / shown, new / name / shown, dirs_exist_ok=True)
    final = root / "results" / "reference"
    replace_folder(new, final)
    return final


def make(root: Path = ROOT) -> None:
    """Make the reference study of the project in `root`, and say how far it is."""
    study = load_study(root / "params.yaml")
    runs, copy = listed(study), root / "build" / "reference"
    with exclusive(root / "build" / ".reference.lock", "the reference study"):
        prepare(copy, study, root)
        print(f"The reference study, seeds {', '.join(map(str, study.reference.seeds))}: {outlook(copy, runs)}.")
        print("Interrupt it when you like: a second call goes on.", flush=True)
        run(copy, study)
        final = publish(copy, runs, root)
    print(f"{final.relative_to(root)} is written")
    if readme.update(root):
        print("README.md: results rewritten")


@command("tools.reference")
def main(arguments: Sequence[str] = (), root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    description = "The embedded study on the seeds of `reference` in params.yaml, into results/reference."
    argparse.ArgumentParser(prog="python -m tools.reference", description=description).parse_args(arguments)
    make(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
