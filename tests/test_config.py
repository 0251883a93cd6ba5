"""params.yaml is read strictly, holds the paper's recipe, and resolves a row to exactly what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from danet_core.losses import check_terms
from danet_study.config import Study, load_study
from danet_study.files import StudyError
from tests.stores import PARAMS, ROOT

TEXT = PARAMS.read_text(encoding="utf-8")


@pytest.fixture
def edited(tmp_path: Path):
    """Write params.yaml with pieces of text replaced, and return its path."""

    def edit(*changes: tuple[str, str]) -> Path:
        text = TEXT
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "params.yaml"

    return edit


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(PARAMS)


def test_the_defaults_are_the_numbers_printed_in_the_paper(study):
    run = study.run("sysu-1", "b_ml_cc", 0)
    recipe, image = run.recipe, run.dataset.image
    assert (recipe.backbone, recipe.width, recipe.weights) == ("resnet50", 64, "imagenet")
    assert (recipe.lr, recipe.weight_decay, recipe.epochs) == (3.5e-4, 5e-4, 140)
    assert (recipe.milestones, recipe.decay, recipe.precision) == ([80, 120], 0.1, "float32")
    assert recipe.ids_per_batch * 2 * recipe.imgs_per_modality == 128
    assert (recipe.augment.flip, recipe.augment.erase, recipe.augment.pad_crop) == (0.5, 0.5, 0)
    assert (image.height, image.width, run.dataset.train_splits) == (384, 128, ["train", "val"])
    assert run.losses["L_cc"] == {"weight": 1.0, "margin": 0.7}
    assert run.losses["L_M"] == {"weight": 2.5} and run.losses["L_sid"] == {"weight": 1.0}
    assert (run.model.stem, run.model.teacher_ema, run.model.test_feature) == ("one", 0.0, "after_bn")
    assert (run.evaluation.trials, run.evaluation.metric, run.evaluation.galleries) == (10, "cosine", "rand_perm")


def test_each_variant_has_exactly_the_terms_of_the_rows_it_extends(study):
    terms = {name: set(study.run("synth_sysu-1", name, 0).losses) for name in study.variants}
    assert terms["baseline"] == {"L_id"}
    assert terms["b_cc"] == {"L_id", "L_cc"} and terms["b_ml"] == {"L_id", "L_sid", "L_M"}
    assert terms["b_ml_cc"] == terms["b_cc"] | terms["b_ml"]


def test_the_milestones_of_the_embedded_recipe_are_the_papers_shares_of_the_epochs(study):
    recipe = study.run("synth_sysu-1", "baseline", 0).recipe
    assert [round(epoch / recipe.epochs, 3) for epoch in recipe.milestones] == [round(80 / 140, 3), round(120 / 140, 3)]


def test_every_row_of_the_file_resolves_to_terms_that_exist(study):
    runs = [study.run(split, row, 0) for split in ("synth_regdb-1", "sysu-1", "regdb-10") for row in study.rows]
    for run in runs:
        check_terms(run.losses)
    assert len({run.name for run in runs}) == len(runs)


def test_runs_are_all_combinations_of_the_plan_in_order(study, edited):
    path = edited(("splits: [synth_sysu-1, synth_regdb-1]", "splits: [synth_sysu-1, synth_regdb-1, synth_regdb-2]"))
    names = [run.name for run in load_study(path).runs()]
    assert len(names) == len(set(names)) == 3 * len(study.plan.variants) * len(study.plan.seeds)
    assert names[0] == "synth_sysu-1-baseline-0" and names[-1] == "synth_regdb-2-b_ml_cc-0"
    assert [run.split for run in study.runs()][:2] == ["synth_sysu-1"] * 2


def test_a_row_says_only_what_differs(edited, study):
    row = "variants:   \n  deep: {label: d, extends: [b_cc, b_ml], losses: {L_cc: {margin: 0.3}}, "
    row += "recipe: {lr: 0.5, augment: {flip: 0.0}}, model: {pooling: gem}, evaluation: {metric: euclidean}}\n"
    text = TEXT[TEXT.index("variants:                ") :].splitlines()[0] + "\n"
    run = load_study(edited((text, row))).run("synth_sysu-1", "deep", 3)
    plain = study.run("synth_sysu-1", "b_ml_cc", 3)
    assert run.losses == {**plain.losses, "L_cc": {"weight": 1.0, "margin": 0.3}}
    changes = {"lr": 0.5, "augment": plain.recipe.augment.model_copy(update={"flip": 0.0})}
    assert run.recipe == plain.recipe.model_copy(update=changes)
    assert run.model == plain.model.model_copy(update={"pooling": "gem"})
    assert run.evaluation == plain.evaluation.model_copy(update={"metric": "euclidean"})
    assert (run.seed, run.label, run.variant) == (3, "d", "deep")


def test_values_of_the_data_set_override_the_defaults_and_the_row_overrides_both(edited):
    path = edited(('baseline: {label: "Baseline"}', 'baseline: {label: "Baseline", recipe: {lr: 0.25}}'))
    study = load_study(path)
    assert study.run("synth_sysu-1", "b_cc", 0).recipe.lr == 0.002
    assert study.run("sysu-1", "b_cc", 0).recipe.lr == 0.00035
    assert {study.run(split, "baseline", 0).recipe.lr for split in ("sysu-1", "synth_sysu-1")} == {0.25}


def test_the_row_that_trains_twice_as_long_decays_as_much_later(study):
    once, twice = (study.run("synth_sysu-1", name, 0).recipe for name in ("baseline", "baseline_2x"))
    assert twice.epochs == 2 * once.epochs
    assert twice.milestones == [2 * epoch for epoch in once.milestones]


def test_a_term_with_weight_zero_is_removed(study):
    assert "L_M" not in study.run("synth_sysu-1", "sid_alone", 0).losses


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("    lr: 0.00035", "    lerning_rate: 1\n    lr: 0.00035", "lerning_rate"),
        ("    lr: 0.00035\n", "", "lr"),
        ("    lr: 0.00035", "    lr: -1", "lr"),
        ("    lr: 0.00035", "    lr: fast", "lr"),
        ("    lr: 0.00035", "    lr: .nan", "lr"),
        ("    lr: 0.00035", "    lr: .inf", "lr"),
        ("    epochs: 140", "    epochs: 140.5", "epochs"),
        ("    epochs: 140", "    epochs: true", "epochs"),
        ("    epochs: 140", '    epochs: "140"', "epochs"),
        ("    epochs: 140", "    epochs: 0", "epochs"),
        ("milestones: [80, 120]", "milestones: 80", "milestones"),
        ("milestones: [80, 120]", "milestones: [0]", "milestones"),
        ("channels_last: true", "channels_last: 1", "channels_last"),
        ("precision: float32", "precision: half", "precision"),
        ("pooling: average", "pooling: mean", "pooling"),
        ("stem: one", "stem: three", "stem"),
        ("teacher_ema: 0.0", "teacher_ema: 1.0", "teacher_ema"),
        ("flip: 0.5", "flip: 1.5", "flip"),
        ("erase_area: [0.02, 0.33]", "erase_area: [0.02]", "erase_area"),
        ("pad_value: 0", "pad_value: 256", "pad_value"),
        ("split: test ", "split: training ", "split"),
        ("metric: cosine", "metric: manhattan", "metric"),
        ("galleries: rand_perm", "galleries: random", "galleries"),
        ("trials: 10", "trials: 0", "trials"),
        ("trials: 10", "trials: 10\n    trials: 5", "trials"),  # a key twice
        ("margin: 0.7}}                 ", "margin: 0.7, weight: 2}}", "weight"),
        ("weight: 2.5", "weight: -1", "weight"),
        ("weight: 2.5", "weight: .nan", "weight"),
        ("weight: 2.5", "weigth: 2.5", "weight"),
        ("variants: [baseline,", "variants: [basline,", "baseline"),  # suggests the near miss
        ("extends: [b_cc, b_ml]", "extends: [b_cc, b_mll]", "b_ml"),
        ('baseline: {label: "Baseline"}', 'baseline: {label: "Baseline", extends: [b_ml_cc, baseline]}', "baseline"),
        ("  b_cc:\n", "  b-cc:\n", "b-cc"),
        ("  b_cc:\n", "  ../b_cc:\n", "b_cc"),
        ("datasets: [synth_sysu, synth_regdb]", "datasets: [synth_regdb]", "datasets"),
        ("[synth_sysu-1, synth_regdb-1]", "[synth_sysu-1, synth_regdb-11]", "synth_regdb-11"),
        ("[synth_sysu-1, synth_regdb-1]", "[synth_sysu, synth_regdb-1]", "synth"),
        ("seeds: [0]", "seeds: [-1]", "seeds"),
        ("seeds: [0]", "seeds: [0, 0]", "seeds"),
        ("seeds: [0]", "seeds: []", "seeds"),
        ("variants: [baseline, b_cc,", "variants: [baseline, baseline, b_cc,", "variants"),
        ("height: 96, width: 48", "height: 96, width: 0", "width"),
        ("train_splits: [train]", "train_splits: []", "train_splits"),
        ("against: b_ml_cc", "against: b_ml_c", "b_ml_c"),
        ("confidence: 0.95", "confidence: 95", "confidence"),
        ("study:  ", "study: [", "YAML"),
    ],
)
def test_a_wrong_value_is_one_short_sentence_that_names_its_key(edited, old, new, key):
    with pytest.raises(StudyError) as caught:
        load_study(edited((old, new)))
    message = str(caught.value)
    assert key in message and "\n" not in message
    assert len(message.split()) <= 45


@pytest.mark.parametrize("text", ["", "[]", "3", "study: 3", "datasets: []", "datasets: {a: 3}", "\x00"])
def test_a_file_that_is_no_params_file_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(StudyError):
        load_study(tmp_path / "params.yaml")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(StudyError, match=r"params\.yaml"):
        load_study(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("split", "variant", "seed"),
    [("", "", -1), ("synth_sysu-1", "", 0), ("", "baseline", 0), ("synth_sysu-1", "baseline", -1)],
)
def test_the_empty_parameters_of_a_notebook_are_refused(study, split, variant, seed):
    with pytest.raises(StudyError):
        study.run(split, variant, seed)


@pytest.mark.parametrize(
    ("split", "variant", "suggestion"),
    [("synth_sisu-1", "baseline", "synth_sysu"), ("synth_sysu-1", "b_ml_c", "b_ml_cc"), ("synth_sysu_1", "b_cc", "-1")],
)
def test_a_near_miss_is_answered_with_the_name_that_was_meant(study, split, variant, suggestion):
    with pytest.raises(StudyError, match=suggestion):
        study.run(split, variant, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('label: "B + ML + CC"', 'label: "another"'),
        ("root: data/raw/synth_sysu", "root: elsewhere"),
        ('title: "synth_sysu (rendered', 'title: "another (rendered'),
        ("metric: cosine", "metric: euclidean"),
        ("split: test ", "split: val "),
        ("galleries: rand_perm", "galleries: random_seed"),
        ("train_ids: 200", "train_ids: 201"),  # reaches the run through the hash of its images
        ("resamples: 10000", "resamples: 1000"),
        ("weight: 1.0, margin: 0.7", "weight: 1.0, margin: 0.70"),
    ],
)
def test_labels_folders_and_scoring_are_no_part_of_what_weights_depend_on(edited, study, old, new):
    changed = load_study(edited((old, new)))
    assert [run.resolved() for run in changed.runs()] == [run.resolved() for run in study.runs()]


@pytest.mark.parametrize(
    ("old", "new", "reached"),
    [
        ("margin: 0.7", "margin: 0.8", {"b_cc", "b_ml_cc"}),
        ("weight: 2.5", "weight: 2.4", {"b_ml", "b_ml_cc"}),
        ("weight_decay: 0.0005", "weight_decay: 0.0006", {"baseline", "b_cc", "b_ml", "b_ml_cc"}),
        ("test_feature: after_bn", "test_feature: before_bn", {"baseline", "b_cc", "b_ml", "b_ml_cc"}),
        ("stem: two", "stem: one", set()),
    ],
)
def test_a_changed_number_reaches_exactly_the_runs_that_use_it(edited, study, old, new, reached):
    changed = {run.name: run for run in load_study(edited((old, new))).runs()}
    assert {run.variant for run in study.runs() if changed[run.name].resolved() != run.resolved()} == reached


def test_the_command_writes_one_file_per_run_and_refuses_an_unknown_loss(tmp_path, edited):
    for name in ("synth_sysu", "synth_regdb"):
        (tmp_path / f"data/packed/{name}").mkdir(parents=True)
        (tmp_path / f"data/packed/{name}/meta.json").write_text(json.dumps({"content_sha256": name}))
        (tmp_path / "data/weights").mkdir(exist_ok=True)
        (tmp_path / f"data/weights/{name}.safetensors").write_bytes(b"weights")
    path = edited(("L_cc: {weight: 1.0, margin: 0.7}", "L_cc: {weight: 1.0, margn: 0.7}"))
    command = [sys.executable, "-m", "danet_study.config"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "L_cc" in done.stderr and len(done.stderr.splitlines()) == 1
    path.write_text(TEXT, encoding="utf-8")
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    for run in load_study(path).runs():
        written = json.loads((tmp_path / f"build/configs/{run.name}.json").read_text())
        assert written["config"] == run.resolved()
