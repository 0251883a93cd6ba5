"""The report is one valid page that needs nothing else, shows everything there is, and says what is not there."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fixtures.params import embedded
from fixtures.records import edit, metrics, write_records, write_runs

from danet_core import page, report, scores
from danet_core.config import Study, load_study
from danet_core.files import StudyError
from tools import report as tool

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "img", "br", "link", "input"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """What a page holds; raises where an element is not closed in its place or an identifier stands twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        names = [values["id"] for _, values in self.elements if "id" in values]
        assert len(set(names)) == len(names)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [values for name, values in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def rows(self, first: str) -> list[list[str]]:
        return [row for table in self.tables for row in table if row[0] == first]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(embedded(tmp_path / "params.yaml"))


@pytest.fixture
def root(tmp_path: Path, study: Study) -> Path:
    """A project after `dvc repro`: params.yaml, paper's tables, records, runs and pictures of both embedded sets."""
    shutil.copytree(ROOT / "results" / "paper", tmp_path / "results" / "paper")
    for dataset in study.study.datasets:
        write_records(tmp_path, dataset, study)
        write_runs(tmp_path, dataset, study)
        folder = tmp_path / "results" / dataset / "figures"
        folder.mkdir()
        for name in page.FIGURES:
            if (dataset, name) != ("synth_regdb", "camera_pairs"):
                (folder / f"{name}.png").write_bytes(PIXEL)
    return tmp_path


def made(root: Path, study: Study) -> str:
    return page.page(study, {name: page.section(study, name, root) for name in study.study.datasets})


def test_every_table_and_every_figure_of_every_listed_data_set_is_there(root: Path, study: Study) -> None:
    found = Page(made(root, study))
    captions = " ".join(found.texts)
    for dataset in study.study.datasets:
        results = scores.load_results(study, dataset, root)
        for table in report.tables(results):
            assert table.caption.split(":")[0] in captions
            for block in table.blocks:
                for row in block.rows:
                    assert table.texts(row) in found.rows(row.label)
    pictures = [str(image["src"]) for image in found.all("img")]
    assert len(pictures) == 6 + 5
    assert all(base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL for source in pictures)
    assert all(image["alt"] for image in found.all("img"))
    assert page.ONE_PAIR in found.text and "not made on this machine" not in found.text


def test_the_page_fetches_nothing_and_its_links_lead_to_places_in_it(root: Path, study: Study) -> None:
    text = made(root, study)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r'base64,[^"]*', "", text))
    places = {values["id"] for _, values in found.elements if "id" in values}
    links = [str(link["href"]) for link in found.all("a")]
    assert len(links) == 1 + 2 * (1 + len(page.PARTS))
    assert all(link.startswith("#") and link[1:] in places for link in links)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in found.all("img"))


def test_configuration_versions_and_durations_stand_in_it(root: Path, study: Study) -> None:
    found = Page(made(root, study))
    assert found.rows("recipe.lr")[0] == ["recipe.lr", "0.001"]
    assert found.rows("cc.margin")[0] == ["cc.margin", "–", "0.7", "–", "0.7"]
    assert found.rows("galleries")[0] == ["galleries", study.evaluation.galleries]
    run = next(row for row in found.rows("b_cc-t1-s0") if "1:09.3" in row)
    assert run[1:3] == ["run", "560"] and run[4] == "x86_64 (3 threads), torch 2.14.1"
    assert "Training took 4:37.2 for the 4 runs" in found.text
    assert found.rows("code") == 2 * [["code", "0123abcd"]] and found.rows("numpy") == 2 * [["numpy", "2.4.6"]]
    sums = scores.load_results(study, "synth_sysu", root).records["b_cc-t1-s0"]["provenance"]
    assert ["data (SHA-256)", sums["data_sha256"]] in found.rows("data (SHA-256)")


