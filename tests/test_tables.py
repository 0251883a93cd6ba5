"""How a table is printed: Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from fixtures.records import study, write_records

from danet_core import report, scores
from danet_core.tables import Block, Column, Row, Score, Table, signed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with the paper's tables and nothing else."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    return tmp_path


def table(*rows: Row) -> Table:
    columns = (Column("rank1", "Rank-1"), Column("L_id", "Final L_id", "nats"))
    return Table("t", "a < b", columns, (Block("s", "All", rows),), ("run a",), ("A note.",), "d", True)


HAND_MADE = table(
    Row("paper", "DANet", "paper: DANet", (Score(66.894), None), "not stated"),
    Row("ours", "b", "ours: B", (Score(27.806, 3, 1.0), Score(0.75, 3)), "3"),
    Row("ours", "c", "ours: C", (None, None), "0 of 3"),
    Row("difference", "b", "difference", (Score(27.806 - 66.894), None), "–"),
)


def test_markdown_of_a_hand_made_table() -> None:
    assert HAND_MADE.markdown().splitlines() == [
        *("a \\< b", "", "**All**", ""),
        "| Variant | Rank-1 | Final L_id | Seeds |",
        "| :-- | --: | --: | --: |",
        "| paper: DANet | 66.89 | – | not stated |",
        "| ours: B | 27.81 ± 1.00 | 0.75 | 3 |",
        "| ours: C | not run | not run | 0 of 3 |",
        "| difference | −39.09 | – | – |",
        *("", "<sub>Made of 1 runs: run a. A note.</sub>"),
    ]


def test_csv_of_a_hand_made_table_says_why_a_number_is_missing() -> None:
    lines = [line for line in csv.DictReader(io.StringIO(HAND_MADE.csv())) if line["metric"] == "rank1"]
    shown = [(line["source"], line["status"], line["mean"], line["std"], line["n"]) for line in lines]
    assert shown == [
        ("paper", "printed", "66.8940", "", ""),
        ("ours", "run", "27.8060", "1.0000", "3"),
        ("ours", "not run", "", "", "0"),
        ("difference", "run", "-39.0880", "", ""),
    ]


def test_spreads_over_seeds_and_trials_are_shown_side_by_side_once_a_cell_has_both() -> None:
    both = Row("ours", "b", "B", (Score(20.0, 2, 0.7, 3, 0.5), None), "2")
    alone = Row("ours", "c", "C", (Score(21.0, 1, None, 3, 0.25), None), "1 of 2")
    assert "| 20.00 ± 0.70 / 0.50 |" in table(both, alone).markdown()
    assert "| 21.00 ± – / 0.25 |" in table(both, alone).markdown()
    assert "| 21.00 ± 0.25 |" in table(alone).markdown()


def test_a_difference_has_a_sign_unless_it_rounds_to_zero() -> None:
    assert [signed(value) for value in (1.234, -1.234, 0.004, -0.004, 0.0)] == [
        "+1.23",
        "−1.23",
        "0.00",
        "0.00",
        "0.00",
    ]


@pytest.mark.parametrize("dataset", ["synth_sysu", "synth_regdb", "sysu", "regdb"])
def test_latex_is_balanced_escaped_and_as_wide_as_its_columns(root: Path, dataset: str) -> None:
    write_records(root, dataset, study(seeds=(0, 1)))
    for table in report.tables(scores.load_results(study(seeds=(0, 1)), dataset, root)):
        lines = [line for line in table.latex().splitlines() if not line.startswith("%")]
        text = "\n".join(lines)
        assert text.isascii(), "pdflatex knows no other character without set-up"
        plain = text.replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}")
        assert re.findall(r"\\begin\{(.+?)\}", text) == list(reversed(re.findall(r"\\end\{(.+?)\}", text)))
        width = len(re.search(r"\\begin\{tabular\}\{(lr*)\}", text).group(1))  # type: ignore[union-attr]
        body = [line for line in lines if line.endswith("\\\\")]
        for line in body:
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == width, line
        unlabelled = [line for line in lines if not line.startswith("\\label")]
        assert not re.search(r"(?<!\\)[_%#]", "\n".join(unlabelled).replace("{-}", ""))


def test_special_characters_of_a_label_are_escaped() -> None:
    row = Row("ours", "x", "50% A_B & $C$ | ~{^}\\", (Score(1.0, 1),), "1")
    column = Column("rank1", "Rank-1")
    table = Table("t", "a < b", (column,), (Block("s", "", (row,)),), (), (), "d", True)
    escaped = "50\\% A\\_B \\& \\$C\\$ | \\textasciitilde{}\\{\\textasciicircum{}\\}\\textbackslash{} & 1.00 & 1 \\\\"
    assert escaped in table.latex()
    assert "| 50% A_B & $C$ \\| ~{^}\\\\ | 1.00 | 1 |" in table.markdown()
