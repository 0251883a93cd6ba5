"""What a notebook stage costs before its first line of work: the runner, the kernel and the imports."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from benchmarks.measure import interleaved, main, page, table
from tools import ROOT
from tools.strip import read_notebook, source_of

NOTEBOOKS = ("02_train", "03_evaluate", "04_tables", "05_figures")
ROUNDS = 3


def imports(notebook: str) -> str:
    """The first code cell of a stage's notebook."""
    cells = read_notebook(ROOT / "notebooks" / f"{notebook}.ipynb")["cells"]
    return next(source_of(cell) for cell in cells if cell["cell_type"] == "code")


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def section(tiny: bool) -> str:
    rounds = 1 if tiny else ROUNDS
    rows = []
    with tempfile.TemporaryDirectory(prefix="danet-bench-") as folder:
        for notebook in NOTEBOOKS[2:3] if tiny else NOTEBOOKS:
            code = imports(notebook)
            path, executed = (Path(folder) / f"{notebook}{suffix}.ipynb" for suffix in ("", "-executed"))
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
            actions = {
                "imports": functools.partial(python, "-c", code),
                "stage": functools.partial(python, "-m", "tools.notebook", str(path), str(executed)),
            }
            times = interleaved(actions, rounds)
            rows.append((notebook, times["imports"], times["stage"]))
    return page(
        "## Start-up of a notebook stage",
        """Imports: a fresh interpreter with the imports of the notebook. Stage: `tools.notebook` on a notebook that has
        nothing but them, so runner, kernel, imports and the executed copy. Files come from the page cache.""",
        table(("notebook", "imports", "stage"), rows),
    )


if __name__ == "__main__":
    main(section)
