"""The report in a browser without a network: every picture is drawn, every table has rows, nothing fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import report

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the committed results, as `make report` writes it where no run is."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(ROOT / "results", root / "results")
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    assert report.main([], root) == 0
    return root / "results" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-browser")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: make test-browser")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize(("name", "width"), [("wide", 1200), ("phone", 390)])
def test_every_picture_and_table_shows_offline_and_nothing_fails(
    browser: Any, path: Path, name: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("requestfailed", lambda request: troubles.append(request.url[:80]))
    tab.goto(path.as_uri())
    widths = tab.eval_on_selector_all("img", "images => images.map(image => image.complete && image.naturalWidth)")
    assert len(widths) >= 6 and all(wide > 1 for wide in widths)
    rows = tab.eval_on_selector_all("table", "tables => tables.map(table => table.tBodies[0].rows.length)")
    assert len(rows) >= 10 and min(rows) > 0
    # Wide tables scroll in place: the page itself never has to be moved sideways.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for link in tab.query_selector_all("nav a"):
        link.click()
        target = tab.locator(tab.evaluate("location.hash"))
        assert target.count() == 1 and abs(target.bounding_box()["y"]) < 900
    (ROOT / "build" / "browser").mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=ROOT / "build" / "browser" / f"report-{name}.png", full_page=True)
    context.close()
    assert troubles == []
