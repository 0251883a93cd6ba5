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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from danet_core.config import RunConfig, Study, load_study
from danet_core.files import StudyError, exclusive, read_json, sha256_file, sha256_json
from danet_core.record import SOURCES, RunFolder, fingerprint
from danet_core.store import PackedStore
from tools import ROOT
from tools.command import ended

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
    record = read_json(folder.record)
    expected = fingerprint(config, data_sha256, weights_sha256), sha256_json(SOURCES), sha256_file(folder.model)
    provenance = record["provenance"]
    return expected == (
        provenance["fingerprint"],
        record["versions"]["train_code_sha256"],
        provenance["model_sha256"],
    )


def is_scored(config: RunConfig, root: Path) -> bool:
    """Whether the metrics record is that of the finished run, under the evaluation of params.yaml."""
    path = root / "results" / config.metrics
    if not path.exists():
        return False
    record, run = read_json(path), read_json(RunFolder.of(config, root / "runs", root / "build").record)
    same_model = record["provenance"]["model_sha256"] == run["provenance"]["model_sha256"]
    return same_model and (record["config"], record["evaluation"]) == (
        config.resolved(),
        dataclasses.asdict(config.evaluation),
    )


class Batch:
    """Runs commands in processes of one thread; `stop` ends those that are running and lets no other start."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def call(self, found: Sequence[Sequence[str]], log: Path) -> bool:
        """Run the commands one after the other, their output in `log`; whether all ended well."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            for words in found:
                with self._lock:
                    if self._stopped:
                        return False
                    # A session of its own: ^C comes to this process only, which then ends them all with SIGTERM.
                    child = subprocess.Popen(
                        words,
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
                    return False
        return True

    def stop(self) -> None:
        """SIGTERM to what is running: a training run ends after its epoch, with a checkpoint."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()


def run(study: Study, rows: Sequence[str], jobs: int, root: Path) -> int:
    """Bring the runs of these rows up to date, then table, plot and page; the exit status.

    Raises StudyError, before anything starts, where the data set is not packed or another batch is running.
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
        print(
            f"error: {len(failed)} of {len(tasks)} runs failed: {', '.join(failed)}; the end of each log in "
            "build/readings says why, and a second call goes on there",
            file=sys.stderr,
        )
        return 1
    for words in commands(root, "readings", {"dataset": dataset}, dataset):
        if status := subprocess.run(words, cwd=root, check=False).returncode:
            return status
    return 0


def _run_all(tasks: Sequence[tuple[RunConfig, list[list[str]]]], jobs: int, root: Path) -> list[str]:
    """Run the tasks, each with a log in build/readings; names of those that failed."""
    batch, failed, started = Batch(root), [], time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(batch.call, found, root / "build/readings" / f"{config.name}.log"): config.name
            for config, found in tasks
        }
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                name = waiting[done]
                if not done.result():
                    failed.append(name)
                minutes = (time.monotonic() - started) / 60
                word = "failed" if name in failed else "done"
                print(f"{number} of {len(tasks)}  {name} {word}  {minutes:.1f} min", flush=True)
        except BaseException:
            batch.stop()  # leaving the block waits for them
            raise
    return failed


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.readings", description="Run the readings study.")
    parser.add_argument("--rows", default="all", help="all (default) or rows of params.yaml, with commas between them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default: one per core")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, found {options.jobs}")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _leave)

    def work() -> int:
        study = load_study(root / "params.yaml")
        with exclusive(root / "build/readings/lock", "the readings study"):
            return run(study, rows_of(study, options.rows), options.jobs, root)

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
