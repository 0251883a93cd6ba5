"""What is shown of finished runs agrees with the study's functions; controls redraw what they change."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from finished import ROOT, run_notebook, write_finished

from danet_study import analysis, explore, figures
from danet_study.config import load_study
from danet_study.explore import Exploration, Explorer
from danet_study.files import StudyError
from danet_study.protocols import evaluate_regdb, score_settings

STUDY = load_study(ROOT / "params.yaml")
LABELS = {name: row.label for name, row in STUDY.rows.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def exploration(project):
    return Exploration(STUDY, project)


@pytest.fixture
def explorer(project):
    return Explorer(STUDY, project, split="synth_sysu-1", variants=["baseline", "b_ml_cc"])


def shown(explorer):
    return {name: panel.value for name, panel in explorer.panels.items()}


def changed(explorer, before):
    return {name for name, value in shown(explorer).items() if value != before[name]}


# -------------------- what is computed


def test_runs_are_found_by_name_in_the_order_of_trials_and_variants(project, exploration):
    assert exploration.runs == {
        ("synth_regdb-2", 0): ("baseline",),
        ("synth_regdb-10", 0): ("baseline", "b_ml_cc"),
        ("synth_regdb-10", 1): ("b_ml_cc",),
        ("synth_sysu-1", 0): ("baseline", "b_cc", "b_ml_cc"),
    }
    assert list(exploration.runs)[0][0] == "synth_regdb-2"


def test_what_a_choice_leaves_out_is_the_first_there_is(exploration):
    choice = exploration.choose(split="synth_regdb-10")
    assert (choice.seed, choice.variants, choice.setting) == (0, ("baseline", "b_ml_cc"), "thermal_to_visible")
    store = exploration.store("synth_regdb-10")
    assert store.pids[choice.query] == choice.pid == 2 and store.modalities[choice.query] == 1
    assert exploration.choose(split="synth_regdb-10", seed=1).variants == ("b_ml_cc",)


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ("nowhere-1", {}),
        ("synth_sysu-1", {"variants": ["b_c"]}),
        ("synth_sysu-1", {"variants": ["b_ml"]}),  # not run
        ("synth_sysu-1", {"seed": 7}),
        ("synth_sysu-1", {"setting": "thermal_to_visible"}),
        ("synth_sysu-1", {"pid": 3}),  # a training identity
        ("synth_sysu-1", {"metric": "manhattan"}),
        ("synth_sysu-1", {"feature": "feat"}),
        ("synth_sysu-1", {"top": 7}),
    ],
)
def test_an_unknown_name_is_refused(project, split, options):
    with pytest.raises(StudyError):
        Explorer(STUDY, project, split=split, **options)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("split", "setting"), [("synth_sysu-1", "indoor_multi"), ("synth_regdb-2", "visible_to_thermal")]
)
def test_the_mean_precision_of_all_galleries_is_the_protocols_map(exploration, metric, split, setting):
    query, gallery = exploration.sides(split, "baseline", 0, "after_bn", setting)
    ignore = exploration.protocol(split).ignore
    if "regdb" in split:
        scored = evaluate_regdb(query.feat, query.pids, gallery.feat, gallery.pids, metric=metric)
    else:
        everyone = {setting: np.arange(len(gallery))[None]}
        scored = score_settings(query, gallery, everyone, ignore, "identity", metric)[setting]
    found, n_ignored = [], ignore(query, gallery).sum(1)
    for row, pid, n in zip(query.rows.tolist(), query.pids.tolist(), n_ignored, strict=True):
        choice = exploration.choose(split=split, pid=pid, setting=setting, metric=metric)
        heading, asked, tiles = exploration.gallery(dataclasses.replace(choice, query=row, top=99), "baseline")
        right = np.array([tile.mark == "right" for tile in tiles if tile.mark != "ignored"])
        ranks = np.flatnonzero(right) + 1
        found.append((np.arange(1, len(ranks) + 1) / ranks).mean())
        assert sum(tile.mark == "ignored" for tile in tiles) == min(n, explore.IGNORED_SHOWN)
        assert f"AP {100 * found[-1]:.1f} %" in heading and asked.mark == "query"
    assert np.nanmean(found) == pytest.approx(scored.mean["mAP"])


def test_the_gallery_shows_the_crops_of_the_store(exploration):
    choice = dataclasses.replace(exploration.choose(split="synth_sysu-1"), top=4)
    _, query, tiles = exploration.gallery(choice, "b_cc")
    store = exploration.store("synth_sysu-1")
    np.testing.assert_array_equal(query.image, store.images[choice.query].transpose(1, 2, 0))
    assert [tile.mark for tile in tiles][4:] == ["ignored"] * explore.IGNORED_SHOWN  # the first query is of camera 3
    assert all("cam 2" in tile.caption for tile in tiles[4:]) and not any("cam 2" in tile.caption for tile in tiles[:4])


def test_the_table_has_the_distances_of_the_chosen_feature_over_common_bins(exploration):
    choice = exploration.choose(
        split="synth_sysu-1", variants=["baseline", "b_cc"], feature="before_bn", metric="euclidean"
    )
    row = exploration.table(choice).loc[LABELS["b_cc"]]
    images = exploration.images("synth_sysu-1", "b_cc", 0, "before_bn")
    arrays = images.feat, images.pids, images.modalities
    upper = max(2 * np.linalg.norm(exploration.images("synth_sysu-1", v, 0, "before_bn").feat, axis=1).max()
                for v in exploration.runs["synth_sysu-1", 0])  # fmt: skip
    expected = analysis.distance_distributions(*arrays, metric="euclidean", bins=50, upper=float(upper))
    assert row["mean distance", analysis.KINDS["same_cross"]] == pytest.approx(expected.kinds["same_cross"].mean)
    separation = expected.separation("same_cross", "different_cross")
    assert row["across modalities", "d′"] == pytest.approx(separation.d_prime)
    assert row["modality gap > nearest identity", "share of identities"] == analysis.modality_gap(*arrays)["nearest"]
    found = [view.distributions for view in exploration.views(choice).values()]
    np.testing.assert_array_equal(found[0].edges, found[1].edges)


@pytest.mark.parametrize("color", ["modality", "identity"])
def test_every_figure_is_available_without_controls_and_says_synthetic(exploration, color):
    made = exploration.figures(exploration.choose(split="synth_sysu-1", variants=["b_cc"], color=color))
    assert set(made) == {"distances", "plane", "gap", "ranked"}
    assert all(figures.SYNTHETIC in figure._suptitle.get_text() for figure in made.values())


def test_the_gap_figure_has_the_distances_of_the_identitys_centers(exploration):
    choice = exploration.choose(split="synth_sysu-1", variants=["b_cc"], pid=4)
    gaps = exploration.view("synth_sysu-1", "b_cc", 0, "after_bn", "cosine").gaps
    drawn = {line.get_label(): line.get_xdata() for line in exploration.gap_figure(choice).axes[0].get_lines()}
    row = gaps.pids.tolist().index(4)
    assert list(drawn["same identity, other modality"]) == [gaps.cross[row]] * 2
    np.testing.assert_array_equal(drawn["nearest of these"], gaps.nearest[:, row])
    assert len(drawn["another identity, same modality"]) == 2 * (len(gaps.pids) - 1)


def test_damaged_features_and_features_of_other_images_are_refused(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    path = copy / "runs/synth_sysu-1-b_cc-0/features.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StudyError):
        Exploration(STUDY, copy).images("synth_sysu-1", "b_cc", 0, "after_bn")
    record = copy / "runs/synth_sysu-1-baseline-0/record.json"
    sha = Exploration(STUDY, copy).store("synth_sysu-1").meta["content_sha256"]
    record.write_text(record.read_text().replace(sha, "0" * 64))
    with pytest.raises(StudyError):
        Exploration(STUDY, copy).choose(split="synth_sysu-1")


# -------------------- controls


def test_the_first_look_shows_every_panel(explorer):
    first = shown(explorer)
    assert all(bytes(first[name]).startswith(b"\x89PNG") for name in ("distances", "plane", "gap"))
    assert "overlap" in first["table"] and first["ranked"].count("<figure") == 2 * (1 + 10 + explore.IGNORED_SHOWN)
    ranked = explorer.figures()["ranked"].axes[0]
    assert len(ranked.images) == 2 * (1 + 10 + explore.IGNORED_SHOWN)
    assert sum(patch.get_linestyle() == "--" for patch in ranked.patches) == 2 * explore.IGNORED_SHOWN
    assert figures.SYNTHETIC in explorer.status.value


def test_a_control_redraws_what_it_changes_and_nothing_else(explorer):
    for control, value, expected in (
        ("metric", "euclidean", {"table", "distances", "plane", "ranked"}),
        ("feature", "before_bn", {"table", "distances", "plane", "gap", "ranked"}),
        ("color", "identity", {"plane"}),
        ("pid", 8, {"plane", "gap", "ranked"}),
        ("setting", "indoor_multi", {"ranked"}),
        ("top", 5, {"ranked"}),
        ("color", "modality", {"plane"}),
    ):
        before = shown(explorer)
        explorer.controls[control].value = value
        assert changed(explorer, before) == expected, control
        assert getattr(explorer.choice, control) == value
    queries = [row for _, row in explorer.controls["query"].options]
    before = shown(explorer)
    explorer.controls["query"].value = queries[1]
    assert changed(explorer, before) == {"ranked"} and explorer.choice.query == queries[1]


def test_what_was_shown_before_is_not_drawn_again(explorer, monkeypatch):
    before = shown(explorer)
    explorer.controls["metric"].value = "euclidean"
    monkeypatch.setattr(explorer.exploration, "distances_figure", None)
    explorer.controls["metric"].value = "cosine"
    assert shown(explorer) == before and explorer.choice.metric == "cosine"


def test_distributions_and_plane_are_of_a_sample_of_all_identities(project, monkeypatch):
    monkeypatch.setattr(explore, "SAMPLE", 40)
    small = Exploration(STUDY, project)
    (view,) = small.views(small.choose(split="synth_sysu-1", variants=["b_cc"])).values()
    assert len(view.plane.points) == 40 and sum(one.n for one in view.distributions.kinds.values()) == 40 * 39 / 2
    assert set(view.sample.pids) == set(view.images.pids) and len(view.gaps.pids) == len(set(view.images.pids))


def test_a_variant_is_added_and_all_removed_is_an_error_that_another_tick_mends(explorer):
    before = shown(explorer)
    explorer.ticks["b_cc"].value = True
    assert changed(explorer, before) == set(before)
    assert LABELS["b_cc"] in explorer.panels["table"].value
    for tick in explorer.ticks.values():
        tick.value = False
    assert "tick" in explorer.status.value
    explorer.ticks["b_cc"].value = True
    assert explorer.choice.variants == ("b_cc",) and figures.SYNTHETIC in explorer.status.value


def test_another_split_has_its_own_runs_and_settings(explorer):
    explorer.controls["split"].value = "synth_regdb-2"
    assert explorer.choice.setting == "thermal_to_visible" and explorer.choice.variants == ("baseline",)
    assert explorer.ticks["b_ml_cc"].disabled
    explorer.controls["split"].value = "synth_regdb-10"
    assert not explorer.ticks["b_ml_cc"].disabled
    assert [seed for _, seed in explorer.controls["seed"].options] == [0, 1]


def test_a_damaged_run_is_reported_when_chosen(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    (copy / "runs/synth_sysu-1-b_cc-0/features.npz").write_bytes(b"PK\x03\x04 broken")
    explorer = Explorer(STUDY, copy, split="synth_sysu-1", variants=["baseline"])
    explorer.ticks["b_cc"].value = True
    assert "damaged" in explorer.status.value
    explorer.ticks["b_cc"].value = False
    assert figures.SYNTHETIC in explorer.status.value


def test_without_a_run_the_explorer_says_what_to_do(project, tmp_path):
    for split, root in (("synth_sysu-1", tmp_path), ("regdb-3", project)):
        explorer = Explorer(STUDY, root, split=split)
        assert split in explorer.app.value and "make repro" in explorer.app.value
        assert explorer.choice is None and explorer.figures() == {} and explorer.save(tmp_path / "out") == []


def test_notebook_06_writes_every_figure(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    run_notebook("06_explore_distances", params=str(ROOT / "params.yaml"), out=str(tmp_path / "out"))
    stems = ("distances", "plane", "gap", "ranked")
    written = {path.name for path in Path(tmp_path / "out").iterdir()}
    assert written == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}
