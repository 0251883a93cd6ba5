"""A table of scores as a value, and how it is printed: Markdown to read, tidy CSV to compute with, LaTeX to cite.

Nothing here reads a file or knows where a score comes from (that is `report`); equal tables give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

NOT_RUN = "not run"


@dataclass(frozen=True)
class Score:
    """A cell: mean over trials and seeds in the unit that is printed, with the spreads kept apart.

    `std` is over the `n` seeds (each the mean over its trials), `std_trials` over RegDB's trials (each the mean over
    the seeds), `std_galleries` over SYSU-MM01's random galleries (likewise). All are sample standard deviations
    (n - 1), None where there is only one value.
    """

    mean: float
    n: int | None = None
    std: float | None = None
    n_trials: int | None = None
    std_trials: float | None = None
    n_galleries: int | None = None
    std_galleries: float | None = None


@dataclass(frozen=True)
class Column:
    """A column: its name in the CSV, its header and its unit."""

    key: str
    header: str
    unit: str = "percent"


@dataclass(frozen=True)
class Row:
    """A row; `source` is "paper", "ours" or "difference" (ours minus the paper's). A cell that is None was not run."""

    source: str
    variant: str
    label: str
    cells: tuple[Score | None, ...]
    seeds: str


@dataclass(frozen=True)
class Block:
    """Rows under one heading; a table has one block per setting."""

    setting: str
    heading: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """One table; `runs` and `notes` say what it was made of."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    blocks: tuple[Block, ...]
    runs: tuple[str, ...]
    notes: tuple[str, ...]
    dataset: str
    synthetic: bool

    def markdown(self) -> str:
        """The table as GitHub Markdown: caption, one table per block, provenance."""
        lines = [escape_markdown(self.caption), ""]
        for block in self.blocks:
            if block.heading:
                lines += [f"**{escape_markdown(block.heading)}**", ""]
            lines += [_markdown_row(self.headers()), "| :-- |" + " --: |" * (len(self.columns) + 1)]
            lines += [_markdown_row(self.texts(row)) for row in block.rows]
            lines.append("")
        runs = f"Made of {len(self.runs)} runs: {', '.join(self.runs)}." if self.runs else "Made of no run."
        return "\n".join([*lines, f"<sub>{escape_markdown(' '.join([runs, *self.notes]))}</sub>"]) + "\n"

    def csv(self) -> str:
        """The table in tidy form: one line per block, row and column.

        Mean and standard deviations (see `Score`) are in `unit` with four decimals, and empty where there is none.
        """
        lines = []
        for block in self.blocks:
            for row in block.rows:
                absent = NOT_RUN if row.source == "ours" else "none"
                present = "printed" if row.source == "paper" else "run"
                for column, cell in zip(self.columns, row.cells, strict=True):
                    line = {"dataset": self.dataset, "synthetic": str(self.synthetic).lower(), "setting": block.setting}
                    line |= {"source": row.source, "variant": row.variant, "label": row.label, "metric": column.key}
                    line |= {"unit": column.unit, "status": present if cell else absent}
                    for key in ("mean", "std", "n", "std_trials", "n_trials", "std_galleries", "n_galleries"):
                        value = getattr(cell, key, 0 if key == "n" and row.source == "ours" else None)
                        text = f"{value + 0.0:.4f}" if isinstance(value, float) else str(value)  # + 0.0: never -0
                        line[key] = "" if value is None else text
                    lines.append(line)
        return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        r"""The table for LaTeX with `\usepackage{booktabs}`; provenance stands in comments."""
        width = len(self.columns) + 2
        lines = [f"% {line}" for line in ("\\usepackage{booktabs}", *self.runs, *self.notes)]
        lines += ["\\begin{table*}", "\\centering", "\\small", "\\setlength{\\tabcolsep}{4pt}"]
        lines += [f"\\caption{{{escape_latex(self.caption)}}}", f"\\label{{tab:{self.dataset}-{self.name}}}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}", "\\toprule", _latex_row(self.headers())]
        for block in self.blocks:
            lines.append("\\midrule")
            if block.heading:
                lines.append(f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{escape_latex(block.heading)}}}}} \\\\")
            previous = "ours"
            for row in block.rows:
                if previous == "paper" != row.source:
                    lines.append("\\addlinespace")
                previous = row.source
                lines.append(_latex_row(self.texts(row)))
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table*}"]) + "\n"

    def headers(self) -> list[str]:
        """The first line of each block."""
        return ["Variant", *(column.header for column in self.columns), "Seeds"]

    def texts(self, row: Row) -> list[str]:
        """What a row shows. Which spreads any cell of the table has decides how all look."""
        return [row.label, *(_cell_text(cell, row.source, self.spreads) for cell in row.cells), row.seeds]

    @property
    def spreads(self) -> tuple[str, ...]:
        """The kinds of standard deviation that are printed, in their order behind the ±; the CSV has them all.

        Over random galleries it is printed beside the paper's figures only: on the embedded set it would be read as
        the spread between runs, which it is not.
        """
        cells = [cell for block in self.blocks for one in block.rows for cell in one.cells if cell]
        kinds = ("std", "std_trials") if self.synthetic else ("std", "std_trials", "std_galleries")
        return tuple(kind for kind in kinds if any(getattr(cell, kind) is not None for cell in cells))


def _cell_text(cell: Score | None, source: str, spreads: tuple[str, ...]) -> str:
    if cell is None:
        return NOT_RUN if source == "ours" else "–"
    if source == "difference":
        return signed(cell.mean)
    text = f"{cell.mean:.2f}"
    if source == "paper":
        return text
    values = [getattr(cell, kind) for kind in spreads]
    if all(value is None for value in values):
        return text
    return f"{text} ± {' / '.join('–' if value is None else f'{value:.2f}' for value in values)}"


def signed(value: float) -> str:
    """Two decimals with a sign, a true minus; zero has none."""
    text = f"{abs(value):.2f}"
    if text == "0.00":
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def escape_markdown(text: str) -> str:
    """Escape what would change the table or the emphasis, but nothing in code spans and no underscore within a word."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"[\\|*<>]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\\g<0>", parts[index])
    return "`".join(parts)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"${character}$" for character in "<>"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "−": "$-$",
    "–": "--",
    "→": "$\\rightarrow$",
    "×": "$\\times$",
}


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + " \\\\"


def escape_latex(text: str) -> str:
    """Plain text and `code spans` for LaTeX."""
    parts = ["".join(_LATEX.get(character, character) for character in part) for part in text.split("`")]
    # An en dash would be made of the two hyphens of a command-line option, so inside code each stands alone.
    parts[1::2] = [f"\\texttt{{{part.replace('--', '{-}{-}')}}}" for part in parts[1::2]]
    return "".join(parts)
