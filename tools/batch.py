"""The stages of dvc.yaml, several at once:  python -m tools.batch [STAGE ...] [--jobs N] [--ray [ADDRESS]]

What `dvc repro` does one by one: a stage that is not up to date starts when those it depends on are done, as
`dvc repro --single-item` in a process of its own. A run has one core; where there are GPUs, it has one to itself.
With --ray, runs go to the machines of a Ray cluster that share this folder: docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import networkx
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from rich.console import Console
from rich.live import Live

from danet_study.files import StudyError, exclusive
from danet_study.processes import cores
from tools.job import Job, start, stop
from tools.setup import remove_stale_lock

RUNS = ("train@", "evaluate@")  # stages that want a GPU, or another machine
PATIENCE = 60  # seconds to wait for files that another DVC process uses


class Pipeline:
    """The stages of dvc.yaml: what they depend on, their commands, and which have changed."""

    def __init__(self, targets: list[str]) -> None:
        with Repo(_wait_for_lock=True) as repo:
            names = {stage: stage.addressing for stage in repo.index.stages}
            wanted = {names[stage] for target in targets for stage in repo.stage.collect(target)} or set(names.values())
            graph = networkx.relabel_nodes(repo.index.graph, names)  # an edge leads to a dependency
        graph = graph.subgraph(wanted.union(*(networkx.descendants(graph, stage) for stage in wanted)))
        depth = {stage: len(networkx.descendants(graph, stage)) for stage in graph}
        self.order = sorted(graph, key=lambda stage: -depth[stage])  # a run is scored before the next one starts
        self.needs = {stage: set(graph.successors(stage)) for stage in graph}
        self.commands = {names[stage]: stage.cmd for stage in names}

    def changed(self, stages: list[str]) -> set[str]:
        """Those that `dvc status` does not find up to date."""
        if not stages:
            return set()
        for _ in range(PATIENCE):
            try:
                with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
                    found = [stage for stage in repo.index.stages if stage.addressing in stages]
                    return {stage.addressing for stage in found if stage.status()}
            except LockError:  # stages of a batch that was killed have not ended yet
                time.sleep(1)
                remove_stale_lock()
        raise StudyError("another `dvc` process uses this folder; wait for it, or stop it")


class Batch:
    """Runs the stages of `pipeline` that are not up to date, at most `jobs` at once."""

    def __init__(self, pipeline: Pipeline, jobs: int, gpus: list[str], ray_gpus: float | None) -> None:
        self.pipeline, self.jobs, self.gpus, self.ray_gpus = pipeline, jobs, gpus, ray_gpus
        self.free_gpus, self.started = list(gpus), time.monotonic()
        self.waiting = list(pipeline.order)
        self.stale = pipeline.changed(self.waiting)
        self.running: list[Job] = []
        self.finished, self.ran, self.checked = set[str](), set[str](), set[str]()
        self.failed: dict[str, str] = {}  # "" for a stage that needs a failed one

    def run(self, say: Callable[[str], None], show: Callable[[str], None]) -> None:
        """Run all. `say` gets lines to keep, `show` the present state. SIGINT and SIGTERM end it and all it started."""
        stop_requested: list[int] = []  # an exception in the handler could be lost inside DVC
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: stop_requested.append(received))
        try:
            while (self.waiting or self.running) and not stop_requested:
                self.start_ready(say)
                for job in list(self.running):
                    for line in job.new_epochs():
                        say(f"{job.name}  {line}")
                    status = job.process.poll()
                    if status is not None:
                        self.end(job, status, say)
                lines = [f"{job.name}  {job.epoch or clock(job.started)}" for job in self.running]
                show("\n".join([*lines, self.total()]))
                time.sleep(0.2)
        finally:
            stop(self.running)
        if stop_requested:
            print("batch: interrupted; the next call resumes", file=sys.stderr)
            sys.exit(128 + stop_requested[0])

    def start_ready(self, say: Callable[[str], None]) -> None:
        """Pass over stages that are up to date or need a failed one, and start others as far as there is room."""
        needs = self.pipeline.needs
        for stage in [stage for stage in self.waiting if needs[stage] & self.failed.keys()]:
            self.failed[stage] = ""
            self.waiting.remove(stage)
        ready = [stage for stage in self.waiting if needs[stage] <= self.finished]
        doubtful = [stage for stage in ready if needs[stage] & self.ran and stage not in self.checked]
        self.checked.update(doubtful)  # what they need was made again, perhaps as it was
        self.stale = (self.stale - set(doubtful)) | self.pipeline.changed(doubtful)
        for stage in ready:
            is_run = stage.startswith(RUNS)
            if stage not in self.stale:
                self.waiting.remove(stage)
                self.finished.add(stage)
            elif len(self.running) < self.jobs and (self.free_gpus or not self.gpus or not is_run):
                gpu = self.free_gpus.pop(0) if self.free_gpus and is_run else None
                ray_gpus = self.ray_gpus if is_run else None
                self.waiting.remove(stage)
                self.running.append(start(stage, self.pipeline.commands[stage], gpu=gpu, ray_gpus=ray_gpus))
                say(f"{stage}  starts")

    def end(self, job: Job, status: int, say: Callable[[str], None]) -> None:
        """Note how a stage ended."""
        self.running.remove(job)
        if job.gpu is not None:
            self.free_gpus.append(job.gpu)
        if status == 0:
            self.finished.add(job.stage)
            self.ran.add(job.stage)
            say(f"{job.stage}  done in {clock(job.started)}")
        else:
            self.failed[job.stage] = f"{job.stage} failed: {job.error()} ({job.log})"
            say(self.failed[job.stage])

    def total(self) -> str:
        """One line on all stages."""
        failed = f", {len(self.failed)} failed or not started" if self.failed else ""
        done = f"{len(self.finished)} of {len(self.pipeline.order)} stages done"
        return f"{done}, {len(self.running)} running{failed}, {clock(self.started)}"


def clock(since: float) -> str:
    """Minutes and seconds since a time of time.monotonic()."""
    seconds = round(time.monotonic() - since)
    return f"{seconds // 60}:{seconds % 60:02d}"


def visible_gpus() -> list[str]:
    """The GPUs that CUDA programs may use here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or shutil.which("nvidia-smi") is None:
        return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()


