"""Figures show what records say, label it, fit onto their canvas, and have the same bytes each time."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from finished import run_notebook, training_record, write_finished
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from records import of, record, write_records
from stores import make_store

from danet_study import figures
from danet_study.analysis import KINDS, distance_distributions
from danet_study.config import load_study
from danet_study.files import StudyError
from danet_study.protocols import PROTOCOLS
from danet_study.store import PackedStore

ROOT = Path(__file__).resolve().parent.parent
STUDY = load_study(ROOT / "params.yaml")
VARIANTS = ("baseline", "b_cc", "b_ml", "b_ml_cc")
GAP = {"nearest": 0.75, "median": 0.125, "mean": 0.25, "n": 8}


def records_of(*variants, dataset="synth_sysu", seeds=(0, 1)):
    return [record(f"{dataset}-1-{variant}-{seed}") for variant in variants for seed in seeds]


def measured(seed=0):
    accuracy = {head: {"visible": 0.9, "infrared": 0.8 + 0.01 * seed} for head in ("C", "C_v", "C_r")}
    gradient = {term: {"mean": 0.5 + 0.1 * seed, "std": 0.1} for term in ("L_sid", "L_M")}
    return {"cosine": {"mean": 0.7, "std": 0.1}, "accuracy": accuracy, "gradient": gradient}


def distributions(*labels, bins=100):
    rng = np.random.default_rng(3)
    pids, modalities = np.repeat(np.arange(8), 8), np.tile(np.repeat([0, 1], 4), 8)
    feat = rng.normal(size=(8, 6))[pids] + 0.3 * rng.normal(size=(64, 6)) + np.outer(modalities, np.ones(6))
    return {label: distance_distributions(feat, pids, modalities, bins=bins) for label in labels}


def panels(figure):
    return figure.axes


def lines(axis, label):
    return [line for line in axis.get_lines() if line.get_label() == label]


def outside(figure):
    """Texts that are not wholly on the canvas, and titles and legends that overlap a panel."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in panels(figure):
        texts += [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
    with figures.style():
        figure.draw_without_rendering()
        renderer, canvas = FigureCanvasAgg(figure).get_renderer(), figure.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
        highest = max(axis.get_tightbbox(renderer).y1 for axis in panels(figure))
        below = [legend.get_window_extent(renderer).y1 for legend in figure.legends]
        lowest = min(axis.get_tightbbox(renderer).y0 for axis in panels(figure))
    found = [text for text, box in boxes if not (canvas.contains(*box.min) and canvas.contains(*box.max))]
    found += ["legend over a panel"] if below and below[0] > lowest + 1 else []
    title = next(box for text, box in boxes if text == figure.get_suptitle())
    return found + (["title over a panel"] if title.y0 < highest - 1 else [])


def every_figure(dataset, *variants):
    found, labels = records_of(*variants, dataset=dataset), [STUDY.rows[variant].label for variant in variants]
    title = figures.figure_title("Distances between test features (Figure 1)", found, STUDY)
    made = {
        "training": figures.training_curves([training_record(one["run"]) for one in found], STUDY),
        "cmc": figures.cmc_curves(found, STUDY),
        "distances": figures.distance_distributions(distributions(*labels), title, dict.fromkeys(labels, GAP)),
        "probe": figures.modality_probe(found, STUDY),
    }
    made["classifiers"] = figures.classifiers([one | {"classifiers": measured(one["seed"])} for one in found], STUDY)
    return made | ({"pairs": figures.camera_pairs(found, STUDY)} if "camera_pairs" in found[0] else {})


@pytest.mark.parametrize("dataset", ["synth_sysu", "regdb"])
@pytest.mark.parametrize("variants", [VARIANTS, VARIANTS[:1], VARIANTS[:3]], ids=len)
def test_texts_fit_and_titles_name_the_data_set_and_whether_it_is_synthetic(dataset, variants):
    for name, figure in every_figure(dataset, *variants).items():
        assert outside(figure) == [], name
        title = figure._suptitle.get_text()
        assert STUDY.datasets[dataset].title in title
        assert (figures.SYNTHETIC in title) == dataset.startswith("synth"), name


def test_training_panels_are_the_terms_of_the_records():
    runs = [training_record(one["run"]) for one in records_of("baseline", "b_cc")]
    for run in runs[2:]:
        run["config"]["losses"]["my_module.my_loss"] = {"weight": 1.0}
        for row in run["history"]:
            row["my_module.my_loss"] = 1.0
    figure = figures.training_curves(runs, STUDY)
    assert [axis.get_title() for axis in panels(figure)][1:-1] == ["L_id", "L_cc", "my_module.my_loss"]
    _, identity, center, *_ = panels(figure)
    assert len(lines(identity, "Baseline")) == len(lines(identity, "B + CC")) == 2
    assert not lines(center, "Baseline") and len(lines(center, "B + CC")) == 2
    drawn = lines(identity, "Baseline")[0].get_ydata()
    np.testing.assert_allclose(drawn, [epoch["L_id"] for epoch in runs[0]["history"]])


def test_cmc_has_a_panel_per_setting_means_over_runs_and_their_range():
    runs = records_of("b_cc", seeds=(0, 1, 2))
    figure = figures.cmc_curves(runs, STUDY)
    titles = [axis.get_title().partition("\n")[0] for axis in panels(figure)]
    assert titles == list(PROTOCOLS["sysu_mm01"].settings.values())
    indoor = panels(figure)[2]
    stored = 100 * np.array([run["settings"]["indoor_single"]["cmc"] for run in runs])
    np.testing.assert_allclose(lines(indoor, "B + CC")[0].get_ydata(), stored.mean(0))
    band = indoor.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((stored.min(), stored.max()))


def test_rank_1_has_the_range_over_galleries():
    run = record("synth_sysu-1-b_cc-0")
    run["settings"]["all_single"]["per_trial"]["cmc1"] = [0.2, 0.5, 0.3]
    _, bar = panels(figures.cmc_curves([run], STUDY))[0].collections
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [20, 50])


