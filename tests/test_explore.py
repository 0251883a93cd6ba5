"""Exploring finished runs: what is computed agrees with the study's own functions, and controls change their panels."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import papermill
import pytest
from fixtures.finished import write_finished
from fixtures.notebooks import run_notebook

from danet_core import distances
from danet_core import exploration as looking
from danet_core.config import load_study
from danet_core.exploration import Exploration, MissingRun
from danet_core.explore import Explorer
from danet_core.files import StudyError
from danet_core.protocols import evaluate_regdb, evaluate_sysu
from danet_core.style import StudyFigure

ROOT = Path(__file__).resolve().parent.parent
STUDY = load_study(ROOT / "params.yaml")
PANELS = ("table", "distances", "projection", "claim", "baseline", "b_ml_cc")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def exploration(project: Path) -> Exploration:
    return Exploration(STUDY, project)


@pytest.fixture
def explorer(project: Path) -> Explorer:
    return Explorer(STUDY, project, dataset="synth_sysu", variants=["baseline", "b_ml_cc"])


def shown(explorer: Explorer) -> dict[str, Any]:
    panels = {"table": explorer.table, "distances": explorer.distances, "projection": explorer.projection}
    return {name: panel.value for name, panel in {**panels, "claim": explorer.claim, **explorer.ranked}.items()}


def changed(explorer: Explorer, before: dict[str, Any]) -> set[str]:
    return {name for name, value in shown(explorer).items() if value != before.get(name)}


# -------------------- what is computed


def test_the_runs_found_are_those_with_features_in_the_order_of_the_parameters(exploration: Exploration) -> None:
    assert exploration.runs == {
        "synth_sysu": {(1, 0): ("baseline", "b_cc", "b_ml_cc")},
        "synth_regdb": {(1, 0): ("baseline",), (2, 0): ("baseline", "b_ml_cc")},
    }


def test_what_is_left_out_of_a_choice_is_the_first_there_is(exploration: Exploration) -> None:
    choice = exploration.choose("synth_regdb")
    assert (choice.trial, choice.seed, choice.variants) == (1, 0, ("baseline",))
    assert (choice.setting, choice.feature, choice.metric) == ("thermal_to_visible", "after_bn", "cosine")
    assert choice.pid == 2 and choice.query in exploration.queries("synth_regdb", "thermal_to_visible", 1, 0, 2)
    assert exploration.choose("synth_regdb", trial=2).variants == ("baseline", "b_ml_cc")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "nowhere"}, "nowhere"),
        ({"variants": ["b_c"]}, "b_c"),
        ({"setting": "thermal_to_visible"}, "expected one of all_single, all_multi, indoor_single, indoor_multi"),
        ({"pid": 3}, r"identity 3 has no query in all_single of synth_sysu; expected one of \[2, 4"),
        ({"top": 0}, "at least one image of a ranked list, found 0"),
    ],
)
def test_an_unknown_value_is_refused_by_name(project: Path, given: dict, message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        Explorer(STUDY, project, **{"dataset": "synth_sysu", **given})
    assert not isinstance(caught.value, MissingRun)


@pytest.mark.parametrize(("what", "known"), [("feature", "after_bn"), ("metric", "cosine"), ("colour", "modality")])
def test_an_unknown_option_is_refused_with_the_known_ones(exploration: Exploration, what: str, known: str) -> None:
    choose = inspect.unwrap(Exploration.choose)  # without the tests' own check of types
    with pytest.raises(StudyError, match=f"{what} 'other': expected one of {known}, "):
        choose(exploration, "synth_sysu", **{what: "other"})


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_average_precision_of_all_queries_is_the_protocols_map(exploration: Exploration, metric: str) -> None:
    for dataset, setting in (("synth_sysu", "indoor_multi"), ("synth_regdb", "visible_to_thermal")):
        features = exploration.features(dataset, "baseline", 1, 0)
        queries, gallery = exploration.sides(dataset, setting, 1, 0)
        q, g = ((features.feat_bn[at], features.pids[at], features.camids[at]) for at in (queries, gallery))
        if dataset == "synth_sysu":
            scored = evaluate_sysu(*q, *g, np.arange(len(gallery))[None], distance=metric)
        else:
            scored = evaluate_regdb(*q[:2], *g[:2], distance=metric)
        found = []
        for at in queries.tolist():
            choice = exploration.choose(dataset, setting=setting, metric=metric, pid=int(features.pids[at]))
            choice = dataclasses.replace(choice, query=int(features.rows[at]))
            ranked = exploration.ranking(choice, "baseline")
            found.append(ranked.average_precision)
            if dataset == "synth_sysu" and features.camids[at] == 3:
                assert set(exploration.store(dataset).camids[ranked.ignored]) == {2}
            else:
                assert len(ranked.ignored) == 0
        assert np.nanmean(found) == pytest.approx(scored.mean["mAP"])


def test_the_table_holds_the_distances_of_the_chosen_feature(exploration: Exploration) -> None:
    choice = exploration.choose("synth_sysu", variants=["baseline", "b_cc"], feature="before_bn", metric="euclidean")
    table = exploration.table(choice)
    features = exploration.features("synth_sysu", "b_cc", 1, 0)
    arrays = features.feat, features.pids, features.modalities
    expected = distances.distance_distributions(*arrays, metric="euclidean")
    row = table.loc["B + CC"]
    assert list(table.index) == ["Baseline", "B + CC"]
    assert row["mean distance", "same identity, other modality"] == pytest.approx(expected.kinds["same_cross"].mean)
    separation = expected.separation("same_cross", "different_cross")
    assert row["same or different, other modality", "d′"] == pytest.approx(separation.d_prime)
    share = distances.centre_claim(*arrays)["share"]
    assert row["Figure 1's claim", "share of identities"] == share
    edges = [one.edges for one in exploration.distributions(choice).values()]
    np.testing.assert_array_equal(*edges)


def test_every_figure_can_be_had_without_controls_and_says_synthetic(exploration: Exploration) -> None:
    figures = exploration.figures(exploration.choose("synth_sysu", variants=["b_cc"], colour="identity"))
    assert set(figures) == {"distances", "projection", "claim", "ranked_b_cc"}
    for figure in figures.values():
        assert isinstance(figure, StudyFigure)
        assert "synthetic" in figure._suptitle.get_text()  # type: ignore[attr-defined]


def test_the_ranked_list_marks_right_and_wrong_and_names_what_a_camera_hides(exploration: Exploration) -> None:
    choice = exploration.choose("synth_sysu", pid=4, setting="all_multi", top=7)  # its first query is of camera 3
    figure = exploration.ranked_figure(choice, "baseline")
    told = [text.get_text() for text in figure.axes[0].texts][::2]
    assert told[0] == "query" and len(told) == 1 + 7 + looking.IGNORED_SHOWN
    assert all(word.endswith(("✓", "✗")) for word in told[1:8]) and all(word.endswith("ignored") for word in told[8:])
    title = figure._suptitle.get_text()  # type: ignore[attr-defined]
    assert "Baseline: identity 4" in title and "images of camera 2 are ignored" in title
    names = [text.get_text() for text in figure.axes[0].texts][1::2]
    assert names[0].startswith("3/4/") and all(name.startswith("2/") for name in names[8:])


def test_damaged_features_and_features_of_other_images_are_refused(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "copy")
    path = copy / "runs/synth_sysu/b_cc-t1-s0/features.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StudyError, match=r"b_cc-t1-s0/features.npz is damaged .* run `dvc repro`"):
        Exploration(STUDY, copy).features("synth_sysu", "b_cc", 1, 0)
    record = copy / "runs/synth_sysu/baseline-t1-s0/record.json"
    sha = Exploration(STUDY, project).store("synth_sysu").meta["content_sha256"]
    record.write_text(record.read_text().replace(sha, "0" * 64))
    with pytest.raises(StudyError, match="expected features of the images in .* found those of other images"):
        Exploration(STUDY, copy).choose("synth_sysu")


# -------------------- controls


def test_the_first_look_shows_every_panel_and_the_epoch(explorer: Explorer) -> None:
    first = shown(explorer)
    assert set(first) == set(PANELS)
    assert all(bytes(value).startswith(b"\x89PNG") for name, value in first.items() if name != "table")
    assert "B\u00a0+\u00a0ML\u00a0+\u00a0CC" in explorer.table.value and "overlap" in explorer.table.value
    assert "epoch 14 of 14, the only one kept" in explorer.status.value
    assert explorer.variants["b_cc"].value is False


def test_a_control_draws_again_what_it_touches_and_nothing_else(explorer: Explorer) -> None:
    pairs = {"table", "distances", "projection", "baseline", "b_ml_cc"}
    ranked = {"baseline", "b_ml_cc"}
    for control, value, touched in (
        (explorer.metric, "euclidean", pairs),
        (explorer.feature, "before_bn", pairs | {"claim"}),
        (explorer.colour, "identity", {"projection"}),
        (explorer.identity, 8, {"projection", "claim"} | ranked),
        (explorer.setting, "indoor_multi", ranked),
        (explorer.top, 5, ranked),
        (explorer.query_number, 2, ranked),
        (explorer.colour, "modality", {"projection"}),
    ):
        before = shown(explorer)
        control.value = value
        assert changed(explorer, before) == touched, control.description
        assert "the only one kept" in explorer.status.value


def test_slider_and_list_choose_the_same_query(explorer: Explorer) -> None:
    rows = list(explorer.exploration.queries("synth_sysu", "all_single", 1, 0, 2))
    assert explorer.query_number.max == len(rows) == 6
    explorer.query_number.value = 4
    assert explorer.query.value == rows[3] and explorer.choice.query == rows[3]  # type: ignore[union-attr]
    explorer.query.value = rows[1]
    assert explorer.query_number.value == 2
    explorer.identity.value = 6
    assert explorer.query_number.value == 1 and explorer.choice.pid == 6  # type: ignore[union-attr]


def test_a_variant_is_added_beside_the_others_and_taken_away(explorer: Explorer) -> None:
    before = shown(explorer)
    explorer.variants["b_cc"].value = True
    assert changed(explorer, before) == {"table", "distances", "projection", "claim", "b_cc"}
    assert "B\u00a0+\u00a0CC" in explorer.table.value
    for box in explorer.variants.values():
        box.value = False
    assert "tick at least one" in explorer.status.value
    explorer.variants["b_cc"].value = True
    assert (
        "B\u00a0+\u00a0CC" in explorer.table.value
        and "Baseline" not in explorer.table.value
        and "the only one kept" in explorer.status.value
    )


def test_what_another_look_at_the_run_may_ask_for_is_computed_beside_the_controls(explorer: Explorer) -> None:
    for dataset in ("synth_sysu", "synth_regdb"):
        explorer.dataset.value = dataset
        assert explorer.choice is not None
        explorer.preparing[dataset, 1, 0].join()
        variants = explorer.exploration.variants(dataset, 1, 0)
        for feature in looking.FEATURES:
            for metric in looking.METRICS:
                other = dataclasses.replace(explorer.choice, variants=variants, feature=feature, metric=metric)
                assert explorer.exploration.pending(other) == []


def test_another_data_set_brings_its_own_runs_and_settings(explorer: Explorer) -> None:
    explorer.dataset.value = "synth_regdb"
    assert explorer.setting.value == "thermal_to_visible"
    assert [value for _, value in explorer.trial.options] == [1, 2]
    assert explorer.choice.variants == ("baseline",)  # type: ignore[union-attr]
    assert explorer.variants["b_cc"].disabled and explorer.variants["b_ml_cc"].disabled
    explorer.trial.value = 2
    assert not explorer.variants["b_ml_cc"].disabled


def test_what_goes_wrong_later_is_said_in_a_sentence_and_mended_by_another_choice(
    project: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(project, tmp_path / "copy")
    explorer = Explorer(STUDY, copy, dataset="synth_sysu", variants=["baseline"])
    path = copy / "runs/synth_sysu/b_cc-t1-s0/features.npz"
    path.write_bytes(b"PK\x03\x04 broken")
    explorer.variants["b_cc"].value = True
    assert "features.npz is damaged" in explorer.status.value
    explorer.variants["b_cc"].value = False
    assert "the only one kept" in explorer.status.value


@pytest.mark.parametrize("dataset", ["synth_sysu", "sysu"])
def test_without_a_run_it_says_what_to_run(project: Path, tmp_path: Path, dataset: str) -> None:
    explorer = Explorer(STUDY, tmp_path if dataset == "synth_sysu" else project, dataset=dataset)
    assert f"{dataset} has no finished run" in explorer.app.value and "`make repro`" in explorer.app.value
    assert explorer.choice is None and explorer.figures() == {} and explorer.save(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_a_variant_that_has_not_run_is_named_with_those_that_have(project: Path) -> None:
    explorer = Explorer(STUDY, project, dataset="synth_sysu", variants=["b_ml"])
    assert "no finished run of b_ml; there is: baseline, b_cc, b_ml_cc" in explorer.app.value


# -------------------- the notebook


def test_the_notebook_makes_every_figure_from_top_to_bottom(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    executed = papermill.execute_notebook(
        ROOT / "notebooks/06_explore_distances.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"params": str(ROOT / "params.yaml"), "out": str(tmp_path / "out")},
        cwd=project,
        progress_bar=False,
    )
    stems = ("distances", "projection", "claim", "ranked_baseline", "ranked_b_ml_cc")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(stems)
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)


def test_the_notebook_also_runs_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_notebook("06_explore_distances.ipynb", tmp_path, STUDY, monkeypatch, dataset="synth_regdb") == []
    assert not list(tmp_path.iterdir())
