"""Processes end when the processes that started them are gone, also by SIGKILL; and how many may run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

BATCH = "STUDY_BATCH"  # environment variable with the process id of tools.batch, for the stages that it starts


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def exit_with_parent() -> None:
    """For a worker process: end it when its parent is gone, also if that happened before this call."""
    parent = multiprocessing.parent_process()
    _exit_with([os.getppid() if parent is None or parent.pid is None else parent.pid])


@functools.cache
def exit_with_pipeline() -> None:
    """For a stage: end this process when papermill, DVC or the batch that started it is gone.

    A kernel only watches papermill itself. Outside the pipeline, in JupyterLab or a script, this does nothing.
    """
    if "DVC_STAGE" not in os.environ:
        return
    started_by = []
    for ancestor in psutil.Process().parents():  # kernel <- papermill <- shell <- dvc
        started_by.append(ancestor.pid)
        if any(Path(word).stem == "dvc" for word in ancestor.cmdline()):
            _exit_with(started_by + [int(pid) for pid in [os.environ.get(BATCH)] if pid])
            return
    _exit()


def _exit_with(pids: list[int]) -> None:
    """Look every second. A zombie, ended but not yet waited for, counts as gone."""
    try:
        processes = [psutil.Process(pid) for pid in pids]
    except psutil.NoSuchProcess:
        _exit()

    def watch() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            time.sleep(1)
        _exit()

    threading.Thread(target=watch, daemon=True).start()


def _exit() -> NoReturn:
    print("stopped: the process that started this one is gone", file=sys.stderr, flush=True)
    os._exit(1)
