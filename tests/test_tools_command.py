"""Every command of `tools` ends with a status, and where it did not get through with one sentence that names it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path

import pytest

from danet_core.files import StudyError
from tools import checkout, lab, notebook
from tools.command import at_least, command

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "\ndef main(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_but_the_kernel_ends_that_way(path: Path) -> None:
    decorated = f'@command("tools.{path.stem}")\ndef main(' in path.read_text(encoding="utf-8")
    assert decorated is (path.stem != "kernel")


def no_such_file() -> None:
    Path("/no/such/file").read_text()


def no_such_rename() -> None:
    Path("/no/such/file").rename("/no/other")


def folder_that_cannot_be_copied() -> None:
    raise shutil.Error([("/from/a", "/to/a", "[Errno 28] No space left on device")])


def full_terminal() -> None:
    raise BrokenPipeError(32, "Broken pipe")


def interrupted() -> None:
    raise KeyboardInterrupt


def study_error() -> None:
    raise StudyError("the loss is NaN; lower lr")


@pytest.mark.parametrize(
    ("work", "status", "words"),
    [
        (study_error, 1, "the loss is NaN; lower lr"),
        (no_such_file, 1, "/no/such/file cannot be used (No such file or directory); make room or give"),
        (no_such_rename, 1, "/no/such/file or /no/other cannot be used (No such file or directory); make"),
        (folder_that_cannot_be_copied, 1, "/to/a cannot be used ([Errno 28] No space left on device); make"),
        (full_terminal, 1, "a file or device cannot be used (Broken pipe); make"),
        (interrupted, 130, "interrupted; a second call goes on from what is finished"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_stops_a_command_is_a_sentence_and_a_status(work, status, words, capsys) -> None:
    @command("tools.some")
    def main() -> int:
        work()
        return 0

    assert main() == status
    said = capsys.readouterr().err
    assert said.startswith(f"tools.some: {words}") and said.count("\n") == 1


def test_a_commands_own_status_and_a_signals_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    @command("tools.some")
    def main(status: int) -> int:
        if status > 128:
            raise SystemExit(status)
        return status

    assert main(3) == 3
    with pytest.raises(SystemExit, match="143"):
        main(143)
    assert capsys.readouterr().err == ""


def test_a_mistake_in_the_code_keeps_its_traceback() -> None:
    @command("tools.some")
    def main() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize(
    ("lowest", "kind", "text", "words"),
    [
        (1, int, "0", "a whole number of at least 1, found '0'"),
        (1, int, "1.5", "a whole number of at least 1, found '1.5'"),
        (0, float, "-0.5", "a number of at least 0, found '-0.5'"),
        (0, float, "nan", "a number of at least 0, found 'nan'"),
    ],
)
def test_a_number_below_the_lowest_or_none_is_refused(lowest: int, kind: type, text: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        at_least(lowest, kind)(text)


def test_other_numbers_are_taken() -> None:
    assert (at_least(1)("1"), at_least(0, float)("0.5")) == (1, 0.5)


def test_a_lock_list_that_cannot_be_read_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rwlock = tmp_path / ".dvc/tmp/rwlock"
    rwlock.mkdir(parents=True)
    assert checkout.main(tmp_path) == 1
    assert re.fullmatch(rf"tools\.checkout: {rwlock} cannot be used \(Is a directory\); .*\n", capsys.readouterr().err)


def test_a_project_that_cannot_be_written_to_keeps_jupyterlab_from_starting_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build").touch()
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    assert lab.main() == 1
    assert re.fullmatch(r"tools\.lab: .*kernel\.json cannot be written \(.*\); .*\n", capsys.readouterr().err)


@pytest.mark.skipif(os.name != "posix", reason="POSIX paths")
def test_an_executed_notebook_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    shutil.copyfile(ROOT / "notebooks/04_tables.ipynb", tmp_path / "a.ipynb")
    assert notebook.main([str(tmp_path / "a.ipynb"), str(tmp_path / "file/b.ipynb")]) == 1
    assert re.fullmatch(rf"tools\.notebook: {tmp_path}/file cannot be used \(.*\); .*\n", capsys.readouterr().err)
