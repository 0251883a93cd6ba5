"""Notebook 06 in JupyterLab, as a person uses it: open, run all, change controls, see the figures change."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.finished import write_finished
from playwright.sync_api import Page, expect, sync_playwright

from danet_core.files import atomic_write_json
from tools.browser import chromium

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "build" / "browser"
PATIENCE = 90_000  # milliseconds; the kernel imports torch first
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a JupyterLab started by tools.lab on a small finished copy of the project."""
    project = write_finished(tmp_path_factory.mktemp("lab"))
    for name in ("danet_core", "tools", "notebooks"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copyfile(ROOT / "params.yaml", project / "params.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = project / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "PYTHONPATH"))}
    environment |= {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    arguments = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    arguments += ["--IdentityProvider.token=", "--LabApp.news_url=None"]
    arguments += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    # All cells stay in the page: as it comes, JupyterLab takes out those that are scrolled away, errors included.
    settings = home / "config/lab/user-settings/@jupyterlab"
    atomic_write_json(settings / "notebook-extension/tracker.jupyterlab-settings", {"windowingMode": "none"})
    atomic_write_json(settings / "apputils-extension/notification.jupyterlab-settings", {"fetchNews": "false"})
    log = project / "lab.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "tools.lab", *arguments]
        process = subprocess.Popen(command, cwd=project, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status", process, log)
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/06_explore_distances.ipynb?reset"
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 is behind no proxy
    for _ in range(600):
        with contextlib.suppress(OSError):
            opener.open(address, timeout=5).close()
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_run_all_then_a_dropdown_a_slider_and_a_tick_change_the_figures(lab: str) -> None:
    found = chromium()
    assert found, "no browser: `make test-browser` installs one"
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1440, "height": 2400})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        try:
            _use(page, lab)
        finally:
            page.screenshot(path=SHOTS / "explore_last.png")
            browser.close()


def _use(page: Page, lab: str) -> None:
    page.goto(lab)
    page.get_by_role("heading", name="Distances, explored by hand").wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-CodeCell .jp-InputPrompt").first).to_have_text(re.compile(r"\[.+\]:"))  # it has begun
    app = page.locator(".jp-OutputArea-output .widget-vbox").first
    images = app.locator("img.widget-image, .widget-image img")
    expect(images).to_have_count(5)
    expect(app.get_by_text("the only one kept")).to_be_visible()
    expect(page.locator(".jp-RenderedImage")).to_have_count(5)  # the figures without controls
    page.screenshot(path=SHOTS / "explore.png")
    first = [images.nth(number).get_attribute("src") for number in range(5)]
    distances, projection, claim, baseline, both = range(5)

    app.locator(".widget-dropdown", has=page.get_by_text("distance", exact=True)).locator("select").select_option(
        label="Euclidean"
    )
    for number in (distances, projection, baseline, both):
        expect(images.nth(number)).not_to_have_attribute("src", str(first[number]))
    expect(images.nth(claim)).to_have_attribute("src", str(first[claim]))

    second = [images.nth(number).get_attribute("src") for number in range(5)]
    app.locator(".noUi-handle").press("ArrowRight")
    for number in (baseline, both):
        expect(images.nth(number)).not_to_have_attribute("src", str(second[number]))
    expect(images.nth(distances)).to_have_attribute("src", str(second[distances]))

    app.get_by_label("B + CC", exact=True).check()
    expect(images).to_have_count(6)
    expect(images.nth(claim)).not_to_have_attribute("src", str(first[claim]))
    expect(app.get_by_text("the only one kept")).to_be_visible()
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()
