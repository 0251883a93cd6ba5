"""Each stage depends on every file of the project whose change could change its outputs, and on no folder of code."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# What starts a stage's own code. HARMLESS below is imported without touching the outputs: messages, drawing for the
# reader of an executed notebook, table printing behind the records that figures load.
ENTRY = {
    "prepare_sysu": ["data_prep/prepare.py", "data_prep/sysu_mm01.py", "data_prep/synthetic.py"],
    "prepare_regdb": ["data_prep/prepare.py", "data_prep/regdb.py", "data_prep/synthetic.py"],
    "pack_sysu": ["data_prep/pack.py"],
    "pack_regdb": ["data_prep/pack.py"],
    "weights_sysu": ["data_prep/weights.py"],
    "weights_regdb": ["data_prep/weights.py"],
    "train_sysu": ["notebooks/02_train.ipynb"],
    "train_regdb": ["notebooks/02_train.ipynb"],
    "evaluate_sysu": ["notebooks/03_evaluate.ipynb"],
    "evaluate_regdb": ["notebooks/03_evaluate.ipynb"],
    "tables_sysu": ["notebooks/04_tables.ipynb"],
    "tables_regdb": ["notebooks/04_tables.ipynb"],
    "figures_sysu": ["notebooks/05_figures.ipynb"],
    "figures_regdb": ["notebooks/05_figures.ipynb"],
    "section_sysu": ["tools/report.py"],
    "section_regdb": ["tools/report.py"],
    "report": ["tools/report.py"],
    "readings_train": ["tools/reading_train.py"],
    "readings_score": ["tools/reading_score.py"],
    "readings": ["notebooks/07_readings.ipynb"],
}
KIND = {"readings_train": "train", "readings_score": "evaluate"}
PLUMBING = {
    "danet_core/__init__.py",
    "danet_core/durations.py",
    "danet_core/files.py",
    "data_prep/__init__.py",
    "tools/__init__.py",
    "tools/command.py",
    "tools/parent.py",
}
CONFIG = {"danet_core/config.py", "danet_core/parameters.py", "danet_core/strict.py"}
HARMLESS = {
    "prepare": {
        "data_prep/images.py",
        *CONFIG,
        "danet_core/store.py",
        "data_prep/regdb.py",
        "data_prep/sysu_mm01.py",
        "data_prep/rand_perm.py",
    },
    "pack": {*CONFIG, "data_prep/prepare.py", "data_prep/reading.py"},
    "weights": {*CONFIG, "data_prep/reading.py"},
    # What strict.py and parameters.py read is in the resolved configuration, which every use of a run compares.
    "train": {
        "danet_core/parameters.py",
        "danet_core/strict.py",
        "danet_core/plots.py",
        "danet_core/style.py",
        "danet_core/distances.py",
    },
    # The model file holds what these made: a model of theirs that changed is another dependency already.
    "evaluate": {
        "danet_core/augment.py",
        *CONFIG,
        "danet_core/backbone.py",
        "danet_core/losses.py",
        "danet_core/model.py",
        "danet_core/precision.py",
        "danet_core/record.py",
        "danet_core/repro.py",
        "danet_core/sampler.py",
        "danet_core/store.py",
        "danet_core/train.py",
    },
    "readings": {"danet_core/distances.py"},
    "tables": set(),
    "figures": {"danet_core/tables.py"},
    "section": set(),
    "report": set(),
}


def source(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def imported(path: str) -> set[str]:
    """Files of the project that a file or notebook imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {f"{name.replace('.', '/')}.py" for name in names if name.startswith(("danet_core", "data_prep", "tools"))}
    return {path for path in files if (ROOT / path).is_file()}


def closure(entry: list[str], stop: frozenset[str] = frozenset()) -> set[str]:
    """Everything the entries import, directly or not, but through `stop`; and the entries where they are modules."""
    seen: set[str] = set()
    waiting = set(entry)
    while waiting:
        path = waiting.pop()
        seen.add(path)
        waiting |= imported(path) - seen - stop
    return {path for path in seen if path.endswith(".py")}


def depends_on(stage: str) -> set[str]:
    return {path for path in STAGES[stage]["deps"] if path.endswith(".py")}


@pytest.mark.parametrize("stage", sorted(ENTRY))
def test_a_stage_lists_every_module_its_outputs_come_from(stage):
    harmless = frozenset(PLUMBING | HARMLESS[KIND.get(stage, stage.split("_")[0])])
    assert closure(ENTRY[stage], harmless) <= depends_on(stage) | harmless


@pytest.mark.parametrize("stage", sorted(ENTRY))
def test_a_stage_lists_no_module_it_never_imports(stage):
    assert depends_on(stage) <= closure(ENTRY[stage])


def test_every_stage_that_runs_code_of_the_study_is_looked_at_here():
    assert set(STAGES) - {"notebooks", "readme"} == set(ENTRY)


def test_no_stage_depends_on_a_folder_of_code_or_of_raw_images():
    for stage in STAGES.values():
        for path in stage["deps"]:
            assert path.rstrip("/") not in {"danet_core", "data_prep", "tools", "notebooks"}
            assert not path.startswith("data/raw")


def test_nothing_that_trains_imports_what_evaluates():
    assert not closure(["danet_core/train.py"]) & {
        "danet_core/evaluate.py",
        "danet_core/protocols.py",
        "danet_core/metrics.py",
    }


@pytest.mark.parametrize("notebook", ["04_tables", "05_figures", "07_readings"])
def test_tables_and_figures_import_no_torch(notebook):
    for path in closure([f"notebooks/{notebook}.ipynb"]):
        assert "torch" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(source(path)))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
