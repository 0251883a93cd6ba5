"""A process ends with the one it works for, however that one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools import parent

ROOT = Path(__file__).resolve().parent.parent
SLEEP = [sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(600)"]


def child_of_a_process_that_is_killed(program: str, environment: dict[str, str]) -> psutil.Process:
    """Run `program`, which starts a child and prints its number behind the child's own `runs`; the child, afterwards.

    Both write into one pipe: the program is killed when both have said something.
    """
    words = [sys.executable, "-c", program]
    with subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        said = {starter.stdout.readline().strip(), starter.stdout.readline().strip()}
        (number,) = said - {"runs"}
        child = psutil.Process(int(number))
        starter.kill()
    return child


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends it")
def test_a_bound_command_in_a_session_of_its_own_ends_with_the_killed_process_that_started_it() -> None:
    program = (
        "import subprocess; from tools.parent import bound; "
        f"child = subprocess.Popen(bound({SLEEP!r}), start_new_session=True); "
        "print(child.pid, flush=True); child.wait()"
    )
    child = child_of_a_process_that_is_killed(program, {"PYTHONPATH": str(ROOT)})
    assert psutil.wait_procs([child], timeout=30)[1] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends it")
def test_a_command_whose_parent_had_gone_before_is_never_run(tmp_path: Path) -> None:
    words = [sys.executable, "-c", f"open({str(tmp_path / 'run')!r}, 'w')"]
    of_another = [*parent.bound([])[:-1], str(os.getppid())]  # whoever starts it is not that process
    assert subprocess.run([*of_another, *words], check=False).returncode == 1
    assert not (tmp_path / "run").exists()
    assert subprocess.run(parent.bound(words), check=False).returncode == 0
    assert (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("environment", [{}, {"DVC_STAGE": "one"}], ids=["parent", "DVC behind a shell"])
def test_what_is_watched_for_is_noticed(environment: dict[str, str]) -> None:
    """In a stage a shell that does not become its command outlives the killed DVC, and waits."""
    watching = (
        "import time; from tools.parent import kill_myself, watch; watch(kill_myself); "
        "print('runs', flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", watching]
    if environment:
        words = ["sh", "-c", '"$@"; true', "sh", *words]
    program = (
        "import subprocess; "
        f"child = subprocess.Popen({words!r}, start_new_session=True); print(child.pid, flush=True); child.wait()"
    )
    child = child_of_a_process_that_is_killed(program, {"PYTHONPATH": str(ROOT), **environment})
    assert psutil.wait_procs([child], timeout=30)[1] == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_signal_that_ends_a_process_is_an_exception_inside_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), parent.stopped_as_an_exception():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    assert signal.getsignal(signal.SIGTERM) == before
