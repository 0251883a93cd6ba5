"""The readings study: what each choice that the paper leaves open moves, against the spread over seeds.

From the evaluation records of the rows that params.yaml lists under `readings` to one table and one forest plot. These
are test identities of a data set, read for sensitivity: nothing is chosen by them. No torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import special

from danet_core.config import Study
from danet_core.files import StudyError, atomic_write_json, atomic_write_text, read_json
from danet_core.runs import read_training_record
from danet_core.scores import ABLATION_SETTING, SETTINGS, SYNTHETIC_NOTE
from danet_core.style import StudyFigure, finish, need, style
from danet_core.tables import NOT_RUN, escape_markdown, signed

Record = Mapping[str, Any]

SCORES = {"cmc1": "Rank-1", "mAP": "mAP"}
RAISES, LOWERS, NOT_TOLD_APART = "raises", "lowers", "not told apart"
FEWEST_SEEDS = 3
RULE = (
    "A reading raises or lowers a score if it does so for every seed, of which there are at least three, and on "
    "average by more than stands under 'to exceed': the most that two seeds of the reading differ, or two of the row "
    "it is compared with, or two of a trained row on average over all of them. 'Same runs' marks two ways of scoring "
    "the same weights, where the spread over trainings is no noise: the 95 % interval (Student's t) of the paired "
    "differences has to lie off zero. Else the two are not told apart. Rows that share a reference err together; "
    "docs/READINGS.md says how often."
)
PURPOSE = (
    "One choice at a time, but where a row names several; the same seed on both sides of each difference. Scores are "
    "those of test identities, read to see what matters, and no default was or is to be chosen by them."
)
NOTHING_RUN = "Not run yet: `make readings` trains the rows and makes the table and the figure."


@dataclass(frozen=True)
class Difference:
    """A reading against another row in one score, in points.

    `paired` holds reading minus reference for each seed that both have. `to_exceed` is what the mean change has to
    exceed to be told apart; None where there are too few seeds for a verdict. `same_runs` says that the two score the
    same weights.
    """

    paired: tuple[float, ...]
    to_exceed: float | None
    same_runs: bool

    @property
    def change(self) -> float:
        return statistics.fmean(self.paired)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the paired differences; None for one seed."""
        return statistics.stdev(self.paired) if len(self.paired) > 1 else None

    @property
    def verdict(self) -> str:
        """What RULE says."""
        one_sign = min(self.paired) > 0 or max(self.paired) < 0
        if self.to_exceed is None or not one_sign or abs(self.change) <= self.to_exceed:
            return NOT_TOLD_APART
        return RAISES if self.change > 0 else LOWERS


@dataclass(frozen=True)
class Line:
    """A row of the study: its names and, by score (`cmc1`, `mAP`), the seeds' values in percent and its difference.

    A reference (a row that is compared with nothing) has no differences; neither has a row without a common seed.
    """

    name: str
    group: str
    against: str | None
    choice: str
    reading: str
    values: Mapping[str, tuple[float, ...]]
    differences: Mapping[str, Difference]
    final_L_id: float | None


@dataclass(frozen=True)
class Outcome:
    """All rows of the study in their order in params.yaml, and what the scores were made of.

    `seeds_differ` is, by score, the largest difference between two seeds of a trained row, in points, on average over
    those with a verdict's number of seeds; empty where there is none.
    """

    dataset: str
    title: str
    synthetic: bool
    setting: str
    seeds: tuple[int, ...]
    lines: tuple[Line, ...]
    seeds_differ: Mapping[str, float]
    provenance: Mapping[str, str]
    folder: Path


