"""README and docs: links, lengths of sentences, names of make targets and modules, the table of results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS, MAX_LINES = 35, 150


def prose(text: str) -> str:
    """The text without code blocks, tables, headings and HTML."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "<")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_and_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n\s*[-*]\s", prose(text))
    assert [" ".join(s.split()) for s in sentences if len(s.split()) > MAX_WORDS] == []
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_make_targets_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert targets <= rules
    for module in set(re.findall(r"python -m ((?:data_prep|danet_study|tools)[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="without git nobody knows if `make repro` rewrote results/")
def test_the_results_table_of_the_readme_is_that_of_the_committed_records(tmp_path: Path) -> None:
    git = ["git", "-c", f"safe.directory={ROOT}"]  # the clone may be another user's
    command = [*git, "archive", "HEAD", "README.md", "results", "studies", "*.yaml"]
    archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "tools.readme", "--check"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
