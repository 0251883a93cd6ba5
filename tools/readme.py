"""Write the results table of README.md from results/records:  python -m tools.readme [--check]"""

from __future__ import annotations

import sys
from pathlib import Path

from ruamel.yaml import YAML
from tabulate import tabulate

from danet_study.config import Study, load_study
from danet_study.files import atomic_write_text
from danet_study.results import METRICS, NOT_RUN, load_results, score

BEGIN, END = "<!-- results: make published -->\n", "<!-- end of results -->\n"


def table(study: Study, results: Path = Path("results")) -> str:
    """Rank-1 and mAP of each variant on each data set of the plan, in percent with 95 % intervals, as Markdown."""
    found = [load_results(study, dataset, results) for dataset in study.plan.datasets]
    header = ["Variant", *(f"{part.dataset.name}, {metric}" for part in found for metric in METRICS.values()), "n"]
    rows = []
    for variant in study.plan.variants:
        cells, seeds = [study.variants[variant].label], set()
        for part in found:
            for metric in METRICS:
                estimate = score(part, variant, part.protocol.ablation, metric)
                interval = f" ± {estimate.half:.2f}" if estimate and estimate.n > 1 else ""
                cells.append(f"{estimate.value:.2f}{interval}" if estimate else NOT_RUN)
                seeds.add(estimate.n if estimate else 0)
        rows.append([*cells, "/".join(map(str, sorted(seeds)))])
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def main() -> None:
    """Replace the block between the two markers; `--check` only compares. The seeds are those of published.yaml."""
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    study = load_study()
    plan = study.plan.model_copy(update=YAML(typ="safe").load(Path("published.yaml"))["study"])
    updated = f"{before}{BEGIN}\n{table(study.model_copy(update={'study': plan}))}\n\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if updated == text else "README.md: its table is not that of results/records; run `make published`")
    atomic_write_text(readme, updated)


if __name__ == "__main__":
    main()
