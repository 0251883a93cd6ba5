"""The stamp of a run: what it says of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from danet_core import repro


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a module, a README and a result, whose module is the one that `repro` takes itself for."""
    for name in ("danet_core/repro.py", "results/table.md", "README.md", "dvc.lock"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("as committed\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(repro, "__file__", str(tmp_path / "danet_core" / "repro.py"))
    return tmp_path


def code_version() -> str:
    return str(repro.stamp(torch.device("cpu"))["code"])


def test_what_the_pipeline_rewrites_is_no_change_of_the_code(checkout: Path) -> None:
    commit = code_version()
    assert len(commit) == 40
    for name in ("results/table.md", "README.md", "dvc.lock"):
        (checkout / name).write_text("written by a run\n")
    assert code_version() == commit


def test_a_changed_module_is_a_change_of_the_code(checkout: Path) -> None:
    commit = code_version()
    (checkout / "danet_core" / "repro.py").write_text("edited\n")
    assert code_version() == commit + "+changes"


def test_a_copy_without_git_is_unversioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "__file__", str(tmp_path / "danet_core" / "repro.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_version() == "unversioned"
