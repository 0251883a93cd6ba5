"""Settings that make notebooks run in the project's root, as in the pipeline:  jupyter lab --config=tools/lab.py"""

import os
from pathlib import Path

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the cores to others


class KernelsAtRoot(AsyncMappingKernelManager):
    """Starts kernels in the root, not in the notebook's folder."""

    def cwd_for_path(self, path: str, **kwargs: object) -> str:
        return ROOT


c.ServerApp.kernel_manager_class = KernelsAtRoot  # type: ignore[name-defined]  # Jupyter defines c