def load_records(study: Study, root: Path | str = ".") -> dict[str, dict[int, Record]]:
    """The evaluation records that exist, by row and seed.

    Raises StudyError for a damaged record, for one that was made with other numbers than params.yaml has now, and for
    records over different data or backbone weights.
    """
    records: dict[str, dict[int, Record]] = {}
    first: tuple[Path, dict[str, Any]] | None = None
    for name in study.readings.rows:
        for seed in study.readings.seeds:
            config = study.reading(name, seed)
            path = Path(root) / "results" / config.metrics
            if not path.exists():
                continue
            record = read_json(path)
            _require_current(path, record, config.resolved(), dataclasses.asdict(config.evaluation))
            common = {key: record["provenance"][key] for key in ("data_sha256", "weights_sha256")}
            common |= {"split": record["split"], "partial": record["partial"]}
            first = first or (path, common)
            for key, value in common.items():
                if value != first[1][key]:
                    raise StudyError(
                        f"{first[0]} and {path} differ in {key} ({first[1][key]} against {value}), so no table can "
                        "hold both; run `make readings` to make all rows from the same data"
                    )
            records.setdefault(name, {})[seed] = record
    return records


def _require_current(path: Path, record: Any, config: Any, evaluation: Any) -> None:
    for key, expected in (("config", config), ("evaluation", evaluation)):
        if not isinstance(record, dict) or record.get(key) != expected:
            raise StudyError(
                f"{path}: expected a reading's record with the {key} that params.yaml gives it now, found another; "
                "run `make readings`"
            )


def outcome(study: Study, records: Mapping[str, Mapping[int, Record]], root: Path | str = ".") -> Outcome:
    """Every row with its differences, worked out from `records` (by row and seed, see `load_records`)."""
    dataset = study.dataset(study.readings.dataset)
    setting = ABLATION_SETTING[dataset.layout]
    scores = {
        name: {
            metric: {seed: 100 * one["settings"][setting]["mean"][metric] for seed, one in found.items()}
            for metric in SCORES
        }
        for name, found in records.items()
    }
    ranges: dict[str, dict[str, float]] = {metric: {} for metric in SCORES}  # by trained row
    for name, found in scores.items():
        for metric, values in found.items():
            if len(values) >= FEWEST_SEEDS:
                ranges[metric].setdefault(study.trained_as[name], _range(values))
    seeds_differ = {metric: statistics.fmean(found.values()) for metric, found in ranges.items() if found}
    lines = []
    for name, row in study.readings.rows.items():
        ours, theirs = scores.get(name, {}), scores.get(row.against or "", {})
        same_runs = study.trained_as[name] == study.trained_as[row.against or name]
        differences = {
            metric: difference
            for metric in ours
            if metric in theirs
            and (
                difference := compare(ours[metric], theirs[metric], seeds_differ.get(metric, 0.0), same_runs=same_runs)
            )
        }
        final = [one["training"]["final"]["L_id"] for one in records.get(name, {}).values()]
        lines.append(
            Line(
                name,
                row.group,
                row.against,
                row.choice,
                row.reading,
                {metric: tuple(values.values()) for metric, values in ours.items()},
                differences,
                statistics.fmean(final) if final else None,
            )
        )
    some = next((one for found in records.values() for one in found.values()), None)
    provenance = {key: some["provenance"][key] for key in ("data_sha256", "weights_sha256")} if some else {}
    folder = Path(root) / "results" / dataset.name / "readings"
    seeds = study.readings.seeds
    names = dataset.name, dataset.title, dataset.synthetic
    return Outcome(*names, setting, seeds, tuple(lines), seeds_differ, provenance, folder)


def summary(found: Outcome) -> str:
    """How much of the study was run, in a sentence. Raises StudyError, with what to do, where nothing was."""
    run = [line for line in found.lines if line.values]
    if not run:
        raise StudyError(f"no row of `readings` in params.yaml has been run on {found.dataset}; run `make readings`")
    return f"{len(run)} of {len(found.lines)} rows have records, {sum(len(line.values['mAP']) for line in run)} in all"


