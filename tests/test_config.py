"""params.yaml is read strictly, and holds the paper's recipe."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from fixtures.params import embedded

from danet_core.config import load_study
from danet_core.record import fingerprint
from danet_core.strict import ConfigError

PARAMS = Path(__file__).parent.parent / "params.yaml"


@pytest.fixture
def edited(tmp_path: Path):
    """Write params.yaml with one piece of text replaced, and return its path."""

    def edit(old: str, new: str) -> Path:
        path = embedded(tmp_path / "params.yaml")
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return path

    return edit


def test_the_paper_profile_holds_the_numbers_printed_in_the_paper():
    study = load_study(PARAMS)
    recipe = study.datasets["sysu"].recipe
    assert (recipe.backbone, recipe.width, recipe.weights) == ("resnet50", 64, "imagenet")
    assert (recipe.lr, recipe.weight_decay, recipe.epochs) == (3.5e-4, 5e-4, 140)
    assert (recipe.milestones, recipe.decay) == ((80, 120), 0.1)
    assert recipe.precision == "float32"
    assert recipe.ids_per_batch * 2 * recipe.imgs_per_modality == 128
    assert (recipe.augment.flip, recipe.augment.erase) == (0.5, 0.5)
    assert (study.datasets["sysu"].image.height, study.datasets["sysu"].image.width) == (384, 128)
    assert (study.modules.cc.lambda_1, study.modules.ml.lambda_2, study.modules.cc.margin) == (1.0, 2.5, 0.7)
    assert study.modules.cc.negatives == "anchor"


def test_each_variant_is_exactly_the_union_of_its_modules():
    study = load_study(PARAMS)
    rows = {name: (row.cc, row.ml) for name, row in study.variants.items()}
    assert rows["baseline"] == (None, None)
    assert rows["b_cc"] == (study.modules.cc, None)
    assert rows["b_ml"] == (None, study.modules.ml)
    assert rows["b_ml_cc"] == (study.modules.cc, study.modules.ml)


def test_lambda_2_stands_once_and_reaches_both_ml_variants(edited):
    study = load_study(edited("lambda_2: 2.5", "lambda_2: 4.0"))
    assert study.variants["b_ml"].ml.lambda_2 == study.variants["b_ml_cc"].ml.lambda_2 == 4.0
    assert len(re.findall(r"^ +lambda_2:", PARAMS.read_text(encoding="utf-8"), re.M)) == 1


def test_the_embedded_milestones_are_the_papers_shares_of_the_epochs():
    recipe = load_study(PARAMS).datasets["synth_sysu"].recipe
    assert [round(epoch / recipe.epochs, 3) for epoch in recipe.milestones] == [round(80 / 140, 3), round(120 / 140, 3)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lambda_2: 2.5", "lamda_2: 2.5", "modules.ml: unknown key 'lamda_2'"),
        ("    lr: 0.00035\n", "", "recipes.paper: key 'lr' is missing"),
        ("    lr: 0.00035", "    lr: -1", "recipes.paper.lr: expected a learning rate above 0, found -1"),
        ("    lr: 0.00035", "    lr: fast", "recipes.paper.lr: expected a number, found 'fast'"),
        ("    epochs: 140", "    epochs: 140.5", "recipes.paper.epochs: expected a whole number, found 140.5"),
        ("    epochs: 140", "    epochs: true", "recipes.paper.epochs: expected a whole number, found True"),
        ("    milestones: [80, 120]", "    milestones: [80, 140]", "milestones: expected ascending epochs below"),
        ("negatives: anchor", "negatives: nearest", "expected one of anchor, center, found 'nearest'"),
        ("equation: 3", "equation: 4", "modules.cc.equation: expected one of 1, 2, 3, found 4"),
        ("equation: 3", "equation: true", "modules.cc.equation: expected one of 1, 2, 3, found True"),
        ("features: before_bn", "features: raw", "expected one of before_bn, after_bn, normalised, found 'raw'"),
        ("center_gradient: true", "center_gradient: 1", "modules.cc.center_gradient: expected a bool, found 1"),
        ("gradient: both", "gradient: none", "modules.ml.gradient: expected one of both, own, foreign, found 'none'"),
        ("direction: foreign_own", "direction: both", "expected one of foreign_own, own_foreign, found 'both'"),
        (
            "foreign_average: 0.0",
            "foreign_average: 1.0",
            "expected a momentum from 0 (no average) to below 1, found 1.0",
        ),
        ("pooling: average", "pooling: mean", "recipes.paper.pooling: expected one of average, max, gem, found 'mean'"),
        ("gem_exponent: 3.0", "gem_exponent: 0.5", "expected an exponent of at least 1, the average, found 0.5"),
        ("pad_crop: 0", "pad_crop: -1", "augment.pad_crop: expected a whole number of pixels of at least 0, found -1"),
        ("metric: cosine", "metric: manhattan", "evaluation.metric: expected one of cosine, euclidean"),
        ("streams: one}", "streams: three}", "expected one of one, two, zero_padding, found 'three'"),
        (
            "variants: [baseline,",
            "variants: [one_stream, baseline,",
            "one_stream and baseline, which train the same model",
        ),
        ("precision: float32", "precision: half", "expected one of float32, tf32, bfloat16, float16, found 'half'"),
        ("channels_last: true", "channels_last: 1", "recipes.paper.channels_last: expected a bool, found 1"),
        ("    compile: false  ", "    compiled: false  ", "recipes.paper: unknown key 'compiled'"),
        ("  flip: 0.5", "  flip: 1.5", "augment.flip: expected a probability from 0 to 1, found 1.5"),
        ("sysu: [synth_sysu]", "sysu: [synth_sisu]", "unknown data set 'synth_sisu'"),
        ("sysu: [synth_sysu]", "sysu: [synth_regdb]", "study.sysu lists synth_regdb, whose layout is regdb"),
        ("variants: [baseline,", "variants: [basline,", "unknown variant 'basline'"),
        ("trials: [1]", "trials: [0]", "trial of data set synth_regdb: expected 1 to 10, found 0"),
        ("seeds: [0]", "seeds: [0, 0]", "study.seeds names a value twice"),
        ("seeds: [0]", "seeds: [-1]", "seed: expected a whole number of at least 0, found -1"),
        ("  trials: 10", "  trials: 10\n  trials: 5", "key `trials` stands twice"),
        ("allow_partial: false", "allow_partial: 1", "datasets.synth_sysu.allow_partial: expected a bool, found 1"),
        ("galleries: rand_perm", "galleries: random", "expected one of rand_perm, random_seed, found 'random'"),
        ("rerank: null", "rerank: {k1: 0, k2: 6, lambda_value: 0.3}", "evaluation.rerank.k1: expected at least 1"),
        ("rerank: null", "rerank: {k1: 20, k2: 0, lambda_value: 0.3}", "evaluation.rerank.k2: expected at least 1"),
        ("rerank: null", "rerank: {k1: 20, k2: 6, lambda_value: 2}", "expected a weight from 0 to 1, found 2.0"),
        ("rerank: null", "rerank: {k1: 20, k2: 6}", "evaluation.rerank: key 'lambda_value' is missing"),
        ("study:", "study: [", "is not valid YAML"),
        ("seeds: [0]", "seeds: []", "study.seeds: expected at least one for synth_sysu, synth_regdb, found none"),
        ("trials: [1]", "trials: []", "study.trials: expected at least one for synth_regdb, found none"),
        ("  b_cc: {", "  b cc: {", "variants has a row named 'b cc', expected a letter"),
        ("  b_cc: {", "  ../b_cc: {", "variants has a row named '../b_cc'"),
        ("  b_cc: {", "  b_cc;ls: {", "variants has a row named 'b_cc;ls'"),
        ("  b_cc: {", "  1: {", "variants has a row named 1,"),
        ("  synth_regdb:\n", "  synth.regdb:\n", "datasets has a row named 'synth.regdb'"),
        ('label: "B + CC"', 'label: "Baseline"', "variants.b_cc.label: expected a label of its own, found 'Baseline'"),
        ('label: "B + CC"', 'label: " "', "variants.b_cc.label: expected a label of its own, found ' ', empty"),
        ("root: data/raw/synth_regdb\n", "root: data/raw//synth_sysu\n", "where synth_sysu is rendered otherwise"),
        ("dataset: synth_sysu", "dataset: synth_regdb", "found synth_regdb with layout regdb"),
        ("dataset: synth_sysu", "dataset: sysu", "whose split val is not trained on, found sysu with train_splits"),
        ("  steps: 600\n  lr: 0.001\n  weight_decay: 0.0005", "  steps: 600\n  lr: 0.001\n  weight_decay: -1", "-1.0"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_file_key_and_value(edited, old, new, message):
    with pytest.raises(ConfigError) as caught:
        load_study(edited(old, new))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", ["010", "1_000", "1:30", "0b1"])
def test_a_number_that_dvc_would_read_as_another_one_is_refused(edited, seed):
    with pytest.raises(ConfigError, match=r"study\.seeds\[0\]: expected a whole number, found '"):
        load_study(edited("seeds: [0]", f"seeds: [{seed}]"))


@pytest.mark.parametrize(
    ("text", "value"), [("35e-5", 35e-5), ("3.5E-4", 3.5e-4), (".5", 0.5), ("1.", 1.0), ("+0.25", 0.25), ("2", 2.0)]
)
def test_a_number_is_read_as_dvc_reads_it(edited, text, value):
    from ruamel.yaml import YAML

    path = edited("    lr: 0.00035", f"    lr: {text}")
    assert load_study(path).recipes["paper"].lr == value
    assert YAML(typ="safe").load(path.read_text(encoding="utf-8"))["recipes"]["paper"]["lr"] == value


def test_a_missing_file_says_where_to_look(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml is missing; run from the project's root"):
        load_study(tmp_path / "params.yaml")


def test_dvc_reads_the_same_values_as_the_study():
    from ruamel.yaml import YAML

    theirs = YAML(typ="safe").load(PARAMS.read_text(encoding="utf-8"))
    assert theirs == yaml.safe_load(PARAMS.read_text(encoding="utf-8"))


def test_an_environment_variable_moves_the_real_data_but_never_the_rendered(monkeypatch, tmp_path):
    monkeypatch.setenv("SYSU_MM01_ROOT", str(tmp_path))
    study = load_study(PARAMS)
    assert study.datasets["sysu"].raw_root() == tmp_path
    assert study.datasets["synth_sysu"].raw_root() == Path("data/raw/synth_sysu")


def test_a_control_with_twice_the_epochs_decays_at_twice_the_milestones():
    study = load_study(PARAMS)
    once, twice = (study.run("synth_sysu", name, 1, 0) for name in ("baseline", "baseline_2x"))
    assert twice.epochs == 2 * once.epochs
    assert twice.milestones == tuple(2 * epoch for epoch in once.milestones)


def test_the_default_is_the_published_protocol_of_the_whole_data_sets():
    study = load_study(PARAMS)
    assert (study.evaluation.galleries, study.evaluation.rerank) == ("rand_perm", None)
    assert not any(row.allow_partial for row in study.datasets.values())


def test_the_default_of_every_open_choice_is_the_printed_reading():
    study = load_study(PARAMS)
    cc, ml, recipe = study.modules.cc, study.modules.ml, study.datasets["sysu"].recipe
    assert (cc.equation, cc.negatives, cc.features, cc.center_gradient) == (3, "anchor", "before_bn", True)
    assert (ml.gradient, ml.direction, ml.foreign_average, ml.lambda_sid) == ("both", "foreign_own", 0.0, 1.0)
    assert (recipe.pooling, recipe.test_feature, recipe.augment.pad_crop) == ("average", "after_bn", 0)
    assert study.evaluation.metric == "cosine"


def test_lambda_2_may_be_zero_and_is_then_taught_by_no_averaged_classifier(edited):
    assert load_study(edited("lambda_2: 2.5", "lambda_2: 0")).modules.ml.lambda_2 == 0
    path = edited("lambda_2: 2.5", "lambda_2: 0")
    text = path.read_text(encoding="utf-8").replace("foreign_average: 0.0", "foreign_average: 0.9")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"modules\.ml\.foreign_average: expected 0 where lambda_2 is 0"):
        load_study(path)


def test_an_averaged_classifier_is_fixed_so_that_gradient_through_it_alone_is_refused(edited):
    path = edited("gradient: both", "gradient: foreign")
    assert load_study(path).modules.ml.gradient == "foreign"
    text = path.read_text(encoding="utf-8").replace("foreign_average: 0.0", "foreign_average: 0.9")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"modules\.ml\.gradient: expected both or own: an averaged foreign"):
        load_study(path)


def test_re_ranking_starts_from_the_cosine_distance_alone(edited):
    path = edited("metric: cosine", "metric: euclidean")
    assert load_study(path).evaluation.metric == "euclidean"
    text = path.read_text(encoding="utf-8").replace("rerank: null", "rerank: {k1: 20, k2: 6, lambda_value: 0.3}")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"evaluation\.metric: expected cosine, which re-ranking starts from"):
        load_study(path)


def test_table_1s_base_methods_are_the_baseline_with_another_way_in_and_are_not_listed():
    study = load_study(PARAMS)
    baseline = study.variants["baseline"]
    for name, streams in (("one_stream", "one"), ("two_stream", "two"), ("zero_padding", "zero_padding")):
        row = study.variants[name]
        assert dataclasses.replace(row, label=baseline.label, streams="one") == baseline
        assert row.streams == streams
        assert name not in study.study.variants


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("equation: 3", "equation: 2"),
        ("features: before_bn", "features: normalised"),
        ("center_gradient: true", "center_gradient: false"),
        ("gradient: both", "gradient: own"),
        ("direction: foreign_own", "direction: own_foreign"),
        ("foreign_average: 0.0", "foreign_average: 0.9"),
        ("pad_crop: 0", "pad_crop: 10"),
        ("    pooling: average\n", "    pooling: gem\n"),
        ("    gem_exponent: 3.0\n", "    gem_exponent: 4.0\n"),
        ("cc: *cc, ml: *ml, epochs_factor: 1, streams: one", "cc: *cc, ml: *ml, epochs_factor: 1, streams: two"),
    ],
)
def test_every_choice_of_training_is_part_of_what_a_run_depends_on(edited, old, new):
    plain, changed = (load_study(path).run("synth_sysu", "b_ml_cc", 1, 0) for path in (PARAMS, edited(old, new)))
    assert changed.resolved() != plain.resolved()
    assert fingerprint(changed, "data", "weights") != fingerprint(plain, "data", "weights")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("allow_partial: false", "allow_partial: true"),
        ("metric: cosine", "metric: euclidean"),
        ("galleries: rand_perm", "galleries: random_seed"),
        ("rerank: null", "rerank: {k1: 20, k2: 6, lambda_value: 0.3}"),
    ],
)
def test_how_a_run_is_scored_and_whether_the_set_is_partial_leave_its_training_as_it_is(edited, old, new):
    plain, changed = (load_study(path).run("synth_sysu", "b_cc", 1, 0) for path in (PARAMS, edited(old, new)))
    assert changed != plain
    assert changed.resolved() == plain.resolved()


def test_captions_and_folders_are_no_part_of_what_a_run_depends_on(edited):
    plain = load_study(PARAMS).run("synth_sysu", "b_cc", 1, 0).resolved()
    moved = (
        load_study(edited("root: data/raw/synth_sysu", "root: elsewhere")).run("synth_sysu", "b_cc", 1, 0).resolved()
    )
    assert plain == moved


def test_two_rows_may_share_one_rendering_at_two_image_sizes(edited):
    text = PARAMS.read_text(encoding="utf-8")
    row = text[text.index("  synth_regdb:\n") : text.index("  synth_sysu_paper_scale:")]
    small = row.replace("synth_regdb:", "synth_regdb_small:").replace("height: 96, width: 48", "height: 64, width: 32")
    study = load_study(edited(row, row + small))
    assert study.dataset("synth_regdb_small").render == study.dataset("synth_regdb").render
