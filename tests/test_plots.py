"""The figures: what they draw, that they say synthetic, and that their bytes do not change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import seaborn
from fixtures import records
from fixtures.notebooks import run_notebook
from fixtures.records import study, write_records, write_runs
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from danet_core import crops, distances, plots, scores, style
from danet_core.distances import centre_claim, distance_distributions
from danet_core.explore import png
from danet_core.files import StudyError
from danet_core.store import PackedStore
from danet_core.style import StudyFigure
from tests.stores import make_store

ROOT = Path(__file__).resolve().parent.parent


SOMEWHERE: dict[str, Any] = {"title": "somewhere", "synthetic": True}


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_visible()]


def title(figure: Figure) -> str:
    assert figure._suptitle is not None  # type: ignore[attr-defined]
    return figure._suptitle.get_text()  # type: ignore[attr-defined]


def lines(axis: Axes, label: str) -> list[Any]:
    return [line for line in axis.get_lines() if line.get_label() == label]


def test_training_curves_draw_each_term_of_each_run_and_no_absent_term() -> None:
    runs = [records.training_record("synth_sysu", name, seed=seed) for name in ("baseline", "b_cc") for seed in (0, 1)]
    figure = plots.training_curves(runs, **SOMEWHERE)
    assert [axis.get_title() for axis in panels(figure)] == [
        plots.TERM_LABELS[t] for t in ("total", "L_id", "L_cc", "lr")
    ]
    identity, centre = panels(figure)[1:3]
    assert len(lines(identity, "Baseline")) == len(lines(identity, "B + CC")) == 2
    assert len(lines(centre, "Baseline")) == 0 and len(lines(centre, "B + CC")) == 2
    drawn = lines(identity, "Baseline")[0].get_ydata()
    np.testing.assert_allclose(drawn, [epoch["L_id"] for epoch in runs[0]["history"]])


def test_a_variant_with_twice_the_steps_is_drawn_to_its_own_end() -> None:
    figure = plots.training_curves(
        [records.training_record("synth_sysu", name) for name in ("baseline", "baseline_2x")], **SOMEWHERE
    )
    ends = {line.get_label(): line.get_xdata()[-1] for line in panels(figure)[0].get_lines()}
    assert ends == {"Baseline": 14, "Baseline, twice the steps": 28}


def test_cmc_curves_draw_the_mean_of_the_runs_in_common_limits() -> None:
    runs = [records.record("synth_sysu", "b_cc", seed=seed) for seed in (0, 1, 2)]
    figure = plots.cmc_curves(runs, scores.SETTINGS["sysu"])
    assert len(panels(figure)) == 4
    assert {(axis.get_xlim(), axis.get_ylim()) for axis in panels(figure)} == {((1.0, 20.0), (0.0, 100.0))}
    indoor = panels(figure)[2]
    stored = np.array([run["settings"]["indoor_single"]["cmc"][:20] for run in runs])
    np.testing.assert_allclose(lines(indoor, "B + CC")[0].get_ydata(), 100 * stored.mean(axis=0))
    (band,) = indoor.collections  # from the lowest gallery of the lowest run to the highest of the highest
    drawn = band.get_paths()[0].vertices[:, 1]  # type: ignore[index]
    ends = np.array([run["settings"]["indoor_single"]["cmc_range"] for run in runs])[:, :, :20]
    assert drawn.min() == pytest.approx(100 * ends.min()) and drawn.max() == pytest.approx(100 * ends.max())
    assert "range over galleries and runs" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_cmc_of_one_run_without_several_galleries_has_no_band() -> None:
    figure = plots.cmc_curves([records.record("synth_regdb", "b_cc")], scores.SETTINGS["regdb"])
    assert not any(axis.collections for axis in panels(figure))
    assert not [text for text in figure.legends[0].get_texts() if "range" in text.get_text()]


def test_cmc_of_random_seed_galleries_has_no_multi_shot_panel_and_says_what_it_is() -> None:
    run = records.record("synth_sysu", "b_cc")
    run["settings"] = {name: one for name, one in run["settings"].items() if name.endswith("_single")}
    for setting in run["settings"].values():
        setting["galleries"] = "random_seed"
    figure = plots.cmc_curves([run], scores.SETTINGS["sysu"])
    assert [axis.get_title().partition("\n")[0] for axis in panels(figure)] == [
        "all-search, single-shot",
        "indoor-search, single-shot",
    ]
    assert "not comparable with the published protocol: galleries by random.seed(trial)" in title(figure)


def test_cmc_of_re_ranked_scores_on_a_part_of_the_data_says_so_and_the_plain_protocol_says_nothing() -> None:
    plain, other = records.record("synth_regdb", "b_cc"), records.record("synth_regdb", "b_cc")
    other["partial"] = True
    for setting in other["settings"].values():
        setting["rerank"] = {"k1": 20, "k2": 6, "lambda_value": 0.3}
    drawn = [title(plots.cmc_curves([run], scores.SETTINGS["regdb"])) for run in (plain, other)]
    assert "published protocol" not in drawn[0]
    assert "published protocol: a part of the data set, re-ranked" in drawn[1]


def test_camera_pairs_show_the_mean_of_the_runs_on_one_scale_with_the_same_place_framed() -> None:
    runs = [records.record("synth_sysu", name, seed=seed) for name in ("baseline", "b_cc") for seed in (0, 1)]
    figure = plots.camera_pairs(runs)
    shown = [axis for axis in panels(figure) if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["Baseline", "B + CC"]
    assert len({axis.collections[0].get_clim() for axis in shown}) == 1
    first = {(p["query_camera"], p["gallery_camera"]): p["mAP"] for p in runs[0]["camera_pairs"]}
    second = {(p["query_camera"], p["gallery_camera"]): p["mAP"] for p in runs[1]["camera_pairs"]}
    expected = [[50 * (first[3, camera] + second[3, camera]) for camera in (1, 2, 4, 5)]]
    np.testing.assert_allclose(shown[0].collections[0].get_array()[:1], expected)
    assert shown[0].texts[1].get_text() == f"{expected[0][1]:.1f}"
    assert [patch.get_xy() for patch in shown[0].patches] == [(1.04, 0.04)]  # row of camera 3, column of camera 2


def test_a_camera_pair_without_a_match_is_a_dash() -> None:
    run = records.record("synth_sysu", "baseline")
    del run["camera_pairs"][2]
    dashes = [text for text in plots.camera_pairs([run]).axes[0].texts if text.get_text() == "–"]
    assert [text.get_position() for text in dashes] == [(2.5, 0.5)]


def test_modality_probe_marks_before_and_after_and_prints_the_number_of_the_feature_in_use() -> None:
    runs = [records.record("synth_sysu", name, seed=seed) for name in ("baseline", "b_cc") for seed in (0, 1)]
    (axis,) = panels(plots.modality_probe(runs))
    assert [text.get_text() for text in axis.get_yticklabels()] == ["Baseline", "B + CC"]
    marks = {(line.get_marker(), line.get_ydata()[0]): line.get_xdata()[0] for line in axis.get_lines()}
    means = {key: 50 * (runs[2]["probe"][key] + runs[3]["probe"][key]) for key in plots.PROBED}
    for key, (_, marker) in plots.PROBED.items():
        assert marks[marker, 1] == pytest.approx(means[key])
    assert axis.texts[1].get_text() == f"{means['after_bn']:.1f}"


def test_best_and_worst_queries_are_drawn_with_their_crops_and_marks(tmp_path: Path) -> None:
    store = PackedStore.open(make_store(tmp_path / "synth_sysu", "sysu"))
    queries = records.record("synth_sysu", "b_cc")["queries"]
    rows = crops.extreme_rows(queries, store)
    assert [heading.partition(":")[0] for heading, _, _ in rows] == [
        f"{end} {place}" for end in ("best", "worst") for place in (1, 2, 3)
    ]
    assert "average precision 1.0 %, 1 right" in rows[5][0]
    for (_, query, ranked), one in zip(rows, queries["best"] + queries["worst"], strict=True):
        np.testing.assert_array_equal(query.image, store.images[one["row"]].transpose(1, 2, 0))
        np.testing.assert_array_equal(ranked[3].image, store.images[one["ranked"]["rows"][3]].transpose(1, 2, 0))
        assert [image.mark for image in ranked] == ["right"] + 9 * ["wrong"]
    figure = crops.ranked_lists(rows, title="somewhere", synthetic=True)
    assert "somewhere\nsynthetic" in title(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("query") == 6 and texts.count("1 · 0.000 ✓") == 6 and texts.count("10 · 0.900 ✗") == 6
    assert len(figure.axes[0].images) == 66


def test_distance_figure_has_four_curves_per_variant_in_common_limits() -> None:
    found = {name: distance_distributions(**arrays(name)) for name in ("baseline", "b_cc")}
    shares = {name: centre_claim(**arrays(name))["share"] for name in found}
    figure = plots.distance_distributions(found, title="somewhere", synthetic=True, shares=shares)
    assert len({(axis.get_xlim(), axis.get_ylim()) for axis in panels(figure)}) == 1
    for axis, (name, one) in zip(panels(figure), found.items(), strict=True):
        for kind, words in plots.KINDS.items():
            (line,) = lines(axis, words)
            np.testing.assert_allclose(line.get_ydata(), one.kinds[kind].density(one.edges))
        assert f"holds for {100 * shares[name]:.1f} % of identities" in axis.texts[0].get_text()


def arrays(variant: str) -> dict[str, np.ndarray]:
    made = records.features(variant, ids=12, images=4)
    return {"feat": made["feat_bn"], "pids": made["pids"], "modalities": made["modalities"]}


def test_distance_figure_refuses_different_bins() -> None:
    found = {str(bins): distance_distributions(**arrays("baseline"), bins=bins) for bins in (50, 60)}
    with pytest.raises(StudyError, match="different bins"):
        plots.distance_distributions(found, title="somewhere", synthetic=False)


@pytest.mark.parametrize("dataset", ["synth_regdb", "regdb"])
def test_every_figure_says_whether_it_is_synthetic(dataset: str) -> None:
    synthetic = dataset == "synth_regdb"
    about: dict[str, Any] = {"title": records.TITLES[dataset], "synthetic": synthetic}
    figures = [
        plots.training_curves([records.training_record(dataset, "baseline")], **about),
        plots.cmc_curves([records.record(dataset, "baseline")], scores.SETTINGS["regdb"]),
        plots.distance_distributions({"B": distance_distributions(**arrays("baseline"))}, **about),
        plots.modality_probe([records.record(dataset, "baseline")]),
        plots.camera_pairs([records.record(dataset.replace("regdb", "sysu"), "baseline")]),
    ]
    assert [("synthetic" in title(figure)) for figure in figures] == [synthetic] * 5
    assert all(records.TITLES[dataset] in title(figure) for figure in figures[:4])


def test_nothing_to_draw_is_an_error_with_a_remedy() -> None:
    with pytest.raises(StudyError, match="no training record to draw.*dvc repro"):
        plots.training_curves([], **SOMEWHERE)
    with pytest.raises(StudyError, match="no evaluation record"):
        plots.cmc_curves([], scores.SETTINGS["sysu"])
    before = records.record("synth_regdb", "baseline")  # RegDB has no camera pairs
    with pytest.raises(StudyError, match="no score of camera pairs to draw"):
        plots.camera_pairs([before])
    with pytest.raises(StudyError, match="no modality probe to draw.*dvc repro"):
        plots.modality_probe([])
    with pytest.raises(StudyError, match="no ranked list to draw"):
        crops.ranked_lists([], **SOMEWHERE)


def test_a_variant_keeps_its_colour_whatever_is_drawn_beside_it() -> None:
    alone = style.variant_style("b_ml", ["b_ml"])
    assert alone == style.variant_style("b_ml", ["new", "baseline", "b_ml"])
    styles = [style.variant_style(name, ["new_a", "new_b"]) for name in (*style.VARIANT_STYLE, "new_a", "new_b")]
    assert len({colour for colour, _ in styles}) == len({str(dash) for _, dash in styles}) == len(styles)


def test_variant_colours_stay_apart_for_red_green_blindness() -> None:
    # Machado et al. 2009, deuteranomaly and protanomaly of severity 1, linear RGB in and out.
    deficiencies = (
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    )
    colours = np.array([to_rgb(colour) for colour, _ in style.VARIANT_STYLE.values()])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for matrix in deficiencies:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
        gaps = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 9 * np.eye(len(seen))
        assert gaps.min() > 0.15


def test_the_users_matplotlib_settings_neither_leak_in_nor_get_lost(tmp_path: Path) -> None:
    def drawn(name: str) -> bytes:
        figure = plots.training_curves([records.training_record("synth_sysu", "baseline")], **SOMEWHERE)
        return style.save(figure, tmp_path / name)[0].read_bytes()

    plain = drawn("plain")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "pink"}):
        assert drawn("loud") == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_png_and_pdf_are_written_whole_and_carry_no_date_or_version(tmp_path: Path) -> None:
    paths = style.save(
        plots.training_curves([records.training_record("synth_sysu", "baseline")], **SOMEWHERE), tmp_path / "a.b" / "c"
    )
    assert [path.name for path in paths] == ["c.png", "c.pdf"]
    assert sorted(path.name for path in (tmp_path / "a.b").iterdir()) == ["c.pdf", "c.png"]
    with Image.open(paths[0]) as image:
        assert image.width > 800 and not image.text  # type: ignore[attr-defined]
    pdf = paths[1].read_bytes()
    assert pdf.startswith(b"%PDF") and b"Date" not in pdf and b"atplotlib" not in pdf


def cmc_figure() -> Figure:
    runs = [records.record("synth_regdb", variant) for variant in records.VARIANT_ORDER]
    return plots.cmc_curves(runs, scores.SETTINGS["regdb"])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which another process with another hash seed has drawn `cmc_figure` and listed what it imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    code = (
        "import sys; from pathlib import Path; from danet_core import config, distances\n"
        "from danet_core import findings, plots, report, scores, style\n"
        f"config.load_study({str(ROOT / 'params.yaml')!r})\n"
        "from fixtures import records\n"
        "runs = [records.record('synth_regdb', variant) for variant in records.VARIANT_ORDER]\n"
        "style.save(plots.cmc_curves(runs, scores.SETTINGS['regdb']), 'figure')\n"
        "Path('modules').write_text(' '.join(sys.modules))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)
    return folder


def test_equal_figures_have_equal_bytes_in_another_process_with_another_hash_seed(
    elsewhere: Path, tmp_path: Path
) -> None:
    for path in style.save(cmc_figure(), tmp_path / "figure"):
        assert path.read_bytes() == (elsewhere / path.name).read_bytes()


def test_tables_and_figures_need_no_torch(elsewhere: Path) -> None:
    modules = (elsewhere / "modules").read_text(encoding="utf-8").split()
    assert "danet_core.findings" in modules and "torch" not in modules


def test_a_figure_shows_itself_in_a_notebook_without_pyplot() -> None:
    figure = plots.training_curves([records.training_record("synth_sysu", "baseline")], **SOMEWHERE)
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("dataset", ["synth_sysu", "synth_regdb"])
def test_the_figures_notebook_writes_every_figure(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = study(seeds=(0, 1))
    write_records(tmp_path, dataset, chosen)
    write_runs(tmp_path, dataset, chosen)
    make_store(tmp_path / "data" / "packed" / dataset, dataset.removeprefix("synth_"))
    run_notebook("05_figures.ipynb", tmp_path, chosen, monkeypatch, dataset=dataset)
    written = {path.name for path in (tmp_path / "results" / dataset / "figures").iterdir()}
    names = ["training_curves", "cmc", "distances", "modality_probe", "ranked_lists"]
    names += ["camera_pairs"] if dataset == "synth_sysu" else []
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}


def test_a_scored_variant_without_features_is_refused_and_not_left_out_of_the_figure(tmp_path: Path) -> None:
    write_records(tmp_path, "synth_sysu", study())
    write_runs(tmp_path, "synth_sysu", study())
    results = scores.load_results(study(), "synth_sysu", tmp_path)
    assert list(scores.load_features(results)) == ["baseline", "b_cc", "b_ml", "b_ml_cc"]
    (tmp_path / "runs/synth_sysu/b_cc-t1-s0/features.npz").unlink()
    with pytest.raises(StudyError, match=r"b_cc-t1-s0/features\.npz is missing"):
        scores.load_features(results)


def test_features_are_those_retrieval_uses(tmp_path: Path) -> None:
    chosen = study(variants=("baseline",))
    write_records(tmp_path, "synth_sysu", chosen)
    write_runs(tmp_path, "synth_sysu", chosen)
    results = scores.load_results(chosen, "synth_sysu", tmp_path)
    made = records.features("baseline")
    np.testing.assert_array_equal(scores.load_features(results)["baseline"]["feat"], made["feat_bn"])
    path = tmp_path / "runs" / "synth_sysu" / "baseline-t1-s0" / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["dataset"]["recipe"]["test_feature"] = "before_bn"
    path.write_text(json.dumps(record), encoding="utf-8")
    np.testing.assert_array_equal(scores.load_features(results)["baseline"]["feat"], made["feat"])
    path.with_name("features.npz").write_bytes(b"PK broken")
    with pytest.raises(StudyError, match="features.npz is damaged"):
        scores.load_features(results)


@pytest.fixture(scope="module")
def claims() -> dict[str, distances.IdentityClaims]:
    made = {name: records.features(name) for name in ("baseline", "b_cc")}
    return {name: distances.identity_claims(one["feat"], one["pids"], one["modalities"]) for name, one in made.items()}


def test_the_claim_of_one_identity_shows_its_neighbours_and_for_whom_it_holds(
    claims: dict[str, distances.IdentityClaims],
) -> None:
    figure = plots.identity_claim(claims, 7, **SOMEWHERE)
    assert "identity 7" in title(figure) and "synthetic" in title(figure)
    words = {
        (True, True): "both sides",
        (True, False): "visible side",
        (False, True): "infrared",
        (False, False): "not",
    }
    (axis,) = panels(figure)
    told = [text.get_text() for text in axis.texts]
    ticks, diamonds = (lines(axis, label) for label in ("another identity", "the nearest of them, with its number"))
    own = lines(axis, "the same identity, other modality")
    for number, (name, one) in enumerate(claims.items()):
        row = one.row(7)
        share = 100 * (one.holds_visible & one.holds_infrared).mean()
        *neighbours, title_of_rows = told[3 * number : 3 * number + 3]
        assert words[bool(one.holds_visible[row]), bool(one.holds_infrared[row])] in title_of_rows
        assert title_of_rows.startswith(f"{name}: ") and f"for {share:.1f} % of 40" in title_of_rows
        assert neighbours == [str(one.neighbour_visible[row]), str(one.neighbour_infrared[row])]
        gaps, sides = ticks[number].get_data()
        for side in (0, 1):
            np.testing.assert_allclose(
                np.sort(gaps[sides == 3 * number + 1 + side]), np.sort(one.between[side, row])[:-1]
            )
        assert list(diamonds[number].get_xdata()) == [one.nearest_visible[row], one.nearest_infrared[row]]
        assert list(own[number].get_xdata()) == [one.cross[row]] * 2
        assert max(gaps) < axis.get_xlim()[1] and one.cross[row] < axis.get_xlim()[1]
    with pytest.raises(StudyError, match="identity 99 is not among"):
        plots.identity_claim(claims, 99, **SOMEWHERE)


def test_the_projection_draws_every_image_once_by_modality_and_again_by_identity(
    claims: dict[str, distances.IdentityClaims],
) -> None:
    one = records.features("baseline")
    planes = {"baseline": distances.principal_plane(one["feat"]), "b_cc": distances.principal_plane(one["feat_bn"])}
    figure = plots.projection(planes, one["pids"], one["modalities"], **SOMEWHERE)
    assert "synthetic" in title(figure)
    for axis, plane in zip(panels(figure), planes.values(), strict=True):
        (infrared,) = lines(axis, "infrared")
        np.testing.assert_array_equal(infrared.get_xydata(), plane.points[one["modalities"] == 1])
        assert infrared.get_marker() != lines(axis, "visible")[0].get_marker()
        assert axis.get_xlim() == axis.get_ylim() == panels(figure)[0].get_xlim()
    figure = plots.projection(planes, one["pids"], one["modalities"], pid=7, claims=claims, **SOMEWHERE)
    (chosen,) = lines(panels(figure)[0], "identity 7, visible")
    visible = (one["pids"] == 7) & (one["modalities"] == 0)
    np.testing.assert_array_equal(chosen.get_xydata(), planes["baseline"].points[visible])
    row = claims["b_cc"].row(7)
    near = {int(claims["b_cc"].neighbour_visible[row]), int(claims["b_cc"].neighbour_infrared[row])}
    (others,) = lines(panels(figure)[1], "its nearest others, infrared")
    assert len(others.get_xydata()) == 8 * len(near)


def test_a_figure_that_was_drawn_onto_and_back_again_gives_the_same_picture(
    claims: dict[str, distances.IdentityClaims],
) -> None:
    made = {name: records.features(name) for name in ("baseline", "b_cc")}

    def drawn(feature: str, pid: int, onto: Sequence[StudyFigure | None] = (None, None, None)) -> list[StudyFigure]:
        labels = made["baseline"]["pids"], made["baseline"]["modalities"]
        pairs = {name: distance_distributions(one[feature], *labels, upper=2.0) for name, one in made.items()}
        planes = {name: distances.principal_plane(one[feature]) for name, one in made.items()}
        return [
            plots.distance_distributions(pairs, onto=onto[0], **SOMEWHERE),
            plots.identity_claim(claims, pid, onto=onto[1], **SOMEWHERE),
            plots.projection(planes, *labels, pid=pid, claims=claims, onto=onto[2], **SOMEWHERE),
        ]

    first = drawn("feat", 7)
    pictures = [png(figure) for figure in first]
    others = [png(figure) for figure in drawn("feat_bn", 8, first)]
    assert all(other != picture for other, picture in zip(others, pictures, strict=True))
    assert [png(figure) for figure in drawn("feat", 7, first)] == pictures


def test_the_style_stands_on_seaborns_white_grid_word_for_word() -> None:
    seaborns = seaborn.axes_style("whitegrid")
    assert {key: seaborns[key] for key in style._WHITE_GRID} == style._WHITE_GRID
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        changed = {key for key, value in seaborns.items() if matplotlib.rcParams[key] != value}
    assert changed - {"font.sans-serif", "image.cmap"} == set(style._WHITE_GRID)  # what no figure here looks up


@pytest.mark.parametrize("imported", ["danet_core.plots, danet_core.train", "danet_core.evaluate"])
def test_what_a_notebook_that_trains_or_scores_imports_leaves_seaborn_and_scipy_out(imported: str) -> None:
    code = f"import sys, pandas, danet_core.config, {imported}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"seaborn", "scipy", "torchvision", "IPython"} & set(done.stdout.split())
