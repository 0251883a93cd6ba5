"""An IPython kernel that works in the project's folder and never outlives the process that started it.

    python tools/kernel.py -f CONNECTION_FILE

Started by `tools.notebook` and `tools.lab` in place of `ipykernel_launcher`, and by its path, so that it works from any
folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Start the kernel; the arguments are ipykernel's."""
    sys.path.insert(0, str(ROOT))
    from tools.parent import die_with

    die_with(int(os.environ.get("JPY_PARENT_PID") or os.getppid()))  # elsewhere ipykernel's own poller does it
    os.chdir(ROOT)
    # Nothing that lies beside this file or in the working directory may shadow what the kernel itself imports;
    # IPython adds the working directory again before the first cell.
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "tools")]
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance()


if __name__ == "__main__":
    main()
