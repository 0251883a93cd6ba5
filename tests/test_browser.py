"""Notebook 06 in JupyterLab, as a person uses it: run all cells, change controls, see the figures change."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from finished import ROOT, write_finished

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = ROOT / "build/browser"
PATIENCE = 90_000  # milliseconds; the kernel imports torch first

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"),
]


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab on a small finished copy of the project."""
    project = write_finished(tmp_path / "project")
    for name in ("danet_core", "danet_study", "notebooks"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copyfile(ROOT / "params.yaml", project / "params.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "home"
    # All cells stay in the page: by default JupyterLab removes those that are scrolled away.
    settings = home / "config/lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    environment |= {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=", "--LabApp.news_url=None", f"--ServerApp.root_dir={project}/notebooks"]
    options += [f"--MappingKernelManager.root_dir={project}"]  # kernels start in the project's root, as in `make lab`
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (tmp_path / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "lab.log").read_text()
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/api/status", timeout=5).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/06_explore_distances.ipynb?reset"
    finally:
        process.terminate()
        process.wait(60)


def test_run_all_cells_then_controls_change_the_figures(lab):
    playwright = pytest.importorskip("playwright.sync_api")
    SHOTS.mkdir(parents=True, exist_ok=True)
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as started:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1440, "height": 2400})
        page.set_default_timeout(PATIENCE)
        try:
            use(page, lab, playwright.expect)
        finally:
            page.screenshot(path=SHOTS / "explore_last.png")
            browser.close()


def use(page, address, expect):
    page.goto(address)
    page.get_by_role("heading", name="Explore distances").wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-CodeCell .jp-InputPrompt").first).to_have_text(re.compile(r"\[.+\]:"))
    app = page.locator(".jp-OutputArea-output .widget-vbox").first
    images = app.locator("img.widget-image, .widget-image img")
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    expect(images.nth(2).or_(errors).first).to_be_visible()  # an error is reported at once
    assert errors.count() == 0, errors.first.inner_text()
    galleries = app.locator("figure")
    expect(images).to_have_count(3)
    expect(galleries).to_have_count(2 * (1 + 10 + 3))
    expect(page.locator(".jp-RenderedImage")).to_have_count(4)  # the figures without controls
    page.screenshot(path=SHOTS / "explore.png")
    first = [images.nth(number).get_attribute("src") for number in range(3)]
    crops = galleries.all_inner_texts()
    distances, plane, gap = range(3)

    metric = app.locator(".widget-dropdown", has=page.get_by_text("distance", exact=True))
    metric.locator("select").select_option(label="Euclidean")
    for number in (distances, plane):
        expect(images.nth(number)).not_to_have_attribute("src", str(first[number]))
    expect(images.nth(gap)).to_have_attribute("src", str(first[gap]))
    expect(galleries.nth(1)).not_to_have_text(crops[1])

    asked = galleries.first.locator("img")
    before = asked.get_attribute("src")
    app.locator(".noUi-handle").press("ArrowRight")
    expect(asked).not_to_have_attribute("src", str(before))

    app.get_by_label("B + CC", exact=True).check()
    expect(galleries).to_have_count(3 * (1 + 10 + 3))
    expect(images.nth(gap)).not_to_have_attribute("src", str(first[gap]))
    assert errors.count() == 0, errors.first.inner_text()
