"""Write copies of notebooks that do not change when a notebook is run or merely opened.

    python -m tools.strip SOURCE.ipynb DESTINATION.ipynb
    python -m tools.strip notebooks/02_train.ipynb notebooks/03_evaluate.ipynb build/notebooks

The copy holds the cells' kind, source and tags, and nothing else: no outputs, execution counts, time stamps, widget
state, language information, kernel's display name or random cell ids. DVC stages depend on the copy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from danet_core.files import StudyError, atomic_write_text
from tools.command import command

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def read_notebook(path: Path) -> dict[str, Any]:
    """Parse a notebook of format 4 as plain JSON. Raises StudyError when it is missing or none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; a notebook was expected there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not a notebook: {error}; restore it with `git checkout -- {path}`") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read as a notebook: {error.strerror}") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list) or notebook.get("nbformat") != 4:
        raise StudyError(f"{path} is not a notebook of format 4; save it with JupyterLab")
    return notebook


def source_of(cell: dict[str, Any]) -> str:
    """A cell's source as one string; the format also allows a list of lines."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def tags_of(cell: dict[str, Any]) -> list[str]:
    """A cell's tags, in their order."""
    return list(cell.get("metadata", {}).get("tags", []))


def stripped(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook reduced to what its author wrote."""
    cells = []
    for index, cell in enumerate(notebook["cells"]):
        tags = tags_of(cell)
        kept: dict[str, Any] = {
            "cell_type": cell["cell_type"],
            "id": f"cell-{index}",
            "metadata": {"tags": tags} if tags else {},
            "source": source_of(cell).splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        elif cell.get("attachments"):
            kept["attachments"] = cell["attachments"]
        cells.append(kept)
    return {"cells": cells, "metadata": {"kernelspec": KERNELSPEC}, "nbformat": 4, "nbformat_minor": 5}


def strip(source: Path, destination: Path) -> None:
    """Write the stripped copy of `source`, whole or not at all. Raises StudyError when `source` is no notebook."""
    if destination.exists() and destination.samefile(source):
        raise StudyError(f"{source} would be overwritten by its own stripped copy; name another destination")
    text = json.dumps(stripped(read_notebook(source)), indent=1, sort_keys=True, ensure_ascii=False)
    atomic_write_text(destination, text + "\n")


@command("tools.strip")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.strip", description="Write stripped copies of notebooks.")
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, help="a .ipynb file, or a folder for several sources")
    options = parser.parse_args(arguments)
    folder = options.destination.suffix != ".ipynb"
    if len(options.sources) > 1 and not folder:
        parser.error(f"{len(options.sources)} notebooks cannot become one file {options.destination}; name a folder")
    for source in options.sources:
        strip(source, options.destination / source.name if folder else options.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
