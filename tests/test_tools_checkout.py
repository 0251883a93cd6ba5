"""What set-up does to a clone and to a copy without git."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.checkout import set_filter, set_no_scm

ROOT = Path(__file__).resolve().parent.parent
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def outside_git(tmp_path: Path) -> Path:
    if any((folder / ".git").exists() for folder in tmp_path.parents):
        pytest.skip("the temporary folder lies in a git work tree")
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@localhost"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def no_scm(folder: Path) -> str | None:
    config = configparser.ConfigParser()
    config.read(folder / ".dvc" / "config.local")
    return config.get("core", "no_scm", fallback=None)


def test_a_copy_without_git_tells_dvc_so_and_keeps_the_users_settings(outside_git: Path) -> None:
    local = outside_git / ".dvc" / "config.local"
    local.write_text("['remote \"store\"']\n    url = /data/store%20here\n")
    set_no_scm(outside_git)
    assert no_scm(outside_git) == "true"
    assert "url = /data/store%20here" in local.read_text()
    first = local.stat().st_mtime_ns
    set_no_scm(outside_git)
    assert local.stat().st_mtime_ns == first


def test_a_copy_that_became_a_clone_forgets_it(outside_git: Path) -> None:
    set_no_scm(outside_git)
    (outside_git / ".git").mkdir()
    set_no_scm(outside_git)
    assert no_scm(outside_git) is None


def test_a_clone_gets_no_local_setting(outside_git: Path) -> None:
    (outside_git / ".git").mkdir()
    set_no_scm(outside_git)
    assert not (outside_git / ".dvc" / "config.local").exists()


@needs_git
def test_the_filter_strips_what_is_committed_and_leaves_the_working_file(outside_git: Path) -> None:
    git(outside_git, "init", "-q")
    shutil.copy(ROOT / ".gitattributes", outside_git / ".gitattributes")
    set_filter(outside_git)
    (outside_git / "notebooks").mkdir()
    notebook = outside_git / "notebooks" / "a.ipynb"
    output = {"output_type": "stream", "name": "stdout", "text": ["a secret number\n"]}
    cell = {"cell_type": "code", "execution_count": 7, "id": "a", "metadata": {"tags": ["parameters"]}}
    content = {"cells": [cell | {"outputs": [output], "source": ["print()"]}], "metadata": {}}
    notebook.write_text(json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}, indent=1))
    before = notebook.read_bytes()
    git(outside_git, "add", ".")
    committed = json.loads(git(outside_git, "show", ":notebooks/a.ipynb"))
    assert committed["cells"][0]["outputs"] == []
    assert committed["cells"][0]["execution_count"] is None
    assert committed["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert notebook.read_bytes() == before


@needs_git
def test_git_works_when_the_interpreter_of_the_filter_has_gone(
    outside_git: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(outside_git, "init", "-q")
    shutil.copy(ROOT / ".gitattributes", outside_git / ".gitattributes")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(outside_git / "gone" / "python"))
        set_filter(outside_git)
    (outside_git / "notebooks").mkdir()
    notebook = outside_git / "notebooks" / "a.ipynb"
    notebook.write_text('{"cells": []}\n')
    git(outside_git, "add", ".")
    git(outside_git, "commit", "-qm", "one")
    notebook.write_text('{"cells": [ ]}\n')
    assert '+{"cells": [ ]}' in git(outside_git, "diff")


def test_a_folder_without_git_gets_no_filter(outside_git: Path) -> None:
    set_filter(outside_git)
    assert list(outside_git.iterdir()) == [outside_git / ".dvc"]
