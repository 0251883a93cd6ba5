"""What starts notebooks and prepares a checkout; the method (`danet_core`) does not know these tools."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder: notebooks run with it as their working directory, wherever they were started from."""
