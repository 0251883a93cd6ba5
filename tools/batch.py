"""Many runs at once through Ray, on the cores or GPUs of this machine or of a cluster.

    python -m tools.batch --datasets regdb --variants baseline,b_ml_cc --trials 1-10 --seeds 0-2
    python -m tools.batch --datasets synth_regdb --cpus-per-run 4
    python -m tools.batch --address auto          on the cluster this machine belongs to; docs/SCALE.md

A run is one Ray task that executes the commands of its stages in dvc.yaml, resolved by DVC, in the project's folder,
which all machines of a cluster share. What the runs start from (stores, weights) is made first, by `dvc repro`; what is
up to date already is left alone. A run whose machine is lost starts again elsewhere and goes on from its checkpoint.
Each finished run is entered in dvc.lock at once. When none that params.yaml lists is left, `dvc repro` makes the tables
from them and `dvc status` is clean; a call that was interrupted is gone on with by a second one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from danet_core.config import Study, load_study
from danet_core.files import StudyError, atomic_write_text, exclusive
from tools import ROOT
from tools.command import at_least, command
from tools.trials import check_switched_on, dvc, parse_numbers, parse_trials, require_listed, stage_names, stale

FAMILIES = ("train", "evaluate")  # the stages of a run, in order
BEFORE_TABLES = tuple(f"{family}_" for family in ("prepare", "pack", "weights", *FAMILIES))
HIGHEST_SEED = 9999
PAUSE = 20.0  # seconds before a run's second attempt, twice that before its third: what was lost may still be dying
SUMMARY = 60.0  # seconds between two lines on what is running, where there is no terminal to draw a table on
STORE = 100 * 2**20  # bytes of Ray's object store on this machine; what tasks exchange here is a sentence
EPOCH = re.compile(r"^epoch +(\d+)/(\d+) ", re.MULTILINE)
INSTALL = "`make extras`, or `pip install --require-hashes -r requirements-extras.lock`, installs it"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run as DVC resolves it; `outs` are relative to the project's folder."""

    name: str
    command: str
    outs: tuple[str, ...]


@dataclasses.dataclass
class Run:
    """One run: the stages it still has to go through, and how far it is."""

    name: str  # synth_regdb/baseline-t1-s0
    stages: tuple[Stage, ...]
    log: Path
    state: str = "waiting"  # running, done, failed
    attempt: int = 0
    read_from: int = 0  # where in the log this attempt begins
    where: str = ""  # its node and stage, then its epoch or what went wrong


# -- which runs, and what DVC says of them ---------------------------------------------------------------------------


def chosen_runs(
    study: Study, datasets: Sequence[str], variants: Sequence[str], trials: Sequence[int], seeds: Sequence[int]
) -> list[tuple[str, str, int, int]]:
    """The runs (data set, variant, trial, seed) of these lists; a data set of layout sysu has trial 1 only.

    Raises StudyError for unknown names, and for what `study` in params.yaml does not list: the pipeline, and with it
    `dvc status` and the tables, would know nothing of such a run.
    """
    runs = []
    for dataset in datasets:
        of_layout = trials if study.dataset(dataset).layout == "regdb" else (1,)
        for variant, trial, seed in itertools.product(variants, of_layout, seeds):
            study.run(dataset, variant, trial, seed)
            runs.append((dataset, variant, trial, seed))
        check_switched_on(study, dataset)
        if of_layout is trials:
            require_listed("trials", study.study.trials, trials)
    require_listed("variants", study.study.variants, variants)
    require_listed("seeds", study.study.seeds, seeds)
    return runs


