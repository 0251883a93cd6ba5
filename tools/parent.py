"""Processes that end with the one they work for, even when that is killed.

    python tools/parent.py PID COMMAND...

becomes COMMAND, which Linux then kills as soon as its parent, process PID, has ended. Started by its path, before the
project's packages can be found, so it imports nothing of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "busybox", "cmd.exe"}


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent, process `parent`, ends; it holds for what this one execs, too.

    Elsewhere nothing is asked. SIGKILL, because a process deep in a native call acts on nothing milder; everything that
    the study writes is renamed into place when complete. Linux goes by the thread that started this process: it has to
    wait for it.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    # a libc without it: what calls `watch` still ends, half a second later
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def bound(command: Sequence[str]) -> list[str]:
    """The command, to be started by this process, that ends with it: see `die_with`."""
    if not sys.platform.startswith("linux"):
        return list(command)
    # -IS: nothing but the standard library, for which this takes a hundredth of a second
    return [sys.executable, "-IS", str(Path(__file__).resolve()), str(os.getpid()), *command]


def watch(gone: Callable[[], object]) -> None:
    """Call `gone`, in a thread, half a second after what this process works for: its parent and, in a stage, DVC."""
    wanted = _still_wanted()

    def look() -> None:
        while wanted():
            time.sleep(0.5)
        gone()

    threading.Thread(target=look, daemon=True).start()


def kill_myself() -> None:
    """SIGKILL to this process, as `die_with` does: what it had under way is gone on with from a checkpoint."""
    os.kill(os.getpid(), signal.SIGKILL)


def _still_wanted() -> Callable[[], bool]:
    """A check that what this process works for is still there: its parent and, in a stage, DVC behind the shell."""
    parent = os.getppid()
    if "DVC_STAGE" in os.environ:
        import psutil

        with contextlib.suppress(psutil.Error):
            shell = psutil.Process(parent)
            if shell.name() in SHELLS:
                dvc = shell.ppid()

                def shell_and_dvc() -> bool:
                    with contextlib.suppress(psutil.Error):
                        return os.getppid() == parent and shell.ppid() == dvc
                    return False

                return shell_and_dvc
    return lambda: os.getppid() == parent


@contextlib.contextmanager
def stopped_as_an_exception() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as a SystemExit, so that what it started is told before it leaves."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
