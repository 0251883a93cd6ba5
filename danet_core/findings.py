"""What the tables show, in sentences worked out from the records, and the README's generated section."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from danet_core.files import StudyError, atomic_write_text
from danet_core.report import (
    ABLATION_SETTING,
    PARTIAL_NOTE,
    SETTINGS,
    SYNTHETIC_NOTE,
    Results,
    VariantRow,
    score,
    seed_means,
    table1,
    table2,
)
from danet_core.tables import escape_markdown, signed

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def ablation_sentence(results: Results, variant: str, baseline: str = "baseline") -> str:
    """Say whether a variant raised Rank-1 and mAP over the Baseline on this data set, with the number of seeds.

    The difference is taken seed by seed (mean over the trials). One seed: a change of at most two points in both scores
    is said to be too small to tell. Several: a mean difference within two standard errors is said to be within the
    seeds' spread. Raises StudyError for a variant that the study does not list.
    """
    row, reference = _variant(results, variant), _variant(results, baseline)
    subject = f"On {results.dataset}, {_subject(row)}"
    setting = ABLATION_SETTING[results.layout]
    changes = []
    for metric in ("cmc1", "mAP"):
        ours, theirs = (seed_means(results, name, setting, metric) for name in (variant, baseline))
        changes.append([100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs])
    n = len(changes[0])
    if not n:
        return f"{subject} cannot be judged: {row.label} or {reference.label} was not run."
    rank1, mean_ap = _change("Rank-1", changes[0]), _change("mAP", changes[1])
    if rank1.split()[0] == mean_ap.split()[0] != "left":  # raised Rank-1 by ... and mAP by ...
        mean_ap = mean_ap.partition(" ")[2]
    return f"{subject} {rank1} and {mean_ap} (n = {n} seed{'s' if n > 1 else ''}): {_verdict(changes)}."


def ablation_sentences(results: Results, baseline: str = "baseline") -> list[str]:
    """`ablation_sentence` for every listed variant but the Baseline; none where the Baseline is not listed."""
    names = [row.name for row in results.variants]
    return [ablation_sentence(results, name, baseline) for name in names if name != baseline and baseline in names]


def findings(results: Results) -> str:
    """What the tables of a data set show and what did not reproduce, as a Markdown list.

    Every sentence is worked out from the records: the ablation, the Baseline's distance from chance and its last L_id,
    the retrieval within a modality, Figure 1's claim, for a real data set the comparison with the paper, and gaps.
    """
    lines = [SYNTHETIC_NOTE] if results.synthetic else []
    lines += [PARTIAL_NOTE] if results.partial else []
    lines += ablation_sentences(results)
    lines += _baseline_sentences(results)
    shares = [(row.label, score(results, row.name, "figure1", "share", 100.0)) for row in results.variants]
    if claims := ", ".join(f"{label} {share.mean:.2f} %" for label, share in shares if share):
        lines.append(
            "Figure 1's claim (the other modality is farther than the nearest other identity) holds from both sides "
            f"for this share of the test identities: {claims}."
        )
    lines += _paper_sentences(results)
    if results.missing:
        lines.append(f"Not run, so nothing is said of them: {', '.join(results.missing)}.")
    return "\n".join(f"- {escape_markdown(line)}" for line in lines) + "\n"


def write_findings(results: Results) -> Path:
    """Write `findings` as `findings.md` beside the tables, whole or not at all; the path written."""
    path = results.tables_folder / "findings.md"
    atomic_write_text(path, findings(results))
    return path


def readme_block(datasets: Sequence[str], root: Path | str = ".") -> str:
    """The result section of the README: per data set its ablation table and what it shows, then where they come from.

    Both are the texts in `<root>/results/<dataset>/tables` as the tables notebook wrote them, so that the section
    agrees with them whatever params.yaml lists now. Raises StudyError for a missing one.
    """
    parts = []
    for dataset in datasets:
        parts.append(f"### {dataset}\n")
        for name in ("table3.md", "findings.md"):
            path = Path(root) / "results" / dataset / "tables" / name
            if not path.exists():
                raise StudyError(f"{path} is missing, so the README cannot show it; `dvc repro` makes it")
            parts.append(path.read_text(encoding="utf-8"))
    parts.append("Written by `make repro`; all tables as Markdown, CSV and LaTeX: `results/<data set>/tables`.\n")
    return "\n".join(parts)


def insert_block(readme: str, block: str) -> str:
    """Replace what stands between the marks `<!-- results:begin -->` and `<!-- results:end -->` by `block`.

    Raises StudyError unless each mark stands there once, in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise StudyError(
            f"README.md must hold the marks {BEGIN} and {END} once each, in this order; found "
            f"{readme.count(BEGIN)} and {readme.count(END)}: put them back around the section that the pipeline writes"
        )
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return f"{before}{BEGIN}\n{block}{END}{after}"


