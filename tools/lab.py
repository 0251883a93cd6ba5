"""JupyterLab on the project's notebooks, with kernels of this interpreter that work in the project's folder.

    python -m tools.lab [arguments of jupyter lab]

A kernel named `python3` that another environment left in the user's home would otherwise win.
"""

from __future__ import annotations

import os
import sys

from danet_core.files import atomic_write_json
from tools import ROOT
from tools.command import command
from tools.strip import KERNELSPEC


def write_kernelspec() -> str:
    """Write the kernel's description under build/ and return the folder for JUPYTER_PATH."""
    folder = ROOT / "build" / "jupyter"
    specification = {
        "argv": [sys.executable, str(ROOT / "tools" / "kernel.py"), "-f", "{connection_file}"],
        "display_name": KERNELSPEC["display_name"],
        "language": KERNELSPEC["language"],
        "metadata": {"debugger": True},
    }
    atomic_write_json(folder / "kernels" / KERNELSPEC["name"] / "kernel.json", specification)
    return str(folder)


@command("tools.lab")
def main() -> int:
    """JupyterLab until it is closed, with the arguments of this process; returns the exit status."""
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [write_kernelspec(), os.environ.get("JUPYTER_PATH")]))
    from jupyterlab.labapp import LabApp

    arguments = [f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # as in most containers; it still listens to this machine only
        arguments.append("--ServerApp.allow_root=True")
    LabApp.launch_instance([*arguments, *sys.argv[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
