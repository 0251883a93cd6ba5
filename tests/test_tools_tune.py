"""The tuning: the Baseline alone, on validation identities, and a table that is whole or not there."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from danet_core.config import load_study
from danet_core.files import StudyError
from tests.stores import PARAMS
from tools import precision, tune


def test_the_grid_is_the_baseline_at_every_point_with_every_seed():
    study = load_study(PARAMS)
    runs = tune.candidates(study)
    assert {run.variant_name for run in runs} == {"baseline"}
    found = [(run.dataset.recipe.lr, run.dataset.recipe.steps_per_epoch, run.seed) for run in runs]
    grid = study.tuning.grid
    assert found == [(lr, steps, seed) for lr in grid.lr for steps in grid.steps_per_epoch for seed in (0, 1)]


def test_the_table_is_written_when_all_rows_are_there_and_never_before(tmp_path, monkeypatch, capsys):
    shutil.copyfile(PARAMS, tmp_path / "params.yaml")
    monkeypatch.setattr(tune, "score", lambda config: {"mAP": config.seed / 4})
    assert tune.main(root=tmp_path) == 0
    table = tmp_path / "results/tuning/synth_sysu.csv"
    assert pd.read_csv(table).mAP.tolist() == [0, 0.25] * len(load_study(PARAMS).tuning.grid.lr)
    before = table.read_bytes()

    def diverging(config):
        if config.dataset.recipe.lr > 0.001:
            raise StudyError("the loss is NaN; lower lr")
        return {"mAP": 0.5}

    monkeypatch.setattr(tune, "score", diverging)
    assert tune.main(root=tmp_path) == 1
    assert table.read_bytes() == before
    assert capsys.readouterr().err == "tools.tune: the loss is NaN; lower lr\n"


def test_the_committed_table_is_of_the_grid_and_its_best_learning_rate_is_the_recipes():
    study = load_study(PARAMS)
    table = pd.read_csv(PARAMS.parent / "results/tuning" / f"{study.tuning.dataset}.csv")
    assert set(table.lr) == set(study.tuning.grid.lr)
    assert set(table.seed) == set(study.tuning.seeds)
    best = table.groupby(["lr", "steps_per_epoch"]).mAP.mean().idxmax()
    recipe = study.dataset(study.tuning.dataset).recipe
    assert best == (recipe.lr, recipe.steps_per_epoch)


@pytest.mark.parametrize("tool", [tune, precision])
def test_an_absent_params_yaml_is_one_sentence_and_nothing_is_made(tool, tmp_path, capsys):
    assert tool.main(root=tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{tool.__name__}: ") and "params.yaml is missing" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [tune, precision])
def test_called_in_another_folder_it_makes_nothing_there(tool, tmp_path, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
        shutil.copyfile(PARAMS, folder / "params.yaml")
    monkeypatch.chdir(elsewhere)
    assert tool.main(root=project) == 1
    assert "data/packed/synth_sysu" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == [path.name for path in project.iterdir()] == ["params.yaml"]