def compare(
    reading: Mapping[int, float], reference: Mapping[int, float], seeds_differ: float, *, same_runs: bool
) -> Difference | None:
    """A reading's scores by seed, in percent, against a reference's; None where they have no seed in common.

    `seeds_differ` is the study's (see `Outcome`). It keeps a reference whose seeds happen to lie close together from
    letting many rows pass, of which none differs from it.
    """
    paired = tuple(reading[seed] - reference[seed] for seed in reading if seed in reference)
    if not paired:
        return None
    n, to_exceed = len(paired), None
    if n >= FEWEST_SEEDS and same_runs:
        to_exceed = float(special.stdtrit(n - 1, 0.975)) * statistics.stdev(paired) / math.sqrt(n)
    elif n >= FEWEST_SEEDS:
        to_exceed = max(_range(reading), _range(reference), seeds_differ)
    return Difference(paired, to_exceed, same_runs)


def _range(scores: Mapping[int, float]) -> float:
    return max(scores.values()) - min(scores.values())


# -------------------- table


def table(found: Outcome) -> pd.DataFrame:
    """One line per row and score, in percent and points; what was not run is empty and says so in `status`."""
    lines = []
    for line in found.lines:
        for metric in SCORES:
            values, difference = line.values.get(metric, ()), line.differences.get(metric)
            lines.append(
                {
                    "dataset": found.dataset,
                    "synthetic": str(found.synthetic).lower(),
                    "setting": found.setting,
                    "group": line.group,
                    "row": line.name,
                    "against": line.against,
                    "choice": line.choice,
                    "reading": line.reading,
                    "metric": metric,
                    "status": "run" if values else NOT_RUN,
                    "n": len(values),
                    "mean": statistics.fmean(values) if values else None,
                    "lowest": min(values, default=None),
                    "highest": max(values, default=None),
                    "pairs": len(difference.paired) if difference else 0,
                    "difference": difference.change if difference else None,
                    "difference_std": difference.std if difference else None,
                    "difference_lowest": min(difference.paired) if difference else None,
                    "difference_highest": max(difference.paired) if difference else None,
                    "same_runs": str(difference.same_runs).lower() if difference else None,
                    "to_exceed": difference.to_exceed if difference else None,
                    "verdict": difference.verdict if difference else None,
                    "final_L_id": line.final_L_id,
                }
            )
    return pd.DataFrame(lines)


def markdown(found: Outcome) -> str:
    """The table as GitHub Markdown, one part per group, with the rule and what it was made of."""
    words = SETTINGS["sysu" if found.setting in SETTINGS["sysu"] else "regdb"][found.setting]
    caption = f"{found.title}: readings of the paper, {words}; scores in %, differences in points"
    parts = [escape_markdown(caption) + "\n"]
    for group in dict.fromkeys(line.group for line in found.lines):
        lines = [line for line in found.lines if line.group == group]
        parts += _references(group, lines) if all(line.against is None for line in lines) else _compared(group, lines)
    runs = sum(len(line.values.get("mAP", ())) for line in found.lines)
    notes = [RULE, PURPOSE, *([SYNTHETIC_NOTE] if found.synthetic else [])]
    notes.append(f"{runs} evaluation records, seeds {', '.join(map(str, found.seeds))}.")
    if differ := ", ".join(f"{SCORES[metric]} {value:.2f}" for metric, value in found.seeds_differ.items()):
        notes.append(f"Two seeds of a trained row differ by up to, on average: {differ}.")
    notes += [f"{key.removesuffix('_sha256')} {value[:12]}." for key, value in found.provenance.items()]
    return "\n".join([*parts, f"<sub>{escape_markdown(' '.join(notes))}</sub>"]) + "\n"


def _references(group: str, lines: Sequence[Line]) -> list[str]:
    head = ["", *(f"{name}, {what}" for name in SCORES.values() for what in ("mean", "seeds")), "final L_id"]
    rows = []
    for line in lines:
        cells = [line.choice]
        for metric in SCORES:
            values = line.values.get(metric, ())
            shown = [f"{statistics.fmean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"] if values else []
            cells += shown or [NOT_RUN, "–"]
        rows.append([*cells, _loss(line)])
    return _grid(group, head, rows)


