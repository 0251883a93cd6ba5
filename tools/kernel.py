"""An IPython kernel that works in the project's folder and never outlives the process that started it.

    python tools/kernel.py -f CONNECTION_FILE

Started by `tools.notebook` and `tools.lab` in place of `ipykernel_launcher`, and by its path, so that it works from any
folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, even by SIGKILL.

    Elsewhere ipykernel's own poller does it within a second or two. SIGKILL, because a kernel deep in a native call
    acts on nothing milder; everything it writes is renamed into place when complete.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    parent = int(os.environ.get("JPY_PARENT_PID") or 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def main() -> None:
    """Start the kernel; the arguments are ipykernel's."""
    die_with_parent()
    os.chdir(ROOT)
    # Nothing that lies beside this file or in the working directory may shadow what the kernel itself imports;
    # IPython adds the working directory again before the first cell.
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "tools")]
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance()


if __name__ == "__main__":
    main()
