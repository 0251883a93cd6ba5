"""results/report.html, the executed tables and figures notebooks as one page, and results/scores.json.

python -m tools.report         (the last stage of dvc.yaml)
"""

from __future__ import annotations

import html
import statistics
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from danet_study.config import Study, load_study
from danet_study.files import StudyError, atomic_write_json, atomic_write_text, read_json
from danet_study.protocols import PROTOCOLS

EXECUTED, RESULTS = Path("build/report"), Path("results")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; }}
th, td {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ white-space: pre-wrap; color: #555; }}
img, svg {{ max-width: 100%; height: auto; }}
a.anchor-link, .jp-InputPrompt, .jp-OutputPrompt, .prompt {{ display: none; }}
.jp-OutputArea-output, .output_subarea {{ overflow-x: auto; }}
</style></head><body>
<nav>{links}</nav>
{body}
</body></html>
"""


def write_report() -> Path:
    """Write both files; returns the page's path."""
    study = load_study()
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    links, sections = [], []
    for name in study.plan.datasets:
        title = html.escape(study.dataset(name).title)
        links.append(f'<a href="#{name}">{title}</a>')
        sections.append(f'<hr><h1 id="{name}">{title}</h1>')
        for kind in ("tables", "figures"):
            path = EXECUTED / f"{kind}-{name}.ipynb"
            if not path.exists():
                raise StudyError(f"{path} is missing; `dvc repro` makes it")
            sections.append(exporter.from_notebook_node(nbformat.read(path, as_version=4))[0])
    page = PAGE.format(title="DANet: tables and figures", links=" · ".join(links), body="\n".join(sections))
    atomic_write_text(RESULTS / "report.html", page)
    atomic_write_json(RESULTS / "scores.json", scores(study))
    return RESULTS / "report.html"


def scores(study: Study) -> dict[str, dict[str, float]]:
    """Mean mAP over trials and seeds, by data set and variant: what `dvc exp show` lists."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in study.runs():
        settings = read_json(RESULTS / "records" / f"{run.name}.json")["settings"]
        score = settings[PROTOCOLS[run.dataset.protocol].ablation]["mean"]["mAP"]
        found.setdefault(run.dataset.name, {}).setdefault(run.variant, []).append(score)
    return {
        name: {row: round(statistics.mean(values), 4) for row, values in rows.items()} for name, rows in found.items()
    }


if __name__ == "__main__":
    try:
        print(write_report())
    except StudyError as error:
        sys.exit(f"report: {error}")
