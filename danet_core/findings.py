"""What the tables show, in sentences worked out from the records, and the README's generated section.

For a real data set also what reproduced of the paper, and where the paper contradicts itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import special

from danet_core.files import StudyError, atomic_write_text
from danet_core.report import PAPER_ROWS, Comparison, comparisons, paper_table
from danet_core.scores import ABLATION_SETTING, SETTINGS, SYNTHETIC_NOTE, Results, VariantRow, score, seed_means
from danet_core.statistics import METRICS, compare_variants
from danet_core.tables import Score, escape_markdown, signed

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def ablation_sentence(results: Results, variant: str, baseline: str = "baseline") -> str:
    """Say whether a variant raised Rank-1 and mAP over the Baseline on this data set, with the number of seeds.

    The difference is taken seed by seed (mean over the trials). One seed gives no verdict; several give one where the
    95 % intervals (Student's t) of both differences lie off zero. Raises StudyError for a variant that is not listed.
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


class Part(NamedTuple):
    """Sentences under a heading and an introduction, each of which may be empty; `code spans` are the only markup."""

    heading: str
    introduction: str
    lines: list[str]


def finding_parts(results: Results) -> list[Part]:
    """What the tables of a data set show and what did not reproduce.

    Every sentence is worked out from the records: the ablation, the Baseline's distance from chance and its last L_id,
    the retrieval within a modality, Figure 1's claim, the modality probe, gaps, and for a real
    data set `against_paper` and `paper_slips`.
    """
    lines = [SYNTHETIC_NOTE] if results.synthetic else []
    lines += results.markers
    lines += ablation_sentences(results)
    lines += _resampled_sentences(results)
    lines += _baseline_sentences(results)
    if claims := _by_variant(results, "figure1", "share", 2):
        lines.append(
            "Figure 1's claim (the other modality is farther than the nearest other identity) holds from both sides "
            f"for this share of the test identities: {claims}."
        )
    lines += _probe_sentences(results)
    if results.missing:
        lines.append(f"Not run, so nothing is said of them: {', '.join(results.missing)}.")
    parts = [Part("", "", lines)]
    if not results.synthetic:
        parts.append(Part(AGAINST_PAPER, JUDGED_BY, against_paper(results)))
        parts.append(Part(SLIPS, "", paper_slips(results)))
    return parts


def findings(results: Results) -> str:
    """`finding_parts` as Markdown lists."""
    texts = []
    for heading, introduction, lines in finding_parts(results):
        top = (f"**{heading}**\n\n" if heading else "") + (f"{introduction}\n\n" if introduction else "")
        texts.append(top + "".join(f"- {escape_markdown(line)}\n" for line in lines))
    return "\n".join(texts)


def against_paper(results: Results) -> list[str]:
    """What reproduced of the paper's scores and gains, what did not, and what cannot be judged and why.

    Reproduced: the paper's figure lies within two standard deviations of our mean. The standard deviation is over
    seeds; with one seed, over RegDB's splits, each of which has a model of its own. With neither (n = 1) nothing is
    judged, nor is anything that was not run, or that was run under another protocol or on a part of the data.
    """
    verdicts = [_judge(results, one) for one in comparisons(results)] + _judged_gains(results)
    lines = []
    for verdict in dict.fromkeys(sorted((one[0] for one in verdicts), key=_VERDICTS.index)):
        groups: dict[str, list[str]] = {}  # subject and reason, with its scores
        for _, subject, text in (one for one in verdicts if one[0] == verdict):
            groups.setdefault(subject, []).append(text)
        if verdict == _NOT_RUN:
            lines.append(f"{verdict}: {'; '.join(groups)}.")
        else:
            lines += [f"{verdict}: {subject}: {', '.join(texts)}." for subject, texts in groups.items()]
    return lines


def paper_slips(results: Results) -> list[str]:
    """Where the paper contradicts itself or is silent, as far as it concerns this data set; figures from its tables."""
    number, claim = (1, _sysu_claim) if results.layout == "sysu" else (2, _regdb_claim)
    return [*claim(_printed(results, number)), *_SILENT]


def write_findings(results: Results) -> Path:
    """Write `findings` as `findings.md` beside the tables, whole or not at all; the path written."""
    path = results.tables_folder / "findings.md"
    atomic_write_text(path, findings(results))
    return path


_REFERENCE = "### The reference: several seeds (`make reference`)\n"
_NO_REFERENCE = (
    "Not made yet: there is no `results/reference`. `make reference` trains the embedded study on the seeds that "
    "`reference` in params.yaml lists, and puts its tables here.\n"
)
_QUICK = "### The quick default (`make repro`)\n"

# The README's figures with what they show, for readers who do not see them.
README_FIGURES = {
    "results/synth_sysu/figures/cmc.png": "CMC curves of the four variants on synth_sysu, one panel per search setting",
    "results/synth_sysu/figures/distances.png": (
        "Distance distributions of the four variants on synth_sysu: same and different people, same and other modality"
    ),
}


def readme_block(datasets: Sequence[str], root: Path | str = ".") -> str:
    """The result section of the README: each data set's ablation table with what it shows, two figures, and a pointer.

    First those of the reference study in `<root>/results/reference`, or that there is none, then the quick default's,
    of which the tables alone where the reference says what they show.
    The texts are those in `<root>/results/<dataset>/tables` as the tables notebook wrote them, so that the section
    agrees with them whatever params.yaml lists now. Raises StudyError for a missing text or figure.
    """
    results = Path(root) / "results"
    reference = [name for name in datasets if (results / "reference" / name).is_dir()]
    parts = [_REFERENCE]
    parts += _texts_for_readme(results / "reference", reference, _TEXTS) if reference else [_NO_REFERENCE]
    parts += [_QUICK, *_texts_for_readme(results, datasets, _TEXTS[:1] if reference else _TEXTS)]
    if reference:
        links = ", ".join(f"[{name}](results/{name}/tables/findings.md)" for name in datasets)
        parts.append(f"Synthetic as above, one seed each; in words: {links}.\n")
    for place, words in README_FIGURES.items():
        _for_readme(Path(root) / place)
        parts.append(f"![{words}. Synthetic: rendered pedestrians.]({place})\n")
    parts.append(
        "Written by `make repro`. All tables as Markdown, CSV and LaTeX: `results/<data set>/tables`; all figures as "
        "PNG and PDF: `results/<data set>/figures`; the reference's below `results/reference`. "
        "Everything on one page: `make report`.\n"
    )
    return "\n".join(parts)


_TEXTS = ("table3.md", "findings.md")


def _texts_for_readme(results: Path, datasets: Sequence[str], names: Sequence[str]) -> list[str]:
    texts = []
    for dataset in datasets:
        texts.append(f"#### {dataset}\n")
        for name in names:
            texts.append(_for_readme(results / dataset / "tables" / name).read_text(encoding="utf-8"))
    return texts


def _for_readme(path: Path) -> Path:
    if not path.exists():
        raise StudyError(f"{path} is missing, so the README cannot show it; `dvc repro` makes it")
    return path


def insert_block(text: str, block: str, name: str = "README.md") -> str:
    """The page `name` with `block` between the marks `<!-- results:begin -->` and `<!-- results:end -->`.

    Raises StudyError unless each mark stands once in `text`, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise StudyError(
            f"{name} must hold the marks {BEGIN} and {END} once each, in this order; found "
            f"{text.count(BEGIN)} and {text.count(END)}: put them back around the section that the pipeline writes"
        )
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n{block}{END}{after}"


def _variant(results: Results, name: str) -> VariantRow:
    for row in results.variants:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in results.variants)
    raise StudyError(f"variant {name!r} is not listed for {results.dataset}; study.variants has {known}")


def _subject(row: VariantRow) -> str:
    return row.label if row.modules and row.epochs_factor == 1 else f"“{row.label}”"


def _change(name: str, values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if f"{abs(mean):.2f}" == "0.00":
        return f"left {name} as it was"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{'raised' if mean > 0 else 'lowered'} {name} by {abs(mean):.2f}{spread} points"


def _verdict(changes: Sequence[Sequence[float]]) -> str:
    """A verdict over seeds, paired: 95 % intervals of Student's t around both mean changes; none from one seed."""
    n = len(changes[0])
    if n == 1:
        return "one seed, so no verdict"
    means = [statistics.fmean(values) for values in changes]
    reach = float(special.stdtrit(n - 1, 0.975)) / math.sqrt(n)
    if any(abs(mean) <= reach * statistics.stdev(v) for mean, v in zip(means, changes, strict=True)):
        return "not settled, for the 95 % interval over seeds of at least one of the two holds no change at all"
    if min(means) > 0:
        return "it helps here"
    return "it does not help here" if max(means) < 0 else "the two scores disagree"


def _resampled_sentences(results: Results) -> list[str]:
    """The interval of each difference over test people."""
    found = compare_variants(results)
    if not found:
        return []
    subjects: dict[str, list[str]] = {}
    for one in found:
        words = f"{METRICS[one.metric]} {signed(one.interval.low)} to {signed(one.interval.high)}"
        subjects.setdefault(one.variant, []).append(words)
    told = (f"{_subject(_variant(results, name))}: {', '.join(words)}" for name, words in subjects.items())
    numbers, tested = results.bootstrap, found[0]
    return [
        f"Over test people, with these trained models as they are, {100 * numbers.confidence:g} % of resampled "
        f"differences from the Baseline lie within these points: {'; '.join(told)} (paired bootstrap of "
        f"{tested.identities} identities, each with all its queries, {tested.queries} in all, {numbers.resamples} "
        "times). That is no spread over trainings: only further seeds show what another training would give."
    ]


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
    trained = "below 1" if loss < 1 else "not below 1, so rows also rank speed of training"
    losses = ((row.label, score(results, row.name, "training", "L_id")) for row in results.variants)
    late = [f"{label} ({one.mean:.2f})" for label, one in losses if one is not None and one.mean >= 1]
    behind = [f"L_id is still 1 or above for {', '.join(late)}."] if late and loss < 1 else []
    return [
        f"The Baseline finds the person in the other modality at Rank-1 {100 * rank1:.2f} %, {times} chance, and "
        f"within a modality at {100 * visible:.2f} % (visible) and {100 * infrared:.2f} % (infrared); "
        f"its last L_id is {loss:.2f}, {trained}.",
        *behind,
    ]


def _probe_sentences(results: Results) -> list[str]:
    records = list(results.records.values())
    if not records:
        return []
    used = records[0]["config"]["dataset"]["recipe"]["test_feature"]
    after, before = (_by_variant(results, "probe", name, 1) for name in (used, "pretrained"))
    starts = {f"{record['probe']['pretrained']:.3f}": 100 * record["probe"]["pretrained"] for record in records}
    started = f"{next(iter(starts.values())):.1f} %" if len(starts) == 1 else before  # one backbone, but many splits
    return [
        "A linear probe tells the modality of a test image from its feature with this balanced accuracy, on people it "
        f"was not fitted to (50 % is guessing): {after}; before training, from the pretrained backbone, {started}."
    ]


def _by_variant(results: Results, setting: str, metric: str, decimals: int) -> str:
    """`Baseline 12.34 %, B + CC ...` for the variants that were run."""
    scores = ((row.label, score(results, row.name, setting, metric, 100.0)) for row in results.variants)
    return ", ".join(f"{label} {one.mean:.{decimals}f} %" for label, one in scores if one)


# -------------------- the paper


AGAINST_PAPER = "Against the paper"
SLIPS = "Where the paper contradicts itself"
JUDGED_BY = (
    "The paper states neither seeds nor a spread. A figure of its is called reproduced when it lies within two "
    "standard deviations of our mean."
)
_REPRODUCED, _NOT_REPRODUCED = "Reproduced within two standard deviations", "Not reproduced"
_UNJUDGED, _NOT_RUN = "Cannot be judged", "Cannot be judged, for it was not run"
_VERDICTS = (_REPRODUCED, _NOT_REPRODUCED, _UNJUDGED, _NOT_RUN)
_DIRECTIONS = {"infrared2visible": "thermal to visible", "visible2infrared": "visible to thermal"}
_CLAIMED_MAP_GAIN = 5.04  # "Comparisons on SYSU-MM01", over cm-SSFT
_SILENT = (
    "Its total loss (Eq. 6) leaves out L_sid (Eq. 4), without which the classifiers C_v and C_r, whose agreement Eq. 5 "
    "asks for, are never trained; here it is added with the weight `lambda_sid`.",
    "Around Eq. 3 it says that features of different modalities are never pushed apart; as printed, Eq. 3 takes the "
    "centre from the other modality and the negative from the anchor's, so it does just that. Here it is as printed; "
    "`negatives: center` is the prose's reading.",
    "It states no seed, number of runs, RegDB trial, rule for choosing the epoch, or pooling, and calls its own method "
    "“MPANet” in its results and conclusion, which is a sibling paper's.",
)

Printed = dict[str, dict[str, float]]  # a table of the paper by method, then column; NaN for a dash
Verdict = tuple[str, str, str]  # verdict, what is judged and by what, the scores


def _judge(results: Results, one: Comparison) -> Verdict:
    where = f"{one.variant.label}, {SETTINGS[results.layout][one.setting]}, against the paper's {one.method}"
    return _verdict_on(results, where, one.metric, one.paper, one.ours)


def _verdict_on(results: Results, where: str, metric: str, paper: float, ours: Score | None) -> Verdict:
    if ours is None:
        return _NOT_RUN, where, metric
    difference = ours.mean - paper
    if results.markers:
        reason = "the protocol or the data are not the paper's, see above"
    elif ours.std is None and ours.std_trials is None:
        reason = "n = 1, so there is no standard deviation"
    else:
        reason = ""
    if reason:
        return _UNJUDGED, f"{where} ({reason})", f"{metric} {ours.mean:.2f} (paper {paper:.2f}, {signed(difference)})"
    if ours.std is not None:
        std, over = ours.std, f"n = {ours.n} seeds"
    else:
        assert ours.std_trials is not None
        std, over = ours.std_trials, f"n = {ours.n_trials} splits, one seed"
    verdict = _REPRODUCED if abs(difference) <= 2 * std else _NOT_REPRODUCED
    text = f"{metric} {ours.mean:.2f} ± {std:.2f} (paper {paper:.2f}, {signed(difference)})"
    return verdict, f"{where} ({over})", text


def _judged_gains(results: Results, baseline: str = "baseline") -> list[Verdict]:
    """The paper's gains over its Baseline (its Table 3, on SYSU-MM01) against ours, paired by seed."""
    if results.synthetic or results.layout != "sysu":
        return []
    table, setting = _printed(results, 3), ABLATION_SETTING["sysu"]
    labels = {row.name: row.label for row in results.variants if row.name in PAPER_ROWS}
    verdicts = []
    for variant in [name for name in labels if name != baseline and baseline in labels]:
        where = f"gain of {labels[variant]} over {labels[baseline]} in points, {SETTINGS['sysu'][setting]}"
        for metric, column, header in (("cmc1", "rank1", "Rank-1"), ("mAP", "mAP", "mAP")):
            ours, theirs = (seed_means(results, name, setting, metric) for name in (variant, baseline))
            gains = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
            std = statistics.stdev(gains) if len(gains) > 1 else None
            gain = Score(statistics.fmean(gains), len(gains), std) if gains else None
            printed = table[PAPER_ROWS[variant][0]][column] - table[PAPER_ROWS[baseline][0]][column]
            verdicts.append(_verdict_on(results, where, header, printed, gain))
    return verdicts


def _sysu_claim(table: Printed) -> list[str]:
    cm_ssft = next(method for method in table if _short(method) == "cm-SSFT")
    ours, best = table["DANet"]["all_single_mAP"], table[cm_ssft]["all_single_mAP"]
    lines = [
        f"Its text puts DANet {_CLAIMED_MAP_GAIN:.2f} points of mAP above cm-SSFT on SYSU-MM01; its Table 1 has "
        f"{ours:.2f} and {best:.2f}, which is {signed(ours - best)}."
    ]
    better = _better_map(table, {f"{setting}_mAP": words for setting, words in SETTINGS["sysu"].items()})
    return [*lines, f"Its text has DANet ahead of all others by large margins; in its Table 1, {better}."]


def _regdb_claim(table: Printed) -> list[str]:
    better = _better_map(table, {f"{direction}_mAP": words for direction, words in _DIRECTIONS.items()})
    return [f"Its text has DANet consistently ahead of all others on RegDB; in its Table 2, {better}."]


def _better_map(table: Printed, columns: dict[str, str]) -> str:
    """Which printed mAP are above DANet's, in words."""
    found = [
        f"{_short(method)}'s {row[column]:.2f} against its {table['DANet'][column]:.2f} ({words})"
        for column, words in columns.items()
        for method, row in table.items()
        if row[column] > table["DANet"][column]
    ]
    return f"its mAP is below that of others: {', '.join(found)}" if found else "no method has a higher mAP"


def _printed(results: Results, number: int) -> Printed:
    table = paper_table(number, results.root / "results" / "paper")
    return {str(method): {str(key): float(value) for key, value in row.items()} for method, row in table.iterrows()}


def _short(method: str) -> str:
    """A method's name without its citation."""
    return method.partition(" (")[0]
