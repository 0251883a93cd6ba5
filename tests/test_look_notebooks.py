"""The notebooks that show the method and the data, from top to bottom in a kernel, as a user or papermill runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from danet_core.config import load_study
from data_prep.pack import pack
from data_prep.prepare import Folders, prepare

ROOT = Path(__file__).resolve().parent.parent


def execute(name: str, out: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    pairs = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "tools.notebook", f"notebooks/{name}.ipynb", str(out), *pairs]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def shown(path: Path, kind: str) -> list[str]:
    """The outputs of one MIME type, in order."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_method_notebook_finds_loop_and_function_equal_for_every_equation(tmp_path: Path) -> None:
    done = execute("00_method", tmp_path / "out.ipynb")
    assert done.returncode == 0, done.stderr[-2000:]
    tables = "\n".join(shown(tmp_path / "out.ipynb", "text/plain"))
    for row in (*(f"Eq. {n}" for n in range(1, 6)), "Baseline", "B + CC", "B + ML", "B + ML + CC"):
        assert f"\n{row} " in tables
    assert len(shown(tmp_path / "out.ipynb", "image/png")) == 4


@pytest.fixture(scope="module", params=["synth_sysu", "synth_regdb"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name and the folder of an embedded set of a few people, rendered and packed as params.yaml there says."""
    name, root = request.param, tmp_path_factory.mktemp("look")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    row = params["datasets"][name]
    row.update(root=str(root / "raw"), image={"height": 32, "width": 16})
    if name == "synth_sysu":
        row["render"].update(train_ids=9, val_ids=2, test_ids=3, images={"train": 2, "val": 1, "test": 3})
    else:
        row["render"].update(ids=6)
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    folders = Folders(root / "prepared", root / "packed")
    dataset = load_study(root / "params.yaml").dataset(name)
    prepare(dataset, folders=folders)
    pack(dataset, workers=1, folders=folders)
    return name, root


def test_the_data_notebook_counts_a_small_store_and_draws_its_sheets(small: tuple[str, Path], tmp_path: Path) -> None:
    name, root = small
    out = tmp_path / "out.ipynb"
    done = execute("01_data", out, dataset=name, params=root / "params.yaml", packed=root / "packed")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {"synth_sysu": 18, "synth_regdb": 6}[name]  # cameras of each split, and a total each
    assert f"{lines} of {lines} lines agree\n" in done.stdout
    assert len(shown(out, "image/png")) == 3


def test_the_data_notebook_says_what_to_do_where_there_is_no_store(tmp_path: Path) -> None:
    done = execute("01_data", tmp_path / "out.ipynb", packed=tmp_path / "none")
    assert done.returncode == 1
    assert "none/synth_sysu is missing; `dvc repro`" in done.stdout + done.stderr