def test_a_deviation_from_the_published_protocol_is_in_the_title():
    run = record("synth_sysu-1-b_cc-0", partial=True)
    run["settings"] = {
        name: one | {"galleries": "random_seed"} for name, one in run["settings"].items() if "single" in name
    }
    figure = figures.cmc_curves([run], STUDY)
    assert len(panels(figure)) == 2
    assert "random_seed" in figure._suptitle.get_text() and "part of the data set" in figure._suptitle.get_text()


def test_camera_pairs_are_means_on_one_scale_and_the_ignored_pair_is_framed():
    runs = records_of("baseline", "b_cc")
    for number, run in enumerate(runs):
        run["camera_pairs"] = [pair | {"mAP": 0.1 * (1 + number)} for pair in run["camera_pairs"]]
    shown = [axis for axis in panels(figures.camera_pairs(runs, STUDY)) if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["Baseline", "B + CC"]
    assert len({axis.collections[0].get_clim() for axis in shown}) == 1
    np.testing.assert_allclose(shown[0].collections[0].get_array()[1], 15)  # camera 6: mean of 10 and 20 %
    assert [patch.get_xy() for patch in shown[0].patches] == [(1.04, 0.04)]  # row of camera 3, column of camera 2


def test_the_probe_shows_means_before_and_after_and_fills_the_feature_in_use():
    runs = records_of("baseline", "b_cc")
    for run in runs[2:]:
        run["config"]["model"]["test_feature"] = "before_bn"
        run["probe"] = {"pretrained": 0.95, "before_bn": 0.7, "after_bn": 0.6 + 0.1 * run["seed"]}
    (axis,) = panels(figures.modality_probe(runs, STUDY))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Baseline", "B + CC"]
    second = [line for line in axis.get_lines() if line.get_marker() in "Dso" and line.get_ydata()[0] == 1]
    assert {line.get_marker(): round(line.get_xdata()[0]) for line in second} == {"D": 95, "s": 70, "o": 65}
    assert [line.get_marker() for line in second if line.get_markerfacecolor() != "white"] == ["s"]


def test_classifiers_have_a_mark_per_measured_run_and_panel():
    runs = records_of("b_ml", "b_ml_cc", seeds=(0, 1))
    assert figures.classifiers(runs, STUDY) is None  # old records
    runs = [run | {"classifiers": measured(run["seed"])} for run in runs[:3]] + runs[3:]
    cosine, accuracy, gradient = panels(figures.classifiers(runs, STUDY))
    assert [len(axis.get_lines()) for axis in (cosine, accuracy, gradient)] == [3, 3, 3]
    names = [label.get_text() for label in accuracy.get_yticklabels()]
    drawn = dict(zip(names, accuracy.get_lines()[1].get_xdata(), strict=True))
    assert drawn["C_v, visible"] == pytest.approx(90) and drawn["C_v, infrared"] == pytest.approx(81)
    assert list(gradient.get_lines()[1].get_xdata()) == [0.6, 0.6]


def test_distances_have_four_curves_per_variant_common_limits_and_gap_shares():
    found = distributions("Baseline", "B + CC")
    figure = figures.distance_distributions(found, "title", dict.fromkeys(found, GAP))
    assert len({(axis.get_xlim(), axis.get_ylim()) for axis in panels(figure)}) == 1
    for axis, one in zip(panels(figure), found.values(), strict=True):
        assert "75 / 12 / 25 %" in axis.get_title()
        for kind, words in KINDS.items():
            np.testing.assert_allclose(lines(axis, words)[0].get_ydata(), one.kinds[kind].density)
    with pytest.raises(AssertionError):
        figures.distance_distributions(distributions("a") | distributions("b", bins=50), "title")


def test_nothing_to_draw_is_a_study_error():
    for draw in (figures.training_curves, figures.cmc_curves, figures.modality_probe):
        with pytest.raises(StudyError):
            draw([], STUDY)
    with pytest.raises(StudyError):
        figures.camera_pairs(records_of("baseline", dataset="synth_regdb"), STUDY)
    with pytest.raises(StudyError):
        figures.image_grid([], "title")


def test_a_variant_has_one_color_in_every_figure_whatever_is_beside_it():
    def color(figure, panel):
        return lines(panels(figure)[panel], "B + CC")[0].get_color()

    alone, beside = records_of("b_cc"), records_of(*reversed(VARIANTS))
    training = figures.training_curves([training_record(one["run"]) for one in beside], STUDY)
    colors = {
        color(figures.cmc_curves(alone, STUDY), 0),
        color(figures.cmc_curves(beside, STUDY), 3),
        color(training, 1),
    }
    assert len(colors) == 1
    assert len({str(figures.variant_style(STUDY, variant)) for variant in STUDY.variants}) == len(STUDY.variants)


def test_colors_differ_for_red_green_blindness():
    # Machado et al. 2009, deuteranomaly and protanomaly of severity 1, linear RGB in and out.
    deficiencies = (
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    )
    colors = np.array([to_rgb(color) for color, _ in figures.PALETTE[: len(VARIANTS)]])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for matrix in deficiencies:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
        assert (np.linalg.norm(seen[:, None] - seen, axis=2) + 9 * np.eye(len(seen))).min() > 0.15


# -------------------- crops


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return PackedStore.open(make_store(tmp_path_factory.mktemp("figures") / "synth_sysu"))


def test_best_and_worst_queries_show_crops_marks_and_precision(store):
    ranked = {"rows": list(range(10)), "distances": [0.1 * k for k in range(10)], "right": [True] + 9 * [False]}
    entries = [{"row": 20 + k, "ap": 0.9 - k / 10, "n_right": 2, "ranked": ranked} for k in range(3)]
    rows = figures.best_and_worst({"best": entries, "worst": entries[::-1]}, store)
    assert len(rows) == 6 and "90.0 %" in rows[0][0] and rows[3][0].startswith("worst 1")
    query, *tiles = rows[0][1]
    np.testing.assert_array_equal(query.image, store.images[20].transpose(1, 2, 0))
    np.testing.assert_array_equal(tiles[3].image, store.images[3].transpose(1, 2, 0))
    assert [tile.mark for tile in tiles] == ["right"] + 9 * ["wrong"]
    figure = figures.image_grid(rows, "a title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("✓" in text for text in texts) == 6 and sum("✗" in text for text in texts) == 54
    assert outside(figure) == []


def test_a_grid_draws_each_crop_in_its_place_with_its_frame():
    red, green = (np.full((30, 20, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0)))
    grid = [("first", [figures.Tile(red), None, figures.Tile(green, "x", "right")]), ("", [figures.Tile(green)])]
    figure = figures.image_grid(grid, "a title far longer than three narrow crops are wide, to be seen in full")
    drawn, (frame,) = figure.axes[0].images, figure.axes[0].patches
    for one, image in zip(drawn, (red, green, green), strict=True):
        np.testing.assert_array_equal(one.get_array(), image)
    (first, third, below), top = (one.get_extent() for one in drawn), slice(2, 4)
    assert first[0] < frame.get_x() == third[0] and first[top] == third[top]
    assert below[0] == first[0] and below[3] > first[2]  # y grows downward
    assert outside(figure) == []


def test_a_long_ranked_list_continues_on_the_next_row():
    tile = figures.Tile(np.zeros((4, 2, 3), np.uint8))
    rows = figures.ranked_rows("query 1", tile, [tile] * 23)
    assert [len(row) for _, row in rows] == [11, 11, 4] and [row[0] is None for _, row in rows] == [False, True, True]


def test_a_contact_sheet_has_a_row_per_identity_and_gray_for_missing_images(store):
    figure = figures.contact_sheet(store, [1, 3], 4, STUDY.datasets["synth_sysu"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"identity 1", "identity 3", "visible\ncamera 1", "infrared\ncamera 6"} <= set(texts)
    assert figures.SYNTHETIC in figure._suptitle.get_text()
    gray = [(image.get_array() == 225).all() for image in figure.axes[0].images]
    assert len(gray) == 2 * 6 * 4 and sum(gray) == 2 * 6  # one of four is missing for each identity and camera
    assert figures.spread([5, 1, 9, 3, 1], 2) == [1, 5]


def test_unnormalize_undoes_normalize():
    import torch

    from danet_study.data import normalize

    augment = STUDY.run("synth_sysu-1", "baseline", 0).recipe.augment
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 4), np.uint8)
    found = figures.unnormalize(normalize(torch.from_numpy(images), augment).numpy(), augment.mean, augment.std)
    np.testing.assert_array_equal(found, images.transpose(0, 2, 3, 1))


# -------------------- files and notebooks


def test_notebook_01_runs_on_a_store(store, monkeypatch):
    monkeypatch.chdir(store.root.parent)
    (store.root.parent / "data").mkdir()
    (store.root.parent / "data/packed").symlink_to(store.root.parent)
    values = run_notebook("01_data", params=str(ROOT / "params.yaml"))
    assert len(values["people"]) == 6 and len(values["grid"]) == 2


def test_notebook_05_writes_every_figure(tmp_path, monkeypatch):
    names = ["synth_sysu-1-baseline-0", "synth_sysu-1-b_ml_cc-0"]
    write_finished(tmp_path, runs=names)
    write_records(tmp_path / "results", [of(config) for config in STUDY.runs() if config.name in names])
    ranked = {"rows": [0, 1], "distances": [0.1, 0.2], "right": [True, False]}
    entry = {"row": 5, "ap": 0.5, "n_right": 1, "ranked": ranked}
    (tmp_path / "runs" / names[1] / "rankings.json").write_text(json.dumps({"best": [entry], "worst": [entry]}))
    monkeypatch.chdir(tmp_path)
    run_notebook("05_figures", dataset="synth_sysu", params=str(ROOT / "params.yaml"))
    stems = ("training_curves", "cmc", "camera_pairs", "distances", "modality_probe", "ranked_lists")
    written = {path.name for path in (tmp_path / "results/synth_sysu/figures").iterdir()}
    assert written == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}


