"""Write the results table of README.md from results/records:  python -m tools.readme [--check]"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from danet_study.config import Study, load_study
from danet_study.files import atomic_write_text
from danet_study.results import METRICS, load_results
from danet_study.tables import grid_text, score_rows

BEGIN, END = "<!-- results: make published -->\n", "<!-- end of results -->\n"


def table(study: Study, results: Path = Path("results")) -> str:
    """Rank-1 and mAP of each variant on each data set of the plan, in percent with 95 % intervals, as Markdown."""
    frames = []
    for dataset in study.plan.datasets:
        part = load_results(study, dataset, results)
        columns = {f"{dataset}, {title}": (part.protocol.ablation, metric) for metric, title in METRICS.items()}
        frames.append(pd.DataFrame(score_rows(part, columns)).set_index("Variant"))
    seeds = pd.concat([frame.pop("n") for frame in frames], axis=1)
    grid = pd.concat(frames, axis=1).assign(n=["/".join(dict.fromkeys(row)) for row in seeds.to_numpy()])
    return grid_text(grid.reset_index(), "pipe")


def main() -> None:
    """Replace the block between the two markers; `--check` only compares. The seeds: studies/published.yaml."""
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    study = load_study()
    plan = study.plan.model_copy(update=YAML(typ="safe").load(Path("studies/published.yaml"))["study"])
    updated = f"{before}{BEGIN}\n{table(study.model_copy(update={'study': plan}))}\n\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if updated == text else "README.md: its table is not that of results/records; run `make published`")
    atomic_write_text(readme, updated)


if __name__ == "__main__":
    main()
