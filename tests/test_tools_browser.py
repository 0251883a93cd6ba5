"""The browser for the tests is found, installed, or asked for in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest

from tools import browser


class System:
    """A machine with these programs, on which apt-get adds chromium."""

    def __init__(self, patch: pytest.MonkeyPatch, programs: set[str], user: int = 0, fails: str = "") -> None:
        self.programs, self.fails, self.ran = programs, fails, []  # type: ignore[var-annotated]
        patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in self.programs else None)
        patch.setattr(os, "geteuid", lambda: user)
        patch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(command[1])
        if command[1] == self.fails:
            return subprocess.CompletedProcess(command, 100, "", "some noise\nE: no network")
        if command[1] == "install":
            self.programs.add("chromium")
        return subprocess.CompletedProcess(command, 0, "", "")


def test_a_browser_that_is_there_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    system = System(monkeypatch, {"google-chrome", "apt-get"})
    assert browser.main() == 0
    assert capsys.readouterr().out == "browser: /usr/bin/google-chrome\n"
    assert system.ran == []


def test_root_on_debian_gets_one_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(monkeypatch, {"apt-get"})
    assert browser.install() == "/usr/bin/chromium"
    assert system.ran == ["update", "install"]


@pytest.mark.parametrize(("programs", "user"), [(set(), 0), ({"apt-get"}, 1000)])
def test_elsewhere_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, programs: set[str], user: int
) -> None:
    system = System(monkeypatch, programs, user)
    assert browser.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("tools.browser: the browser tests need chromium") and "apt-get install chromium" in said
    assert said.count("\n") == 1 and system.ran == []


@pytest.mark.parametrize("fails", ["update", "install"])
def test_an_installation_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: Any, fails: str) -> None:
    System(monkeypatch, {"apt-get"}, fails=fails)
    assert browser.main() == 1
    assert f"`apt-get {fails}" in (said := capsys.readouterr().err) and "(E: no network)" in said
