"""Notebooks: prose first, small cells without outputs, required parameters, and code that fits the package."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from finished import run_notebook
from nbclient import NotebookClient

from danet_study.files import StudyError
from tests.stores import ROOT, make_project, small_params

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES = 15
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str = "code", tag: str | None = None) -> list[str]:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


@each_notebook
def test_no_outputs_and_no_traces_of_an_execution(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in read(path)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}
    assert set(read(path)["metadata"]) <= {"kernelspec", "language_info"}


@each_notebook
def test_it_opens_with_a_title_and_has_small_cells(path):
    assert read(path)["cells"][0]["cell_type"] == "markdown"
    assert sources(path, "markdown")[0].startswith("# ")
    for source in sources(path):
        assert len(source.splitlines()) <= MOST_LINES, source
        assert not re.search(r"^\s*[!%]", source, re.M), source
        if path.stem != "00_method":  # which defines the loops that it compares with
            assert not re.search(r"^\s*(async def|def|class)\s", source, re.M), source


@each_notebook
def test_parameters_are_literals_of_one_tagged_cell(path):
    (cell,) = sources(path, tag="parameters")
    names = []
    for line in ast.parse(cell).body:
        assert isinstance(line, ast.Assign)
        ast.literal_eval(line.value)
        names.append(line.targets[0].id)
    assert names


@each_notebook
def test_its_code_compiles_and_all_that_it_imports_and_calls_exists(path):
    tree = ast.parse("\n\n".join(sources(path)))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or name.name: importlib.import_module(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                found = getattr(module, name.name, None)
                modules[name.asname or name.name] = found or importlib.import_module(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_the_method_notebook_runs_and_finds_loops_and_functions_equal():
    notebook = nbformat.read(ROOT / "notebooks/00_method.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("danet_core" in data.get("text/plain", "") for data in shown) == 6
    assert sum("image/png" in data for data in shown) == 1


@pytest.mark.parametrize("name", ["02_train", "03_evaluate"])
def test_a_notebook_refuses_to_run_without_its_parameters(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(StudyError):
        run_notebook(name)


def test_a_run_is_trained_by_one_notebook_and_scored_by_the_next(tmp_path, monkeypatch):
    make_project(tmp_path, ("synth_sysu",))
    small_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"split": "synth_sysu-1", "variant": "b_ml", "seed": 0, "device": "cpu"}
    trained = run_notebook("02_train", **given)
    assert list(trained["history"].index) == [1, 2, 3]
    scored = run_notebook("03_evaluate", **given)
    assert set(scored["scores"].index) == {"all_single", "all_multi", "indoor_single", "indoor_multi"}
    assert (tmp_path / "results/records/synth_sysu-1-b_ml-0.json").exists()
