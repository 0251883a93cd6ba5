"""The readings study as a batch: `python -m tools.readings --rows all --jobs 4`, whatever params.yaml switches on.

What is executed are the commands of the pipeline's stages (dvc.yaml has them once), one process of one thread per run,
`--jobs` at a time, the longest first. A run that is done already, with these numbers, data and code, costs nothing; an
interrupted one goes on from its checkpoint. At the end come the table, the forest plot and docs/READINGS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from danet_core.config import RunConfig, Study, load_study
from danet_core.files import StudyError, exclusive, read_entry, sha256_file, sha256_json
from danet_core.record import SOURCES, RunFolder, fingerprint
from danet_core.store import PackedStore
from tools import ROOT
from tools.command import at_least, command
from tools.parent import bound, stopped_as_an_exception

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def rows_of(study: Study, text: str) -> list[str]:
    """The rows that have to be trained for the named ones and for those they are compared with, in the file's order.

    `text` is `all` or names with commas between them; StudyError for a name that params.yaml does not have.
    """
    names = list(study.readings.rows) if text == "all" else text.split(",")
    wanted = {study.trained_row(name) for name in names}
    wanted |= {study.trained_row(other) for name in names if (other := study.readings.rows[name].against)}
    return [name for name in study.readings.rows if name in wanted]


def commands(root: Path, stage: str, item: dict[str, Any], dataset: str) -> list[list[str]]:
    """The words of a stage's commands in dvc.yaml, with this interpreter for `python`."""
    template = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["cmd"]
    values = {**{f"item.{key}": value for key, value in item.items()}, "readings.dataset": dataset}
    found = []
    for line in [template] if isinstance(template, str) else template:
        for key, value in values.items():
            line = line.replace(f"${{{key}}}", str(value))
        words = shlex.split(line)
        found.append([sys.executable if words[0] == "python" else words[0], *words[1:]])
    return found


def is_trained(config: RunConfig, data_sha256: str, weights_sha256: str, root: Path) -> bool:
    """Whether the run is finished, with these numbers, data, backbone weights and code."""
    folder = RunFolder.of(config, root / "runs", root / "build")
    if not (folder.record.exists() and folder.model.exists()):
        return False
    expected = fingerprint(config, data_sha256, weights_sha256), sha256_json(SOURCES), sha256_file(folder.model)
    return expected == (
        read_entry(folder.record, "provenance", "fingerprint"),
        read_entry(folder.record, "versions", "train_code_sha256"),
        read_entry(folder.record, "provenance", "model_sha256"),
    )


def is_scored(config: RunConfig, root: Path) -> bool:
    """Whether the metrics record is that of the finished run, under the evaluation of params.yaml."""
    path = root / "results" / config.metrics
    if not path.exists():
        return False
    run = RunFolder.of(config, root / "runs", root / "build").record
    expected = read_entry(run, "provenance", "model_sha256"), config.resolved(), dataclasses.asdict(config.evaluation)
    return expected == (
        read_entry(path, "provenance", "model_sha256"),
        read_entry(path, "config"),
        read_entry(path, "evaluation"),
    )


class Batch:
    """Runs commands in processes of one thread; `stop` ends those that are running and lets no other start."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def call(self, found: Sequence[Sequence[str]], log: Path) -> str | None:
        """Run the commands one after the other, their output in `log`, a new one; None, or how one of them failed."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            for words in found:
                with self._lock:
                    if self._stopped:
                        return "stopped"
                    # A session of its own: ^C comes to this process only, which then ends them all with SIGTERM.
                    child = subprocess.Popen(
                        bound(words),
                        cwd=self._root,
                        env={**os.environ, **ONE_THREAD},
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                    self._children.add(child)
                status = child.wait()
                with self._lock:
                    self._children.discard(child)
                if status:
                    last = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
                    return f"status {status}, {last or 'without a word'}"
        return None

    def stop(self) -> None:
        """SIGTERM to what is running: a training run ends after its epoch, with a checkpoint."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()


def run(study: Study, rows: Sequence[str], jobs: int, root: Path) -> int:
    """Bring the runs of these rows up to date, then table, plot and page; the exit status.

    Raises StudyError, before anything starts, where the data set is not packed, and after the others when a run failed.
    """
    dataset = study.readings.dataset
    store = PackedStore.open(root / "data/packed" / dataset, verify=False)
    weights = root / "data/weights" / f"{dataset}.safetensors"
    if not weights.exists():
        raise StudyError(f"{weights} is missing; `dvc repro` makes it")
    hashes = store.meta["content_sha256"], sha256_file(weights)
    tasks: list[tuple[RunConfig, list[list[str]]]] = []
    for config in [study.reading(row, seed) for seed in study.readings.seeds for row in rows]:
        assert config.reading is not None
        item = {"row": config.reading, "seed": config.seed}
        alike = [
            study.reading(name, config.seed)
            for name in study.readings.rows
            if study.trained_row(name) == config.reading
        ]
        score = commands(root, "readings_score", item, dataset)
        if not is_trained(config, *hashes, root):
            tasks.append((config, commands(root, "readings_train", item, dataset) + score))
        elif not all(is_scored(one, root) for one in alike):
            tasks.append((config, score))
    total = len(rows) * len(study.readings.seeds)
    print(f"{dataset}: {total} runs, {total - len(tasks)} of them done, {jobs} at a time", flush=True)
    tasks.sort(key=lambda task: -task[0].epochs * task[0].dataset.recipe.steps_per_epoch)
    failed = _run_all(tasks, jobs, root)
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(tasks)} runs failed: {', '.join(failed)}; their logs are in build/readings, and a "
            "second call goes on there"
        )
    for words in commands(root, "readings", {"dataset": dataset}, dataset):
        if status := subprocess.run(words, cwd=root, check=False).returncode:
            return status
    return 0


def _run_all(tasks: Sequence[tuple[RunConfig, list[list[str]]]], jobs: int, root: Path) -> list[str]:
    """Run the tasks, each with a log in build/readings; names of those that failed, whose reason is printed."""
    batch, failed, started = Batch(root), [], time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(batch.call, found, root / "build/readings" / f"{config.name}.log"): config.name
            for config, found in tasks
        }
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                name, wrong = waiting[done], done.result()
                minutes = (time.monotonic() - started) / 60
                word = "failed" if wrong else "done"
                print(f"{number} of {len(tasks)}  {name} {word}  {minutes:.1f} min", flush=True)
                if wrong:
                    failed.append(name)
                    print(f"{name}: {wrong}", file=sys.stderr)
        except BaseException:
            batch.stop()  # leaving the block waits for them
            raise
    return failed


@command("tools.readings")
def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.readings", description="Run the readings study.")
    parser.add_argument("--rows", default="all", help="all (default) or rows of params.yaml, with commas between them")
    help = "runs at a time; default: one per core"
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help=help)
    options = parser.parse_args(arguments)
    study = load_study(root / "params.yaml")
    with exclusive(root / "build/readings/lock", "the readings study"), stopped_as_an_exception():
        return run(study, rows_of(study, options.rows), options.jobs, root)


if __name__ == "__main__":
    sys.exit(main())
