"""An IPython kernel that works in the project's folder and never outlives the process that started it.

    python tools/kernel.py -f CONNECTION_FILE

Started by `tools.notebook` and `tools.lab` in place of `ipykernel_launcher`, and by its path, so that it works from any
folder.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Start the kernel; the arguments are ipykernel's."""
    # Imports, ipykernel's and the first cell's, make a million objects that all stay; to look for garbage among them
    # takes a tenth of the start, and some of every later look.
    gc.disable()
    sys.path.insert(0, str(ROOT))
    from tools.parent import die_with

    die_with(int(os.environ.get("JPY_PARENT_PID") or os.getppid()))  # elsewhere ipykernel's own poller does it
    os.chdir(ROOT)
    # Nothing that lies beside this file or in the working directory may shadow what the kernel itself imports;
    # IPython adds the working directory again before the first cell.
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "tools")]
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.initialize()
    app.shell.events.register("post_run_cell", _collect_from_now_on)
    app.start()


def _collect_from_now_on(_result: object) -> None:
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()
