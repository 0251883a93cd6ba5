"""Notebooks in git: no outputs, small cells, one tagged parameters cell where the pipeline gives parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.notebook import declared_parameters
from tools.strip import source_of, tags_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES = 15

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="there are no notebooks yet")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@each_notebook
def test_no_outputs_and_no_execution_counts(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert "execution" not in cell["metadata"]
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert set(metadata) <= {"kernelspec", "language_info"}, "widget state or papermill's time stamps"


@each_notebook
def test_cells_are_short_and_define_nothing(path: Path) -> None:
    for cell in cells(path, "code"):
        source = source_of(cell)
        assert len(source.splitlines()) <= MOST_LINES, f"move to a module:\n{source}"
        assert not re.search(r"^\s*(async\s+)?(def|class)\s", source, re.M), f"move to a module:\n{source}"
        assert not re.search(r"^\s*[!%]\s*(pip|conda|git)\b", source, re.M), f"set-up does not belong here:\n{source}"


@each_notebook
def test_opens_with_prose(path: Path) -> None:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert source_of(first).startswith("# ")


@each_notebook
def test_at_most_one_parameters_cell_and_it_holds_plain_literals(path: Path) -> None:
    assert sum("parameters" in tags_of(cell) for cell in cells(path, "code")) <= 1
    declared_parameters(path)


def pipeline_commands() -> list[str]:
    """Every command of dvc.yaml that starts a notebook."""
    path = ROOT / "dvc.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = re.sub(r"\\?\n\s+(?=-p |\$\{|build/)", " ", text)  # continuation lines of one command
    return re.findall(r"tools\.notebook\s+.*", text)


@pytest.mark.skipif(not (ROOT / "dvc.yaml").exists(), reason="there is no pipeline yet")
def test_the_pipeline_gives_only_parameters_that_the_notebooks_know() -> None:
    commands = pipeline_commands()
    assert commands
    for command in commands:
        name = re.search(r"([\w-]+)\.ipynb", command)
        assert name, command
        known = set(declared_parameters(ROOT / "notebooks" / f"{name[1]}.ipynb"))
        given = set(re.findall(r"-p\s+(\w+)", command))
        assert given <= known, f"{name[1]}: {given - known} unknown"
        assert not given or known