def planned(root: Path, study: Study, runs: Sequence[tuple[str, str, int, int]]) -> list[Run]:
    """Each run with those of its stages that are to be executed: none, its evaluation, or both.

    What they start from has been brought up to date before; raises StudyError when that failed.
    """
    from dvc.repo import Repo

    names = {
        run: [stage_names(root, f"{family}_{study.dataset(run[0]).layout}", [run])[0] for family in FAMILIES]
        for run in runs
    }
    wanted = [name for both in names.values() for name in both]
    with contextlib.chdir(root), Repo() as repo:  # DVC looks for a stage from the working directory
        known = {stage.addressing: stage for name in wanted for stage in repo.stage.collect(name, with_deps=True)}
    before = [name for name in known if name not in wanted]
    if before and dvc(root, "repro", *before):
        raise StudyError("what the runs start from could not be made, see above; `dvc repro` says the same")
    old = set(stale(root, wanted))
    found = []
    for chosen, both in names.items():
        name = f"{chosen[0]}/{study.run(*chosen).name}"
        first = next((place for place, each in enumerate(both) if each in old), len(both))
        stages = tuple(
            Stage(each, known[each].cmd, tuple(out.def_path for out in known[each].outs)) for each in both[first:]
        )
        found.append(Run(name, stages, root / "build/batch" / f"{name}.log", "waiting" if stages else "done"))
    return found


def inputs(root: Path, stages: Iterable[Stage]) -> dict[str, dict[str, Any]]:
    """By stage: hashes and parameters of what it depends on now, but for what the runs themselves make."""
    from dvc.repo import Repo

    stages = list(stages)
    made = {out for stage in stages for out in stage.outs}
    found = {}
    with contextlib.chdir(root), Repo() as repo:  # DVC looks for a stage from the working directory
        for stage in stages:
            (each,) = repo.stage.collect(stage.name)
            each.save_deps(allow_missing=True)
            found[stage.name] = {dep.def_path: dep.dumpd() for dep in each.deps if dep.def_path not in made}
    return found


def enter(root: Path, runs: Sequence[Run], before: dict[str, dict[str, Any]]) -> None:
    """Enter finished runs in dvc.lock; one whose code, data or parameters were changed meanwhile fails instead."""
    after = inputs(root, (stage for run in runs for stage in run.stages))
    for run in runs:
        changed = {
            path
            for stage in run.stages
            for path, value in after[stage.name].items()
            if before[stage.name].get(path) != value
        }
        if changed:
            run.state, run.where = "failed", f"{', '.join(sorted(changed))} changed while it ran; call this again"
    names = [stage.name for run in runs if run.state == "done" for stage in run.stages]
    if names and dvc(root, "commit", "--quiet", "--force", *names):
        raise StudyError(f"`dvc commit` failed, see above; call it with --force for {' '.join(names)}")


# -- on a worker -----------------------------------------------------------------------------------------------------


def work(
    root: Path, stages: Sequence[Stage], log: Path, attempt: int, pause: float, extra: dict[str, str]
) -> str | None:
    """Execute a run's stages, their output appended to `log`; None, or a sentence on what went wrong.

    `pause` is in seconds, `extra` are environment variables.

    As DVC does, a stage's old outputs are removed before it starts. Only then does the log name the stage: at a later
    attempt outputs of a stage that is named there are new, and it is not executed again.
    """
    node = socket.gethostname()
    if not log.exists():
        return f"{node} has no {log}; every machine needs the project's folder, at the same place (docs/SCALE.md)"
    time.sleep(pause)
    environment = {**os.environ, **extra}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with log.open("a", encoding="utf-8") as stream:

        def note(line: str) -> None:
            print(line, file=stream, flush=True)
            os.fsync(stream.fileno())

        for stage in stages:
            if f"batch: {stage.name} starts" in log.read_text(encoding="utf-8", errors="replace"):
                if all((root / out).exists() for out in stage.outs):
                    note(f"batch: {stage.name} had been finished before attempt {attempt}")
                    continue
            else:
                for out in stage.outs:
                    (root / out).unlink(missing_ok=True)
            note(f"batch: {stage.name} starts, attempt {attempt} on {node}, process {os.getpid()}")
            # No shell in between: the notebook's runner watches this process, and ends when it is gone.
            done = subprocess.run(
                shlex.split(stage.command),
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                check=False,
            )
            if done.returncode:
                note(f"batch: {stage.name} ended with {done.returncode}")
                return f"{stage.name} ended with {done.returncode}"
            note(f"batch: {stage.name} is done")
    return None


# -- the runs together -----------------------------------------------------------------------------------------------