def _compared(group: str, lines: Sequence[Line]) -> list[str]:
    head = ["choice", "reading", "against"]
    head += [text for name in SCORES.values() for text in (name, "difference", "to exceed", "verdict")]
    rows = []
    for line in lines:
        same_runs = any(difference.same_runs for difference in line.differences.values())
        cells = [line.choice, line.reading, f"`{line.against}`{', same runs' if same_runs else ''}"]
        for metric in SCORES:
            cells += _difference_cells(line.values.get(metric, ()), line.differences.get(metric))
        rows.append([*cells, _loss(line)])
    return _grid(group, [*head, "final L_id"], rows, words=3)


def _difference_cells(values: Sequence[float], difference: Difference | None) -> list[str]:
    if not values:
        return [NOT_RUN, "–", "–", "–"]
    if difference is None:
        return [f"{statistics.fmean(values):.2f}", NOT_RUN, "–", "–"]
    std = "" if difference.std is None else f" ± {difference.std:.2f}"
    change = f"{signed(difference.change)}{std} (n = {len(difference.paired)})"
    to_exceed = "–" if difference.to_exceed is None else f"{difference.to_exceed:.2f}"
    return [f"{statistics.fmean(values):.2f}", change, to_exceed, difference.verdict]


def _loss(line: Line) -> str:
    return "–" if line.final_L_id is None else f"{line.final_L_id:.2f}"


