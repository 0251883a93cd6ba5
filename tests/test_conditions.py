"""The files of studies/ and the tables of the ablation under several conditions, from made-up records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from records import of, write_records
from ruamel.yaml import YAML

from danet_study.conditions import write_conditions
from danet_study.config import load_study
from danet_study.files import StudyError
from tests.stores import PARAMS, ROOT
from tools.variation import only_scored, override, sensitivity

STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))
CELLS = {"baseline": 0.20, "b_cc": 0.25, "b_ml": 0.21, "b_ml_cc": 0.24}


def params(folder: Path, name: str) -> Path:
    """params.yaml with the overrides of a study, and a small bootstrap."""
    path = Path(shutil.copy(PARAMS, folder / "params.yaml"))
    override(path, {**YAML(typ="safe").load(ROOT / f"studies/{name}.yaml"), "bootstrap": {"resamples": 100}})
    return path


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_file_is_a_study(tmp_path, name):
    runs = load_study(params(tmp_path, name)).runs()
    assert len({run.name for run in runs}) == len(runs) >= 4


def test_the_gap_study_differs_from_synth_sysu_in_its_rendering_only(tmp_path):
    study, plain = load_study(params(tmp_path, "gaps")), load_study(PARAMS)
    rendered = {name: study.dataset(name).render for name in study.plan.datasets}
    assert sorted(one["near_infrared_follows"] for one in rendered.values()) == [0.0, 0.3, 0.6, 0.6, 0.9]
    assert len({study.dataset(name).root for name in rendered}) == len({one["seed"] for one in rendered.values()}) + 3
    for name in rendered:
        keys = {"near_infrared_follows", "seed"}
        first, second = (
            {key: value for key, value in one.items() if key not in keys}
            for one in (rendered[name], plain.dataset("synth_sysu").render)
        )
        assert first == second
        a, b = study.run(f"{name}-1", "b_ml_cc", 1), plain.run("synth_sysu-1", "b_ml_cc", 1)
        assert a.resolved() | {"dataset": 0} == b.resolved() | {"dataset": 0}
    known = [run for run in study.runs() if run.dataset.name == "synth_sysu"]
    assert [run.resolved() for run in known] == [plain.run(r.split, r.variant, r.seed).resolved() for r in known]


def test_the_learning_rate_study_changes_nothing_else_and_scores_validation_identities(tmp_path):
    study, plain = load_study(params(tmp_path, "learning_rate")), load_study(PARAMS)
    found = set()
    for run in study.runs():
        base = plain.run("synth_sysu-1", run.variant, run.seed)
        assert run.recipe.model_copy(update={"lr": base.recipe.lr}) == base.recipe and run.losses == base.losses
        assert run.dataset.render == base.dataset.render
        assert (run.evaluation.split, run.evaluation.galleries) == ("val", "random_seed")
        found.add((run.variant, run.recipe.lr, run.seed))
        assert (run.recipe.lr == base.recipe.lr) == (run.name == base.name)  # taken from the cache
    assert len(found) == 4 * 4 * 3


@pytest.mark.parametrize("name", ["gaps", "learning_rate"])
def test_a_contrast_of_a_condition_is_the_difference_of_its_own_means(tmp_path, name):
    path = params(tmp_path, name)
    study = load_study(path)
    runs = study.runs()
    level = {name: 0.01 * k for k, name in enumerate(study.plan.datasets)}

    def mean(run):  # CC gains 5 points, more where the level is higher
        value = CELLS[run.variant] + level[run.dataset.name] * (1 + ("L_cc" in run.losses))
        return round(value + 0.002 * run.seed, 6)

    missing = runs[-1].name  # b_ml_cc of the last condition
    made = [of(run, cmc1=mean(run), split=run.evaluation.split) for run in runs if run.name != missing]
    folder = tmp_path / name
    write_records(folder, made)
    paths = write_conditions(path, folder)
    table = pd.read_csv(folder / "differences.csv").query("metric == 'Rank-1'")
    cc = table[table["contrast"] == "CC given Baseline"].set_index("condition")["difference"]
    assert cc.to_numpy()[: len(level)] == pytest.approx([5 + 100 * one for one in level.values()])
    assert set(table["n"]) == {2, 3}
    text = (folder / "table.md").read_text()
    assert "Synthetic" in text and ("validation" in text) == (name == "learning_rate")
    assert [row.split("|")[-2].strip() for row in text.splitlines() if "B + ML + CC" in row].count("2") >= 1
    first = [one.read_bytes() for one in paths]
    assert [one.read_bytes() for one in write_conditions(path, folder)] == first


def test_own_best_rate_takes_each_variant_where_its_map_is_highest(tmp_path):
    path = params(tmp_path, "learning_rate")
    study, best = load_study(path), {"baseline": 0.0005, "b_cc": 0.004, "b_ml": 0.001, "b_ml_cc": 0.002}

    def scores(run):
        top = run.recipe.lr == best[run.variant]
        return {"cmc1": CELLS[run.variant] + 0.001 * run.seed, "mAP": 0.4 if top else 0.3}

    write_records(tmp_path, [of(run, split="val", **scores(run)) for run in study.runs()])
    write_conditions(path, tmp_path)
    table = pd.read_csv(tmp_path / "differences.csv").query("condition == 'own best lr'")
    found = table.set_index(["contrast", "metric"])["difference"]
    assert found["CC given Baseline", "Rank-1"] == pytest.approx(5)
    assert found["CC given Baseline", "mAP"] == pytest.approx(0)


def test_rows_that_only_change_the_test_are_scored_and_not_trained():
    study = load_study(PARAMS)
    pairs = only_scored(study)
    assert {config.variant for config, _ in pairs} == {"test_before_bn", "metric_euclidean"}
    assert {trained.variant for _, trained in pairs} == {"b_ml_cc"}
    assert all(config.seed == trained.seed for config, trained in pairs)
    assert len(pairs) == 2 * len(study.sensitivity.seeds)
    trained = sensitivity()["study"]["variants"]
    assert set(trained) == set(study.sensitivity.run) - {"test_before_bn", "metric_euclidean"}
    assert {"two_stream", "zero_padding"} <= study.sensitivity.rows.keys()


def test_like_an_unknown_neighbor_is_refused(tmp_path):
    path = Path(shutil.copy(PARAMS, tmp_path / "params.yaml"))
    with pytest.raises(StudyError):
        override(path, {"datasets": {"mine": {"like": "synth_sisu", "root": "data/raw/mine"}}})
    assert path.read_bytes() == PARAMS.read_bytes()