def watch(run: Run) -> None:
    """Read from its log whether a run that was handed to Ray has started, where, and in which epoch it is."""
    with run.log.open("rb") as stream:
        stream.seek(run.read_from)
        text = stream.read().decode("utf-8", errors="replace")
    starts = re.findall(r"^batch: (\w+)@\S+ starts, attempt \d+ on (\S+),", text, re.MULTILINE)
    if starts:
        family, node = starts[-1]
        what, epochs = family.split("_")[0], EPOCH.findall(text)
        run.state = "running"
        run.where = f"{node}  {what}" + (f"  epoch {'/'.join(epochs[-1])}" if epochs and what == "train" else "")


@contextlib.contextmanager
def display(runs: Sequence[Run], terminal: bool) -> Iterator[Any]:
    """Yield what to call after each look at the runs: it redraws a table, or prints what is new in plain lines."""
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        drawn = Table(caption=counts(runs), caption_justify="left", header_style="bold")
        for column in ("run", "state", "attempt", ""):
            drawn.add_column(column)
        for run in sorted(runs, key=lambda run: ("running", "failed", "waiting", "done").index(run.state)):
            drawn.add_row(run.name, run.state, str(run.attempt or ""), run.where)
        return drawn

    if terminal:
        with Live(table(), auto_refresh=False) as live:
            yield lambda: live.update(table(), refresh=True)
        return
    said = {run.name: ("", 0) for run in runs}
    last = time.monotonic()

    def lines() -> None:
        nonlocal last
        for run in runs:
            now = run.state, run.attempt
            if said[run.name] != now and run.state != "waiting":
                attempt = f" (attempt {run.attempt})" if run.attempt > 1 else ""
                print(f"{run.state:<8} {run.name}{attempt}  {run.where}".rstrip(), flush=True)
            said[run.name] = now
        if time.monotonic() - last >= SUMMARY:
            last = time.monotonic()
            under_way = [f"{run.name}: {run.where}" for run in runs if run.state == "running"]
            print("; ".join([counts(runs), *under_way]), flush=True)

    yield lines


def counts(runs: Sequence[Run]) -> str:
    """`2 running, 5 waiting, 3 done`."""
    found = Counter(run.state for run in runs)
    return ", ".join(f"{found[state]} {state}" for state in ("running", "waiting", "done", "failed") if found[state])