def _grid(group: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    rule = "|" + " :-- |" * words + " --: |" * (len(head) - words)
    body = ["| " + " | ".join(map(escape_markdown, cells)) + " |" for cells in (head, *rows)]
    return [f"**{escape_markdown(group)}**\n", body[0], rule, *body[1:], ""]


def write_table(found: Outcome) -> list[Path]:
    """Write `table.csv` and `table.md`, each whole or not at all; their paths."""
    texts = {
        "table.csv": table(found).to_csv(index=False, float_format="%.4f", lineterminator="\n"),
        "table.md": markdown(found),
    }
    for name, text in texts.items():
        atomic_write_text(found.folder / name, text)
    return [found.folder / name for name in texts]


# -------------------- forest plot


def forest(found: Outcome) -> StudyFigure:
    """Differences of all rows that were run, in points: a panel per score, a dot per seed and a diamond for their mean.

    The grey bar reaches to each side as far as the mean has to exceed by RULE. The diamond is filled where RULE tells
    the two apart. Raises StudyError when no row was run together with its reference.
    """
    lines = [line for line in found.lines if line.differences]
    need(lines, "reading with its reference")
    heights: dict[str, float] = {}
    labels: dict[float, str] = {}
    top = 0.0
    for group in dict.fromkeys(line.group for line in lines):
        labels[top] = group
        for line in (line for line in lines if line.group == group):
            top += 1
            heights[line.name] = top
            labels[top] = f"{line.choice}: {line.reading}"
        top += 1.5
    with style():
        figure = StudyFigure(figsize=(9.0, 0.2 * top + 1.6), layout="constrained")
        axes = list(figure.subplots(1, len(SCORES), sharey=True))
        for axis, (metric, name) in zip(axes, SCORES.items(), strict=True):
            for line in lines:
                _draw(axis, heights[line.name], line.differences[metric])
            axis.axvline(0, color="#4D4D4D", linewidth=0.8)
            axis.set_title(f"{name}, difference in points")
            axis.grid(axis="y", visible=False)
        axes[0].set_yticks(list(labels), list(labels.values()))
        for height, text in zip(labels, axes[0].get_yticklabels(), strict=True):
            text.set_fontweight("normal" if height in heights.values() else "bold")
        axes[0].set_ylim(max(heights.values()) + 0.8, -0.8)
        finish(figure, axes, f"Readings of the paper on {found.title}", found.synthetic)
    return figure


def _draw(axis: Any, height: float, difference: Difference) -> None:
    told_apart = difference.verdict != NOT_TOLD_APART
    if (reach := difference.to_exceed) is not None:
        axis.barh(height, 2 * reach, 0.7, -reach, color="#DCDCDC", linewidth=0, label="what the mean has to exceed")
    axis.plot(
        difference.paired,
        [height] * len(difference.paired),
        linestyle="",
        marker="o",
        markersize=2.5,
        color="#0072B2",
        label="one seed",
    )
    axis.plot(
        difference.change,
        height,
        linestyle="",
        marker="D",
        markersize=5,
        color="#D55E00",
        markerfacecolor="#D55E00" if told_apart else "white",
        label="mean, told apart" if told_apart else "mean, not told apart",
    )


# -------------------- what it took


def write_record(study: Study, root: Path | str = ".") -> Path | None:
    """Write `record.json`: configuration, duration and versions of every training run behind the table; its path.

    Durations stand in the training records below `runs/`, which are not in version control. Unless the record of each
    run is there whose scores are, the result is None, nothing is written, and a `record.json` of other models goes.
    A run's `seconds` are those of all its epochs, also of those before an interruption.

    Raises StudyError where a run's model is not the one that was scored, and for runs of different training code.
    """
    root, records = Path(root), load_records(study, root)
    scored = {
        study.reading(name, seed).place: one["provenance"]["model_sha256"]
        for name, found in records.items()
        for seed, one in found.items()
    }
    path = root / "results" / study.readings.dataset / "readings" / "record.json"
    if not all((root / "runs" / place / "record.json").exists() for place in scored):
        if path.exists() and _models(read_json(path)) != {Path(place).name: model for place, model in scored.items()}:
            path.unlink()
        return None
    runs, code = {}, None
    for name, found in records.items():
        for seed, score in found.items():
            config = study.reading(name, seed)
            trained = root / "runs" / config.place / "record.json"
            one = read_training_record(trained)
            code = code or one["versions"]["train_code_sha256"]
            for what, expected, seen in (
                ("model that was scored", score["provenance"]["model_sha256"], one["provenance"]["model_sha256"]),
                ("training code of the other rows", code, one["versions"]["train_code_sha256"]),
            ):
                if seen != expected:
                    raise StudyError(
                        f"{trained}: expected the {what} ({expected[:12]}), found another ({seen[:12]}); run "
                        "`make readings`, which makes what is out of date"
                    )
            runs[trained.parent.name] = {
                "seconds": round(sum(row["seconds"] for row in one["history"]), 1),
                "steps": config.epochs * config.dataset.recipe.steps_per_epoch,
                "config": one["config"],
                "versions": one["versions"],
                "provenance": one["provenance"],
            }
    if not runs:
        return None
    seconds = round(sum(one["seconds"] for one in runs.values()), 1)
    atomic_write_json(path, {"trained_runs": len(runs), "training_seconds": seconds, "runs": runs})
    return path


def _models(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: one["provenance"]["model_sha256"] for name, one in record["runs"].items()}


# -------------------- docs/READINGS.md


def page_block(dataset: str, root: Path | str = ".") -> str:
    """The generated part of docs/READINGS.md: the table as the notebook wrote it, or that nothing has been run."""
    folder = Path(root) / "results" / dataset / "readings"
    if not (folder / "table.md").exists():
        return NOTHING_RUN + "\n"
    parts = [(folder / "table.md").read_text(encoding="utf-8")]
    if (folder / "forest.png").exists():
        note = " Synthetic: rendered pedestrians." if dataset.startswith("synth_") else ""
        parts.append(f"![Forest plot of the readings on {dataset}.{note}](../{folder.relative_to(root)}/forest.png)\n")
    if (folder / "record.json").exists():
        made = read_json(folder / "record.json")
        kinds = {_machine(one["versions"]) for one in made["runs"].values()}
        hours = made["training_seconds"] / 3600
        parts.append(
            f"{made['trained_runs']} trained runs, {hours:.1f} hours of training in all, on "
            f"{', '.join(sorted(kinds))}; "
            f"configuration, duration and versions of each: `results/{dataset}/readings/record.json`.\n"
        )
    return "\n".join(parts)


def _machine(versions: Mapping[str, Any]) -> str:
    device = versions["device"]
    threads = f" with {device['threads']} thread{'s' * (device['threads'] > 1)}" if "threads" in device else ""
    return f"{device['name']}{threads} each"
