"""README.md's generated section: rewritten from results/, and nothing else of the README touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fixtures.records import study, write_records

from danet_core import findings, report, scores
from danet_core.files import StudyError
from tools import readme

ROOT = Path(__file__).resolve().parent.parent
PROSE = (
    b"# Title \xe2\x80\x94 as typed\r\n\r\n<!-- results:begin -->",
    b"<!-- results:end -->\r\n\ttail without newline",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with a README and the embedded sets' tables, as the tables notebook writes them."""
    for dataset in readme.DATASETS:
        write_records(tmp_path, dataset, study())
        write_tables(tmp_path, dataset)
    for name in findings.README_FIGURES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_bytes(b"\nold\n".join(PROSE))
    return tmp_path


def write_tables(root: Path, dataset: str) -> None:
    results = scores.load_results(study(), dataset, root)
    for table in report.tables(results):
        report.write_table(table, results.tables_folder)
    findings.write_findings(results)


def test_the_section_is_rewritten_and_the_prose_keeps_every_byte(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert readme.main(root) == 0
    written = (root / "README.md").read_bytes()
    assert written.startswith(PROSE[0]) and written.endswith(PROSE[1])
    section = written[len(PROSE[0]) : -len(PROSE[1])].decode("utf-8")
    assert section == "\n" + findings.readme_block(readme.DATASETS, root)
    assert section.index("| Baseline | 20.00 |") < section.index("B + CC raised Rank-1 by 7.80 points")
    assert "\nold\n" not in section and "rewritten" in capsys.readouterr().out
    assert [path.name for path in root.glob("*README*")] == ["README.md"]


def test_an_up_to_date_readme_is_left_alone(root: Path, capsys: pytest.CaptureFixture) -> None:
    readme.main(root)
    before = (root / "README.md").stat()
    assert readme.main(root) == 0
    after = (root / "README.md").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "up to date" in capsys.readouterr().out


def test_other_results_give_another_section(root: Path) -> None:
    assert readme.update(root)
    before = (root / "README.md").read_bytes()
    path = root / "results" / "synth_regdb" / "metrics" / "b_cc-t1-s0.json"
    path.unlink()
    write_tables(root, "synth_regdb")
    assert readme.update(root)
    assert b"B + CC or Baseline was not run" in (root / "README.md").read_bytes()
    assert b"B + CC or Baseline was not run" not in before


@pytest.mark.parametrize(
    "text",
    [
        "no marks\n",
        "<!-- results:begin -->\n",
        "<!-- results:end -->\n<!-- results:begin -->\n",
        "<!-- results:begin -->\n<!-- results:end -->\n<!-- results:begin -->\n<!-- results:end -->\n",
    ],
    ids=["none", "one", "order", "twice"],
)
def test_a_readme_without_its_marks_is_refused_and_kept(root: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    (root / "README.md").write_text(text, encoding="utf-8")
    assert readme.main(root) == 1
    assert "tools.readme: README.md must hold the marks <!-- results:begin -->" in capsys.readouterr().err
    assert (root / "README.md").read_text(encoding="utf-8") == text


def test_the_section_shows_two_figures_by_links_that_lead_to_them(root: Path) -> None:
    readme.update(root)
    links = re.findall(r"^!\[([^\]]+)\]\(([^)]+)\)$", (root / "README.md").read_text(encoding="utf-8"), re.M)
    assert [Path(link).name for _, link in links] == ["cmc.png", "distances.png"]
    assert all((ROOT / link).is_file() and "Synthetic" in words for words, link in links)


def test_what_is_missing_is_named(root: Path) -> None:
    figure = root / "results" / "synth_sysu" / "figures" / "cmc.png"
    figure.unlink()
    with pytest.raises(StudyError, match=r"cmc\.png is missing.*dvc repro"):
        readme.update(root)
    figure.touch()
    (root / "results" / "synth_regdb" / "tables" / "findings.md").unlink()
    with pytest.raises(StudyError, match=r"findings\.md is missing.*dvc repro"):
        readme.update(root)
    (root / "README.md").unlink()
    with pytest.raises(StudyError, match=r"README\.md is missing"):
        readme.update(root)


def test_the_reference_comes_first_and_its_absence_is_said_in_its_place(root: Path) -> None:
    quick = findings.readme_block(readme.DATASETS, root)
    assert quick.startswith("### The reference: several seeds (`make reference`)\n\nNot made yet: there is no")
    assert quick.index("Not made yet") < quick.index("### The quick default (`make repro`)") < quick.index("#### synth")
    seeds = study(seeds=(0, 1, 2))
    for dataset in readme.DATASETS:
        write_records(root / "copy", dataset, seeds)
        results = scores.load_results(seeds, dataset, root / "copy")
        report.write_table(report.table3(results), root / "results" / "reference" / dataset / "tables")
        findings.write_findings(results)
        (results.tables_folder / "findings.md").rename(
            root / "results" / "reference" / dataset / "tables" / "findings.md"
        )
    both = findings.readme_block(readme.DATASETS, root)
    first, second = both.split("### The quick default (`make repro`)")
    assert "Not made yet" not in both
    assert first.count("n = 3 seeds") > 2 and first.count("#### synth_") == second.count("#### synth_") == 2
    for dataset in readme.DATASETS:  # the words of several seeds stand above, so those of one are linked
        tables = root / "results" / dataset / "tables"
        assert (tables / "table3.md").read_text() in second and (tables / "findings.md").read_text() in quick
        assert (tables / "findings.md").read_text() not in second
        assert f"[{dataset}](results/{dataset}/tables/findings.md)" in second


def test_the_projects_readme_shows_what_its_results_hold() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert findings.insert_block(text, findings.readme_block(readme.DATASETS, ROOT)) == text, "run `dvc repro`"