def resources(options: argparse.Namespace) -> dict[str, float]:
    """What Ray reserves for one run: what was asked for, else one GPU where the cluster has any, else one CPU core.

    Raises StudyError when this machine, without a cluster, has less than one run needs.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 1 if options.cpus_per_run is None and any(node.get("GPU") for node in nodes) else 0
    wanted = {"CPU": options.cpus_per_run or 1, "GPU": gpus}
    for kind, number in wanted.items():
        most = max(node.get(kind, 0) for node in nodes)
        if number > most:
            if not options.address:
                raise StudyError(
                    f"a run was to have {number:g} {kind}s, and this machine has {most:g}; lower "
                    f"--{kind.lower()}s-per-run, or name a cluster with --address"
                )
            print(f"no machine of the cluster has {number:g} {kind}s now; the runs wait until one joins", flush=True)
    return {f"num_{kind.lower()}s": number for kind, number in wanted.items()}


def execute(root: Path, runs: Sequence[Run], per_run: dict[str, float], retries: int, show: Any) -> None:
    """Hand the runs to Ray, try each again that fails or is lost, and enter each in dvc.lock when it is done."""
    import ray

    before = inputs(root, (stage for run in runs for stage in run.stages))
    task = ray.remote(max_retries=0, **per_run)(work)
    environment = {"OMP_NUM_THREADS": str(per_run["num_cpus"])}
    if not per_run["num_gpus"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides the GPUs of others only from runs that have one
    under_way: dict[Any, Run] = {}

    def submit(run: Run) -> None:
        run.state, run.attempt, run.read_from = "waiting", run.attempt + 1, run.log.stat().st_size
        pause = PAUSE * (run.attempt - 1)
        under_way[task.remote(root, run.stages, run.log, run.attempt, pause, environment)] = run

    for run in runs:
        atomic_write_text(run.log, "")
        submit(run)
    while under_way:
        ended, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=1)
        finished = []
        for reference in ended:
            run = under_way.pop(reference)
            try:
                wrong = ray.get(reference)
            except ray.exceptions.RayError as error:
                wrong = f"lost with its worker ({type(error).__name__})"
            if wrong is None:
                run.state, run.where = "done", ""
                finished.append(run)
            elif run.attempt > retries:
                run.state, run.where = "failed", f"{wrong}; see {run.log.relative_to(root)}"
            else:
                run.where = wrong
                submit(run)
        for run in under_way.values():
            watch(run)
        if finished:
            enter(root, finished, before)
        show()


def start_ray(address: str | None) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine alone; it ends with this process.

    Raises StudyError when Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import rich  # noqa: F401 (looked for now, not when the first run is to be shown)
    except ModuleNotFoundError as error:
        raise StudyError(f"python -m tools.batch needs {error.name}, which is not installed here; {INSTALL}") from None
    common = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **common)
    except Exception as error:  # what Ray raises for a start that takes too long
        reason = str(error).strip().partition("\n")[0]
        where = address or "this machine"
        remedy = "check the address with `ray status`" if address else "call this again when the machine is less busy"
        raise StudyError(f"Ray does not answer on {where} ({reason}); {remedy}") from None


def run(options: argparse.Namespace, root: Path) -> None:
    """Bring the asked-for runs up to date. Raises StudyError when one failed, and as the functions above do."""
    import logging

    study = load_study(root / "params.yaml")
    lists = study.study
    chosen = chosen_runs(
        study,
        options.datasets.split(",") if options.datasets is not None else lists.datasets,
        options.variants.split(",") if options.variants is not None else lists.variants,
        parse_trials(options.trials) if options.trials is not None else lists.trials,
        parse_numbers(options.seeds, "seeds", 0, HIGHEST_SEED) if options.seeds is not None else lists.seeds,
    )
    start_ray(options.address)
    import ray

    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        per_run = resources(options)
        with exclusive(root / "build/batch/lock", "a batch of runs"):
            runs = planned(root, study, chosen)
            todo = [each for each in runs if each.stages]
            print(f"{len(runs)} runs, {len(runs) - len(todo)} up to date already", flush=True)
            if todo:
                with display(runs, sys.stdout.isatty()) as show:
                    execute(root, todo, per_run, options.retries, show)
            if failed := [each for each in runs if each.state == "failed"]:
                for each in failed:
                    print(f"{each.name}: {each.where}", file=sys.stderr)
                raise StudyError(f"{counts(runs)}; a second call goes on there")
            if left := stale(root, [stage.name for each in todo for stage in each.stages]) if todo else []:
                raise StudyError(f"after the runs DVC calls these stages out of date: {', '.join(left)}; call again")
    finally:
        ray.shutdown()
    print(f"all {len(runs)} runs are up to date", flush=True)
    make_the_rest(root)


def make_the_rest(root: Path) -> None:
    """`dvc repro` for what is made of runs, unless one that params.yaml lists is left; then say so.

    Raises StudyError when it fails.
    """
    rest = stale(root)
    if left := [name for name in rest if name.startswith(BEFORE_TABLES)]:
        print(f"params.yaml lists others, {len(left)} of their stages; `dvc repro` makes them, and then the tables")
    elif rest and (status := dvc(root, "repro")):
        raise StudyError(f"all runs are there, but `dvc repro` of the tables ended with {status}, see above")


@command("tools.batch")
def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.batch",
        description="Run many runs at once through Ray.",
        epilog="What is left out is what `study` in params.yaml lists.",
    )
    parser.add_argument("--datasets", metavar="A,B", help="names of data sets")
    parser.add_argument("--variants", metavar="A,B", help="names of variants")
    parser.add_argument("--trials", metavar="1-10", help="splits of layout regdb, also 3 or 1,4,7; layout sysu has one")
    parser.add_argument("--seeds", metavar="0-2", help="also 3 or 1,4,7")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="a cluster's address, or `auto` on one of its machines; without it this machine alone (also RAY_ADDRESS)",
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--cpus-per-run", type=at_least(1), metavar="N", help="CPU cores, and threads, of a run on a CPU"
    )
    share.add_argument(
        "--gpus-per-run", type=at_least(0, float), metavar="N", help="GPUs of a run; 0.5 puts two runs on each"
    )
    parser.add_argument(
        "--retries", type=at_least(0), default=2, metavar="N", help="further attempts at a run (default 2)"
    )
    run(parser.parse_args(arguments), root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
