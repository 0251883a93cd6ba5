"""A stage of the pipeline as a process with a log, here or on a machine of a Ray cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from danet_study.processes import BATCH

LOGS = Path("build/logs")
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
EPOCH = re.compile(r"^epoch +\d+/\d+ ")
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception): |data_prep \w+: |config: |report: |ERROR: )(?!failed to reproduce)")
COLOR = re.compile("\x1b\\[[0-9;]*[A-Za-z]")


@dataclass
class Job:
    """A stage that was started: its process, its log, and how far the log has been read."""

    stage: str
    process: Any  # subprocess.Popen or RayTask
    log: Path
    gpu: str | None = None
    started: float = field(default_factory=time.monotonic)
    read: int = 0
    epoch: str = ""  # the last epoch's line

    @property
    def name(self) -> str:
        """The run, or the stage."""
        return self.stage.removeprefix("train@")

    def new_epochs(self) -> list[str]:
        """Epoch lines that were logged since the last call."""
        with self.log.open("rb") as stream:
            stream.seek(self.read)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        found = [line for line in whole.decode(errors="replace").splitlines() if EPOCH.match(line)]
        self.epoch = found[-1] if found else self.epoch
        return found

    def error(self) -> str:
        """The last line of the log that names an error."""
        lines = COLOR.sub("", self.log.read_text(encoding="utf-8", errors="replace")).splitlines()
        return next((line for line in reversed(lines) if ERROR.match(line)), "it ended without a message")


class RayTask:
    """A stage's command on a machine of the cluster, in the form of a process; it is entered in dvc.lock here."""

    pid = None

    def __init__(self, stage: str, command: str, log: Path, gpus: float) -> None:
        import ray

        def execute(command: str, folder: str, log: str, environment: dict[str, str]) -> int:
            environment = {**os.environ, **environment, BATCH: str(os.getpid())}
            with open(log, "ab") as stream:  # noqa: PTH123 - sent to machines as it is
                run: Any = subprocess.run
                return run(["sh", "-c", command], cwd=folder, env=environment, stdout=stream, stderr=stream).returncode

        self.stage = stage
        task = ray.remote(execute).options(num_cpus=1, num_gpus=gpus, max_retries=3)
        self.result = task.remote(command, str(Path.cwd()), str(log.resolve()), child_environment())

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        import ray

        if not ray.wait([self.result], timeout=0)[0]:
            return None
        try:
            status = ray.get(self.result)
        except ray.exceptions.RayError:
            return 1
        return status or subprocess.run([*DVC, "commit", "--quiet", "--force", self.stage], check=False).returncode


def child_environment() -> dict[str, str]:
    """One thread for each process, passive waiting where there are more, and this interpreter's programs first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**threads, "OMP_WAIT_POLICY": "PASSIVE", "PATH": programs, "JUPYTER_PREFER_ENV_PATH": "1"}


def start(stage: str, command: str, *, gpu: str | None = None, ray_gpus: float | None = None) -> Job:
    """Start a stage; its output goes to build/logs. `gpu`: the one it may use. `ray_gpus`: run it through Ray."""
    log = LOGS / f"{stage.replace('@', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if ray_gpus is not None:
        return Job(stage, RayTask(stage, command, log, ray_gpus), log)
    environment = {**os.environ, **child_environment(), BATCH: str(os.getpid())}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("ab") as stream:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream}
        command_line = [*DVC, "repro", "--single-item", stage]
        return Job(stage, subprocess.Popen(command_line, env=environment, start_new_session=True, **streams), log, gpu)


def stop(jobs: Iterable[Job]) -> None:
    """End the processes of these jobs, with all that they started."""
    processes: list[psutil.Process] = []
    for job in jobs:
        if job.process.pid is not None and psutil.pid_exists(job.process.pid):
            process = psutil.Process(job.process.pid)
            processes += [*process.children(recursive=True), process]
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        for process in processes:
            if process.is_running():
                process.send_signal(number)
        _, processes = psutil.wait_procs(processes, timeout=10)