def run_all(options: argparse.Namespace) -> Batch:
    """Set up, and run with a live display on a terminal, or with lines in a log."""
    jobs, gpus, ray_gpus = options.jobs, visible_gpus(), None
    if options.ray:
        import ray

        ray.init(address=options.ray, logging_level="error")
        found = ray.cluster_resources()
        gpus, ray_gpus = [], 1.0 if found.get("GPU") else 0.0
        jobs = jobs or round(found.get("GPU") or found["CPU"])
    remove_stale_lock()
    batch = Batch(Pipeline(options.stages), jobs or cores(), gpus, ray_gpus)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        batch.run(lambda line: print(line, flush=True), lambda text: None)
        return batch
    with Live(console=console, auto_refresh=False) as live:
        keep = lambda line: console.print(line) if " done in " in line or " failed: " in line else None  # noqa: E731
        batch.run(keep, lambda text: live.update(text, refresh=True))
    return batch


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, 1 if a stage failed, 130 or 143 after SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.batch", description="Run stages of dvc.yaml, several at once."
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="tables, evaluate@<run>, ..; default: all")
    parser.add_argument("--jobs", type=int, metavar="N", help=f"stages at once; default: one per core, {cores()}")
    parser.add_argument("--ray", nargs="?", const="auto", metavar="ADDRESS", help="use a Ray cluster")
    options = parser.parse_args(arguments)
    try:
        with exclusive(Path("build/batch.lock"), "the pipeline of this folder"):
            batch = run_all(options)
    except StudyError as error:
        print(f"batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first stage
        return 130
    print(batch.total() if batch.ran or batch.failed else "up to date")
    for sentence in filter(None, batch.failed.values()):
        print(sentence, file=sys.stderr)
    return 1 if batch.failed else 0


if __name__ == "__main__":
    sys.exit(main())
