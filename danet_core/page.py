"""The report: one self-contained HTML page from records, tables and figures, with no address in it that is fetched.

A section per data set, then the page around them; templates/ holds their HTML. Equal inputs give equal bytes. No torch:
the page can be made from `results/` alone, and what only `runs/` knows (durations, versions) is shown where it exists.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from danet_core import report, scores
from danet_core.findings import AGAINST_PAPER, finding_parts
from danet_core.scores import SYNTHETIC_NOTE, Record, Results
from danet_core.tables import NOT_RUN

if TYPE_CHECKING:
    from danet_core.config import Study

PARTS: Mapping[str, str] = {
    "findings": "findings",
    "tables": "tables",
    "figures": "figures",
    "runs": "runs and durations",
    "configuration": "configuration",
    "provenance": "versions and provenance",
}
# Heading and caption of each picture in results/<data set>/figures, in the order in which they are shown.
FIGURES: Mapping[str, tuple[str, str]] = {
    "cmc": (
        "Retrieval",
        "Share of queries whose match is among the first k. The line is the mean over galleries and runs, the band "
        "reaches from the lowest to the highest of them, where there are several.",
    ),
    "distances": (
        "Figure 1, measured",
        "Distances between test images of the same and of different people, within and across modalities, one panel "
        "per variant. Where Figure 1's claim holds, the dashed blue curve lies right of the solid orange one.",
    ),
    "modality_probe": (
        "What is left of the modality",
        "Balanced accuracy of a linear probe that is asked for the modality of test images of people it was not fitted "
        "to: before training and after it. At 50 % the modality cannot be told.",
    ),
    "camera_pairs": (
        "Camera pairs",
        "mAP of all images of one infrared camera against all images of one visible camera, one panel per variant. The "
        "framed pair looks at the same place, and the protocol leaves it out.",
    ),
    "ranked_lists": (
        "Best and worst queries",
        "The queries of highest and of lowest average precision, one for each person, with their nearest gallery "
        "images: ✓ the same person, ✗ another one; above each its rank and distance.",
    ),
    "training_curves": (
        "Training",
        "Every loss term and the learning rate over the epochs, one line per run.",
    ),
}
ONE_PAIR = "RegDB has one camera of each modality, so that its CMC above already is its only camera pair."
NOT_HERE = "not on this machine"


@dataclass(frozen=True)
class Grid:
    """A table as text: groups are (heading, rows), and a row's first cell is its header."""

    caption: str
    headers: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure; `data` is its PNG in base64, empty where it has not been made."""

    name: str
    heading: str
    caption: str
    data: str


def section(study: Study, dataset: str, root: Path | str = ".") -> str:
    """The HTML of one data set: findings, tables, figures, runs, configuration, versions and provenance.

    Reads `<root>/results` and, where they exist, the training records in `<root>/runs`. What was not run, or is not on
    this machine, is said. Raises StudyError for what `scores.load_results` refuses.
    """
    results = scores.load_results(study, dataset, root)
    trained = {scores.run_name(one["variant"], one["trial"], one["seed"]): one for one in scores.load_training(results)}
    return (
        _environment()
        .get_template("section.html.jinja")
        .render(
            name=dataset,
            title=results.title,
            synthetic=results.synthetic,
            parts=[
                part._replace(lines=[line for line in part.lines if line != SYNTHETIC_NOTE])
                for part in finding_parts(results)
            ],
            unjudged=_UNJUDGED if results.synthetic else "",
            tables=[
                Grid(
                    table.caption,
                    table.headers(),
                    [(block.heading, [table.texts(row) for row in block.rows]) for block in table.blocks],
                    " ".join(table.notes),
                )
                for table in report.tables(results)
            ],
            figures=list(_pictures(results)),
            one_pair=ONE_PAIR if results.layout == "regdb" else "",
            runs=_runs(results, trained),
            configuration=_configuration(results),
            provenance=_provenance(results, list(trained.values())),
        )
    )


def page(study: Study, sections: Mapping[str, str]) -> str:
    """The whole page. sections: the HTML of `section` by data set, in the order in which they are shown."""
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            sections=[
                {"name": name, "title": study.dataset(name).title, "html": Markup(html)}
                for name, html in sections.items()
            ],
            parts=PARTS,
            short=_short(study, sections),
        )
    )


_UNJUDGED = (
    "What did not reproduce of the paper cannot be said from this data set: its images are rendered, so none of the "
    "paper's figures has a counterpart here. That takes runs on the real one."
)


def _short(study: Study, datasets: Iterable[str]) -> list[str]:
    rows = [study.dataset(name) for name in datasets]
    lines = [
        f"{row.title}: compared with the paper, figure by figure, under “{AGAINST_PAPER}” in its findings."
        for row in rows
        if not row.synthetic
    ]
    rendered = [row.title for row in rows if row.synthetic]
    if rendered:
        lines.append(
            f"{'; '.join(rendered)}: rendered, so they neither reproduce nor contradict any figure of the paper."
        )
    lines += [
        f"{title}: {NOT_RUN} (params.yaml does not list it), so nothing is said of the paper's figures on it."
        for layout, title in (("sysu", "SYSU-MM01"), ("regdb", "RegDB"))
        if not any(row.layout == layout and not row.synthetic for row in rows)
    ]
    return lines


def _pictures(results: Results) -> Iterable[Picture]:
    for name, (heading, caption) in FIGURES.items():
        if name == "camera_pairs" and results.layout == "regdb":
            continue
        path = results.figures_folder / f"{name}.png"
        data = base64.b64encode(path.read_bytes()).decode("ascii") if path.exists() else ""
        yield Picture(name, heading, caption, data)


def _runs(results: Results, trained: Mapping[str, Record]) -> Grid:
    rows = []
    for run in results.runs:
        scored, record = results.records.get(run), trained.get(run)
        rows.append(
            [
                run,
                "run" if scored else NOT_RUN,
                str(scored["training"]["steps"]) if scored else "–",
                _minutes(record["seconds"]) if record else NOT_HERE,
                f"{_device(record)}, torch {record['versions']['libraries']['torch']}" if record else NOT_HERE,
                scored["provenance"]["model_sha256"][:12] if scored else "–",
            ]
        )
    durations = [record["seconds"] for record in trained.values()]
    total = f" Training took {_minutes(sum(durations))} for the {len(durations)} runs whose records are here." * bool(
        durations
    )
    headers = ["Run", "Status", "Steps", "Training, min:s", "Device", "Model (SHA-256)"]
    return Grid(f"{results.title}: the runs that params.yaml lists.{total}", headers, [("", rows)])


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def _device(record: Record) -> str:
    device = record["versions"]["device"]
    return f"{device['name']} ({', '.join(f'{value} {key}' for key, value in device.items() if key == 'threads')})"


def _configuration(results: Results) -> list[Grid]:
    """What all runs share, then what sets the variants apart; nothing where there is no record."""
    if not results.records:
        return []
    first = next(iter(results.records.values()))
    groups = [
        ("data set and recipe", [[key, _value(value)] for key, value in _leaves(first["config"]["dataset"])]),
        ("evaluation", [[key, _value(value)] for key, value in _leaves(first["evaluation"])]),
        ("runs", [["trials", _value(list(results.trials))], ["seeds", _value(list(results.seeds))]]),
    ]
    variants = {record["variant"]: dict(_leaves(record["config"]["variant"])) for record in results.records.values()}
    labels = [row.label for row in results.variants if row.name in variants]
    columns = [variants[row.name] for row in results.variants if row.name in variants]
    keys = dict.fromkeys(key for column in columns for key, value in column.items() if value is not None)
    rows = [[key, *(_value(column.get(key)) for column in columns)] for key in keys if key != "name"]
    return [
        Grid(f"{results.title}: what all runs share.", ["Key", "Value"], groups),
        Grid(f"{results.title}: the variants. –: the variant does not have it.", ["Key", *labels], [("", rows)]),
    ]


def _provenance(results: Results, trained: Sequence[Record]) -> Grid:
    libraries: dict[str, dict[str, None]] = {}
    for record in trained:
        found = {"code": record["versions"]["code"], "Python": record["versions"]["python"]}
        for name, version in (found | record["versions"]["libraries"]).items():
            libraries.setdefault(name, {})[str(version)] = None
    versions = [[name, ", ".join(found)] for name, found in libraries.items()]
    hashes = [
        [words, record["provenance"][key]]
        for record in list(results.records.values())[:1]  # check_comparable: the same in all
        for key, words in (("data_sha256", "data (SHA-256)"), ("weights_sha256", "backbone weights (SHA-256)"))
    ]
    models = [
        [
            run,
            f"configuration {one['provenance']['config_sha256'][:12]}, model {one['provenance']['model_sha256'][:12]}",
        ]
        for run, one in results.records.items()
    ]
    groups = [
        ("versions that trained", versions or [["versions", NOT_HERE]]),
        ("data and weights", hashes or [["data", NOT_RUN]]),
        ("runs", models or [["runs", NOT_RUN]]),
    ]
    return Grid(f"{results.title}: versions, as the training records hold them, and hashes.", ["What", "Value"], groups)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, one in value.items():
        if isinstance(one, Mapping):
            yield from _leaves(one, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", one


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["prose"] = _prose
    return environment


def _prose(text: str) -> Markup:
    """Escaped text in which `code spans` are set as code; an odd backtick stays as it is."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    pieces = (Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts))
    return Markup("").join(pieces)