def _variant(results: Results, name: str) -> VariantRow:
    for row in results.variants:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in results.variants)
    raise StudyError(f"variant {name!r} is not listed for {results.dataset}; study.variants has {known}")


def _subject(row: VariantRow) -> str:
    if not row.modules or row.epochs_factor != 1:
        return f"“{row.label}”"
    return " and ".join(module.upper() for module in row.modules) + (" together" if len(row.modules) > 1 else "")


def _change(name: str, values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if f"{abs(mean):.2f}" == "0.00":
        return f"left {name} as it was"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{'raised' if mean > 0 else 'lowered'} {name} by {abs(mean):.2f}{spread} points"


def _verdict(changes: Sequence[Sequence[float]]) -> str:
    means = [statistics.fmean(values) for values in changes]
    if len(changes[0]) == 1:
        if max(abs(mean) for mean in means) <= 2:
            return "one seed cannot tell a change this small from noise"
    elif any(abs(m) <= 2 * statistics.stdev(v) / math.sqrt(len(v)) for m, v in zip(means, changes, strict=True)):
        return "not settled, for at least one of the two is within the spread over seeds"
    only = ", as far as one seed can tell" if len(changes[0]) == 1 else ""
    if min(means) > 0:
        return f"it helps here{only}"
    return f"it does not help here{only}" if max(means) <= 0 else "the two scores disagree"


def _baseline_sentences(results: Results, baseline: str = "baseline") -> list[str]:
    setting = ABLATION_SETTING[results.layout]
    shown = (
        (setting, "cmc1"),
        (setting, "chance_rank1"),
        ("within_visible", "cmc1"),
        ("within_infrared", "cmc1"),
        ("training", "L_id"),
    )
    scores = [score(results, baseline, where, metric) for where, metric in shown]
    values = [one.mean for one in scores if one is not None]
    if not values:
        return []
    rank1, chance, visible, infrared, loss = values
    times = f"{rank1 / chance:.1f} times" if chance > 0 else "against no"
    trained = "trained to convergence" if loss < 1 else "not trained to convergence, so rows also rank speed"
    return [
        f"The Baseline finds the person in the other modality at Rank-1 {100 * rank1:.2f} %, {times} chance, and "
        f"within a modality at {100 * visible:.2f} % (visible) and {100 * infrared:.2f} % (infrared); "
        f"its last L_id is {loss:.2f}: {trained}."
    ]


def _paper_sentences(results: Results) -> list[str]:
    if results.synthetic:
        return []
    table = table1(results) if results.layout == "sysu" else table2(results)
    lines = []
    for block in table.blocks:
        for row in (row for row in block.rows if row.source == "difference" and row.cells[0]):
            parts = [f"{c.header} {signed(x.mean)}" for c, x in zip(table.columns, row.cells, strict=True) if x]
            words = SETTINGS[results.layout][block.setting]
            lines.append(f"{words}: ours minus the paper's DANet, in points: {', '.join(parts)}.")
    return lines