def test_what_was_not_run_or_not_made_is_said(root: Path, study: Study) -> None:
    metrics(root, "synth_sysu", "b_ml-t1-s0").unlink()
    (root / "results" / "synth_sysu" / "figures" / "distances.png").unlink()
    shutil.rmtree(root / "runs")
    shutil.rmtree(root / "results" / "synth_regdb")
    found = Page(made(root, study))
    assert found.rows("b_ml-t1-s0")[0] == ["b_ml-t1-s0", "not run", "–", *2 * ["not on this machine"], "–"]
    assert found.rows("B + ML")[0] == ["B + ML", *9 * ["not run"], "0 of 1"]
    assert "distances: not made on this machine" in found.text
    assert ["versions", "not on this machine"] in found.rows("versions")
    assert found.text.count("not made on this machine") == 1 + 5
    assert len(found.rows("baseline-t1-s0")) == 1 + 2  # regdb's has no hashes to show
    assert found.rows("runs")[-1] == ["runs", "not run"]


def test_it_says_what_did_not_reproduce_on_rendered_and_on_real_data(root: Path, study: Study) -> None:
    assert "they neither reproduce nor contradict any figure of the paper" in made(root, study)
    assert "SYSU-MM01: not run (params.yaml does not list it)" in made(root, study)
    write_records(root, "sysu", study)
    text = page.page(study, {"sysu": page.section(study, "sysu", root)})
    found = Page(text)
    assert "Against the paper" in found.text and "Where the paper contradicts itself" in found.text
    assert "SYSU-MM01: compared with the paper, figure by figure" in found.text and "RegDB: not run" in found.text
    assert "ynthetic" not in re.sub(r"<style>.*</style>", "", text, flags=re.S)
    assert "<code>negatives: center</code>" in text


def test_equal_inputs_give_equal_bytes_and_names_are_escaped(root: Path, study: Study) -> None:
    assert made(root, study) == made(root, study)
    strange = root / "runs" / "synth_sysu" / "b_cc-t1-s0" / "record.json"
    edit(strange, lambda record: record["versions"].update(code="<script>alert(1)</script>"))
    text = made(root, study)
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    Page(text)


def test_the_command_writes_names_and_opens_the_page(
    root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, study: Study
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(tool.webbrowser, "open", opened.append)
    monkeypatch.setattr(tool, "has_screen", lambda: False)
    assert tool.main(["--open"], root) == 0 and opened == []
    assert capsys.readouterr().out == "the report: results/report.html\n"
    path = root / "results" / "report.html"
    assert path.read_text(encoding="utf-8") == made(root, study)
    monkeypatch.setattr(tool, "has_screen", lambda: True)
    assert tool.main(["--open"], root) == 0 and opened == [path.as_uri()]


def test_the_pipelines_two_steps_give_the_same_page_and_a_missing_part_is_named(
    root: Path, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main([], root) == 0
    whole = (root / "results" / "report.html").read_bytes()
    shutil.rmtree(root / "build")
    assert tool.main(["section", "synth_sysu"], root) == 0
    assert tool.main(["page"], root) == 1
    assert re.search(r"tools.report: .*synth_regdb\.html is missing; .*section synth_regdb", capsys.readouterr().err)
    assert tool.main(["section", "synth_regdb"], root) == 0
    assert tool.main(["page"], root) == 0
    assert (root / "results" / "report.html").read_bytes() == whole


def test_a_browser_is_only_started_where_it_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not tool.has_screen()
    monkeypatch.setenv("DISPLAY", ":0")
    assert tool.has_screen()


def test_a_damaged_record_stops_the_report_with_its_name(root: Path, study: Study) -> None:
    metrics(root, "synth_sysu", "b_cc-t1-s0").write_text("{", encoding="utf-8")
    with pytest.raises(StudyError, match=r"b_cc-t1-s0\.json is not valid JSON"):
        page.section(study, "synth_sysu", root)


def test_the_report_of_the_committed_results_can_be_made_without_any_run(tmp_path: Path, study: Study) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    found = Page(made(tmp_path, study))
    assert all(len(table) > 1 for table in found.tables)
    assert len(found.all("img")) >= 6