def test_png_and_pdf_have_no_date_and_the_users_settings_play_no_part(tmp_path):
    def bytes_of(name):
        return [
            path.read_bytes() for path in figures.save(figures.cmc_curves(records_of("b_cc"), STUDY), tmp_path / name)
        ]

    plain = bytes_of("a.b/plain")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "pink"}):
        assert bytes_of("loud") == plain
        assert matplotlib.rcParams["font.size"] == 20
    assert sorted(path.name for path in (tmp_path / "a.b").iterdir()) == ["plain.pdf", "plain.png"]
    with Image.open(tmp_path / "loud.png") as image:
        assert image.width > 800 and not image.text
    assert plain[1].startswith(b"%PDF") and b"Date" not in plain[1] and b"atplotlib" not in plain[1]


def test_another_process_makes_the_same_bytes(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(records_of(*VARIANTS, dataset="synth_regdb")))
    code = (
        "import json, sys\nfrom danet_study import config, figures\n"
        "study, records = config.load_study(sys.argv[1]), json.load(open(sys.argv[2]))\n"
        "figures.save(figures.modality_probe(records, study), sys.argv[3])\n"
    )
    command = [sys.executable, "-c", code, ROOT / "params.yaml", tmp_path / "records.json", tmp_path / "there"]
    subprocess.run(command, cwd=ROOT, check=True)
    figures.save(figures.modality_probe(records_of(*VARIANTS, dataset="synth_regdb"), STUDY), tmp_path / "here")
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"there{suffix}").read_bytes() == (tmp_path / f"here{suffix}").read_bytes()
